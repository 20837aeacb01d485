"""An engine that computes on a card and, of routed experts that have no room there, on the host.

Owns what the card holds and the order in which it is filled: the plan, then experts on both sides,
the crossing between them, the dense part, the cache.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from hybridk2.checkpoint import Checkpoint
from hybridk2.config import EngineConfig, K2Config
from hybridk2.device import Device
from hybridk2.engine_parts.parts import (
    EngineParts,
    OnProgress,
    available_bytes,
    host_experts,
    whole_pages,
)
from hybridk2.errors import ConfigError
from hybridk2.experts import panels
from hybridk2.experts.changes import ChangingResidents, measure_swap_costs
from hybridk2.experts.expert_costs import measure_expert_costs
from hybridk2.experts.handoff import (
    HostFunctionRouter,
    MailboxRouter,
    StreamRouter,
    fastest_router,
    measure_handoff,
)
from hybridk2.experts.host import CardPinning, HostExperts, card_stream
from hybridk2.experts.loading import load_experts, load_placement
from hybridk2.experts.prefill import Dequantise, ExpertProducts, PrefillExperts
from hybridk2.experts.resident import ResidentArithmetic, ResidentExperts
from hybridk2.experts.router import AsyncRouter, ThreadRouter
from hybridk2.experts.stream import ExpertStream, PinnedLayers
from hybridk2.kv_cache import PagedLatentCache
from hybridk2.model.loading import fp8_latents, load_model, paged_mix_for
from hybridk2.model.moe import RoutedExperts
from hybridk2.placement import Mask
from hybridk2.planner import CardLayout, ModelSizes, lay_out_card
from hybridk2.prefill_split import ExpertCosts

logger = logging.getLogger(__name__)

_DTYPE = torch.bfloat16
# Experts on their way through the card: 0.4 GB of K2, counted in the plan's reserve.
_RING_SLOTS = 16
# Experts that the costs are measured on: 3 GB of K2, which no cache holds.
_MEASURED_EXPERTS = 128
# Decoded tokens, about an answer's, for which what is picked is expected to stay much the same.
_ROUTING_TOKENS = 2048


def load_onto_card(
    checkpoint: Checkpoint,
    choices: EngineConfig,
    device: Device,
    context_tokens: int,
    on_progress: OnProgress,
) -> EngineParts:
    """See `load_parts`. The cache holds one conversation of the context's length.

    Raises OutOfMemoryError, with the plan's numbers, for what fits neither card nor host.
    """
    config = checkpoint.config
    cache_tokens = choices.kv_cache_tokens or context_tokens
    layout = _layout(checkpoint, choices, device, cache_tokens)
    with ExitStack() as resources:
        on_card = layout.resident if layout.resident.any() else None
        elsewhere = None if choices.keep_host_copy else on_card
        experts = host_experts(checkpoint, choices, elsewhere, spins_when_idle=True)
        resources.callback(experts.close)
        resident = None if on_card is None else _resident(experts, on_card, device)
        load_experts(
            checkpoint,
            experts,
            on_progress,
            resident=resident,
            keep_host_copy=choices.keep_host_copy,
        )
        decoding = _decoding(experts, device, choices, config, resources)
        kept = _kept_by_host(config, elsewhere)
        prompts, costs = _prompts(experts, kept, device, config, resident, resources)
        routed = RoutedExperts(
            decoding,
            prompts,
            resident,
            choices.defer_experts,
        )
        model = load_model(
            checkpoint,
            experts,
            device,
            _DTYPE,
            on_progress,
            routed=routed,
            paged_mix=paged_mix_for(config, device),
            int8=choices.dense == "int8",
        )
        if choices.dynamic_placement:
            model.after_decoding = _changing(experts, resident, costs, device, config).after_step
        cache = PagedLatentCache(
            config,
            cache_tokens,
            whole_pages(layout.chunk_tokens),
            device,
            _DTYPE,
            fp8_latents(config) if choices.kv_dtype == "fp8" else None,
        )
        return EngineParts(device, model, experts, cache, context_tokens, resources.pop_all())


def _layout(
    checkpoint: Checkpoint, choices: EngineConfig, device: Device, cache_tokens: int
) -> CardLayout:
    """The plan, before anything is allocated, and what it says in the log."""
    memory = device.memory_bytes()
    assert memory is not None, f"{device.name} has no memory of its own"
    placement = None
    if choices.placement is not None:
        placement = load_placement(Path(choices.placement).expanduser(), checkpoint)
    layout = lay_out_card(
        ModelSizes.from_config(checkpoint.config),
        choices,
        cache_tokens=cache_tokens,
        free_bytes=memory[0],
        host_bytes=available_bytes(checkpoint, choices),
        placement=placement,
    )
    for place in layout.plan.places:
        contents = ", ".join(f"{size / 1e9:.2f} GB {what}" for what, size in place.contents if size)
        logger.info("%s: %s, of %.2f GB free", place.name, contents, place.capacity_bytes / 1e9)
    logger.info(
        "%d of %d routed experts on the card, %s; prompts in chunks of %d tokens",
        layout.plan.resident_experts,
        layout.resident.size,
        f"as {choices.placement} says" if placement else "evenly spread, as nothing is known",
        layout.chunk_tokens,
    )
    return layout


def _kept_by_host(config: K2Config, elsewhere: Mask | None) -> list[list[int]]:
    """Of each MoE layer the experts that the host has."""
    return [
        [e for e in range(config.n_routed_experts) if elsewhere is None or not elsewhere[slot, e]]
        for slot in range(config.num_moe_layers)
    ]


def _resident(experts: HostExperts, on_card: Mask, device: Device) -> ResidentExperts:
    arithmetic: ResidentArithmetic = panels.resident_experts
    if device.has_kernels:
        from hybridk2.model.triton import int4  # loads Triton

        arithmetic = int4.resident_experts
    return ResidentExperts(on_card, experts.hidden, experts.intermediate, device, arithmetic)


def _prompts(
    experts: HostExperts,
    kept: list[list[int]],
    device: Device,
    config: K2Config,
    resident: ResidentExperts | None,
    resources: ExitStack,
) -> tuple[PrefillExperts, ExpertCosts]:
    """Who computes a prompt's experts, by costs that are measured here and now."""
    dequantise: Dequantise = panels.dequantise
    if device.has_kernels:
        from hybridk2.model.triton import int4  # loads Triton

        dequantise = int4.dequantise
    pinned = PinnedLayers(experts, kept, CardPinning())
    resources.callback(pinned.close)
    stream = ExpertStream(experts, device, _RING_SLOTS, pinned.cuts)
    resources.callback(stream.wait)
    products = ExpertProducts(experts.hidden, experts.intermediate, device, dequantise)
    loaded = [(slot, expert) for slot, ids in enumerate(kept) for expert in ids]
    if loaded:
        some = loaded[:_MEASURED_EXPERTS]
        costs = measure_expert_costs(experts, some, stream, products, device)
        logger.info("experts of prompts: %s", _in_words(costs))
    else:
        # All live on the card: there is nothing to choose.
        costs = ExpertCosts(experts.expert_bytes, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    host = ThreadRouter(experts, device)
    number = config.n_routed_experts
    return PrefillExperts(host, device, stream, products, costs, number, resident), costs


def _changing(
    experts: HostExperts,
    resident: ResidentExperts | None,
    costs: ExpertCosts,
    device: Device,
    config: K2Config,
) -> ChangingResidents:
    """The card's experts, as they will change. Raises ConfigError when there are none."""
    if resident is None:
        raise ConfigError("--dynamic-placement: no routed expert lives on the card. Leave it out")
    swap = measure_swap_costs(
        costs, resident, device, config.hidden_size, config.num_experts_per_tok
    )
    logger.info(
        "experts on the card change where that pays: a hit saves %.0f us, an upload takes %.0f us",
        swap.hit_seconds * 1e6,
        swap.upload_seconds * 1e6,
    )
    return ChangingResidents(experts, resident, swap, _ROUTING_TOKENS)


def _in_words(costs: ExpertCosts) -> str:
    return (
        f"host {costs.host_bytes_per_second / 1e9:.0f} GB/s and {costs.host_flops / 1e12:.2f} "
        f"TFLOP/s, bus {costs.bus_bytes_per_second / 1e9:.1f} GB/s, card "
        f"{costs.device_flops / 1e12:.1f} TFLOP/s"
    )


def _decoding(
    experts: HostExperts,
    device: Device,
    choices: EngineConfig,
    config: K2Config,
    resources: ExitStack,
) -> AsyncRouter:
    """The crossing of decoding: the one that was asked for, else the one that measures best."""
    if choices.handoff == "thread":
        logger.info("handoff to the host's experts: thread, as asked for")
        return ThreadRouter(experts, device)
    layers, top_k = config.num_moe_layers, config.num_experts_per_tok
    submissions = layers + (layers - 1 if choices.defer_experts else 0)
    stream = card_stream(device.torch_device.index)

    def opened(kind: type[StreamRouter]) -> StreamRouter:
        return kind(experts, device, stream, submissions=submissions, top_k=top_k, dtype=_DTYPE)

    def seconds(router: AsyncRouter) -> float:
        return measure_handoff(
            router,
            device,
            submissions=submissions,
            rows=1,
            hidden=experts.hidden,
            top_k=top_k,
            dtype=_DTYPE,
        )

    kinds: dict[str, list[type[StreamRouter]]] = {
        "mailbox": [MailboxRouter],
        "host-functions": [HostFunctionRouter],
        "auto": [MailboxRouter, HostFunctionRouter],
    }
    routers = [opened(kind) for kind in kinds[choices.handoff]]
    router = fastest_router(routers, seconds)
    resources.callback(router.close)
    return router
