"""The plan: what lies where, whether it fits, and the nearest settings that do.

Owns the places and the search for settings. How long things take is `timing`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from hybridk2.config import DenseDtype, KvDtype
from hybridk2.hardware import CARDS, GpuProfile, MachineProfile
from hybridk2.planner.sizes import ModelSizes
from hybridk2.planner.timing import (
    DecodeTime,
    PrefillTime,
    cpu_decode,
    cpu_prefill,
    gpu_decode,
    gpu_prefill,
)

GIGABYTE = 1_000_000_000
# Of a card: the CUDA context, activations of a chunk of so many tokens, the ring that experts
# stream through, and what decoding's attention leaves between its programs: however many rows a
# step has, 8.7 MB by the kernel for Hopper cards, up to 17 MB there by Triton's.
GPU_RESERVE_BYTES = 1_900_000_000
GPU_RESERVED_CHUNK_TOKENS = 2048
# What loading and serving need beyond the weights, the process itself included, as
# experts.loading counts it.
HOST_WORKING_BYTES = 1_000_000_000

_SHORTEST_CONTEXT = 4096

_CARD, _HOST = "GPU memory", "host memory"


@dataclass(frozen=True)
class Choices:
    """What a person may choose. fp8 and INT8 are for a card.

    context_tokens: to make room for; speeds are those of a conversation of
    decode_context_tokens. resident_experts: on the card, of all layers; None for as many as fit in
    whole layers. keep_host_copy: these lie in host memory too. chunk_tokens: of a prompt, computed
    at a time on the card."""

    context_tokens: int = 32_768
    kv_dtype: KvDtype = "bf16"
    dense: DenseDtype = "bf16"
    decode_context_tokens: int = 8_192
    resident_experts: int | None = None
    keep_host_copy: bool = False
    chunk_tokens: int = GPU_RESERVED_CHUNK_TOKENS


@dataclass(frozen=True)
class Place:
    """A memory, what is to lie in it, and how much of it there is."""

    name: str
    contents: tuple[tuple[str, int], ...]
    capacity_bytes: int

    @property
    def needed_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.contents)

    @property
    def shortfall_bytes(self) -> int:
        return max(self.needed_bytes - self.capacity_bytes, 0)


@dataclass(frozen=True)
class Nearest:
    """Settings with which a place is large enough. options: as the command line takes them."""

    place: str
    options: str
    effect: str


@dataclass(frozen=True)
class Plan:
    """A model on a machine.

    resident_experts: routed experts on the card, in all layers together. free_gpu_bytes: of the
    card for them, negative when not even the rest fits; None without a card. nearest: empty when
    it fits.
    """

    sizes: ModelSizes
    machine: MachineProfile
    choices: Choices
    places: tuple[Place, ...]
    resident_experts: int
    free_gpu_bytes: int | None
    decode: DecodeTime
    nearest: tuple[Nearest, ...]

    @property
    def resident_experts_per_layer(self) -> int:
        """What every layer has on the card at least; some have one more where they do not share
        out evenly, as placement.layer_budgets does it."""
        return self.resident_experts // max(self.sizes.moe_layers, 1)

    @property
    def resident_share(self) -> float:
        """Of all routed experts, those on the card."""
        return _share(self.resident_experts, self.sizes)

    @property
    def fits(self) -> bool:
        return not self.shortfall_bytes

    @property
    def shortfall_bytes(self) -> int:
        """What is missing, over all places."""
        return sum(place.shortfall_bytes for place in self.places)

    @property
    def decode_tokens_per_second(self) -> float:
        return 1 / self.decode.seconds

    @property
    def limit(self) -> str:
        """What decoding waits for most."""
        return self.decode.limit

    def prefill(self, prompt_tokens: int) -> PrefillTime:
        """The time of a prompt of so many tokens, none of them cached."""
        gpu = self.machine.gpu
        if gpu is None:
            return cpu_prefill(self.sizes, self.machine, prompt_tokens)
        return gpu_prefill(
            self.sizes, self.machine, gpu, prompt_tokens, resident_share=self.resident_share
        )

    def prefill_tokens_per_second(self, prompt_tokens: int) -> float:
        return prompt_tokens / self.prefill(prompt_tokens).seconds

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON; prompts of 512, 4096 and 16384 tokens."""
        prompts = (512, 4096, 16_384)
        return {
            "fits": self.fits,
            "shortfall_bytes": self.shortfall_bytes,
            "places": [
                {
                    "name": place.name,
                    "contents": dict(place.contents),
                    "needed_bytes": place.needed_bytes,
                    "capacity_bytes": place.capacity_bytes,
                }
                for place in self.places
            ],
            "nearest": [asdict(setting) for setting in self.nearest],
            "resident_experts": self.resident_experts,
            "resident_experts_per_layer": self.resident_experts_per_layer,
            "free_gpu_bytes": self.free_gpu_bytes,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "limit": self.limit,
            "decode_parts": [asdict(part) for part in self.decode.parts],
            "overlapped_seconds": self.decode.overlapped_seconds,
            "prefill_tokens_per_second": {
                str(tokens): self.prefill_tokens_per_second(tokens) for tokens in prompts
            },
            "prefill_limit": {str(tokens): self.prefill(tokens).limit for tokens in prompts},
            "choices": asdict(self.choices),
            "sizes": asdict(self.sizes),
            "machine": self.machine.as_dict(),
        }


def plan(sizes: ModelSizes, machine: MachineProfile, choices: Choices) -> Plan:
    """Lay the model out on the machine."""
    made = _lay_out(sizes, machine, choices)
    return made if made.fits else replace(made, nearest=tuple(_nearest(made)))


def free_gpu_bytes(sizes: ModelSizes, gpu: GpuProfile, choices: Choices) -> int:
    """Of the card, for routed experts; negative when not even the rest fits."""
    cache = choices.context_tokens * sizes.latent_bytes(choices.kv_dtype)
    used = sizes.gpu_weight_bytes(choices.dense) + cache + _reserve_bytes(sizes, choices)
    return gpu.memory_bytes - used


def _reserve_bytes(sizes: ModelSizes, choices: Choices) -> int:
    longer = max(choices.chunk_tokens - GPU_RESERVED_CHUNK_TOKENS, 0)
    return GPU_RESERVE_BYTES + longer * sizes.prompt_token_bytes


def _lay_out(sizes: ModelSizes, machine: MachineProfile, choices: Choices) -> Plan:
    gpu = machine.gpu
    context = min(choices.decode_context_tokens, choices.context_tokens)
    if gpu is None:
        host = Place(_HOST, _host_contents(sizes, machine, choices), machine.ram_bytes)
        decode = cpu_decode(sizes, machine, context)
        return Plan(sizes, machine, choices, (host,), 0, None, decode, ())
    weights = sizes.gpu_weight_bytes(choices.dense)
    cache = choices.context_tokens * sizes.latent_bytes(choices.kv_dtype)
    free = free_gpu_bytes(sizes, gpu, choices)
    resident = choices.resident_experts
    if resident is None:
        resident = min(max(free, 0) // max(sizes.expert_bytes, 1), sizes.num_experts)
    resident_bytes = resident * sizes.expert_bytes
    on_host = sizes.routed_bytes - (0 if choices.keep_host_copy else resident_bytes)
    card = Place(
        _CARD,
        (
            ("weights but routed experts", weights),
            ("latent cache", cache),
            ("reserve", _reserve_bytes(sizes, choices)),
            ("routed experts", resident_bytes),
        ),
        gpu.memory_bytes,
    )
    host = Place(
        _HOST,
        (
            ("routed experts", on_host),
            ("embedding", sizes.embedding_bytes),
            *_working_contents(machine),
        ),
        machine.ram_bytes,
    )
    decode = gpu_decode(
        sizes,
        machine.host_read_bytes_per_second,
        gpu,
        context_tokens=context,
        kv_dtype=choices.kv_dtype,
        dense=choices.dense,
        resident_share=_share(resident, sizes),
    )
    return Plan(sizes, machine, choices, (card, host), resident, free, decode, ())


def _share(resident_experts: int, sizes: ModelSizes) -> float:
    return resident_experts / max(sizes.num_experts, 1)


def _host_contents(
    sizes: ModelSizes, machine: MachineProfile, choices: Choices
) -> tuple[tuple[str, int], ...]:
    """Today's engine: all in host memory, and a cache of twice the context, so that a second
    conversation does not push out the first."""
    return (
        ("routed experts", sizes.routed_bytes),
        ("other weights of the layers", sizes.host_dense_bytes),
        ("embedding and lm_head", sizes.embedding_bytes + sizes.head_bytes),
        ("latent cache", 2 * choices.context_tokens * sizes.latent_bytes("bf16")),
        *_working_contents(machine),
    )


def _working_contents(machine: MachineProfile) -> tuple[tuple[str, int], ...]:
    """The process itself, and what is left of the working memory for prompts and buffers."""
    return (
        ("the process itself", machine.process_bytes),
        ("to work with", max(HOST_WORKING_BYTES - machine.process_bytes, 0)),
    )


def _nearest(made: Plan) -> Iterator[Nearest]:
    """For each place that is too small, the smallest changes that make it large enough."""
    if made.machine.gpu is not None and made.places[0].shortfall_bytes:
        yield from _for_the_card(made)
    if made.places[-1].shortfall_bytes:
        yield from _for_the_host(made)


def _for_the_card(made: Plan) -> Iterator[Nearest]:
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("--kv-dtype fp8", {"kv_dtype": "fp8"}),
        ("--dense int8", {"dense": "int8"}),
        ("--dense int8 --kv-dtype fp8", {"dense": "int8", "kv_dtype": "fp8"}),
    )
    for options, change in changes:
        choices = replace(made.choices, **change)
        if choices != made.choices and _card_shortfall(made, choices) <= 0:
            yield Nearest(_CARD, options, "the card's memory is enough")
            break
    for options, change in (("", {}), *changes):
        choices = replace(made.choices, **change)
        context = _longest_context(made, choices)
        if context:
            yield Nearest(_CARD, f"{options} --context {context}".strip(), "a shorter context")
            break
    free = made.free_gpu_bytes or 0
    if made.choices.resident_experts and free >= 0:
        most = free // made.sizes.expert_bytes
        yield Nearest(_CARD, f"--placement of {most} experts at most", "fewer experts on the card")
    wanted = made.places[0].needed_bytes
    larger = [card for card in CARDS if card.memory_bytes >= wanted]
    if larger:
        card = min(larger, key=lambda card: card.memory_bytes)
        yield Nearest(_CARD, f'--gpu "{card.name}"', "a card with more memory")


def _card_shortfall(made: Plan, choices: Choices) -> int:
    gpu = made.machine.gpu
    assert gpu is not None
    wanted = (choices.resident_experts or 0) * made.sizes.expert_bytes
    return wanted - free_gpu_bytes(made.sizes, gpu, choices)


def _longest_context(made: Plan, choices: Choices) -> int:
    """The longest context, halved from the wanted one, that fits on the card; 0 if none does."""
    context = choices.context_tokens // 2
    while context >= _SHORTEST_CONTEXT:
        if _card_shortfall(made, replace(choices, context_tokens=context)) <= 0:
            return context
        context //= 2
    return 0


def _for_the_host(made: Plan) -> Iterator[Nearest]:
    host = made.places[-1]
    cache = dict(host.contents).get("latent cache", 0)
    context = made.choices.context_tokens
    while made.machine.gpu is None and context // 2 >= _SHORTEST_CONTEXT:
        context //= 2
        saved = cache - 2 * context * made.sizes.latent_bytes("bf16")
        if saved >= host.shortfall_bytes:
            yield Nearest(_HOST, f"--context {context}", "a shorter context")
            break
    yield Nearest(_HOST, f"--ram {-(-host.needed_bytes // GIGABYTE)}", "so many GB of host memory")
    if made.machine.gpu is None:
        return
    expert_bytes = made.sizes.expert_bytes
    more = -(-host.shortfall_bytes // expert_bytes) * expert_bytes
    wanted = made.machine.gpu.memory_bytes + more
    larger = [card for card in CARDS if card.memory_bytes >= wanted]
    if larger and not made.places[0].shortfall_bytes:
        card = min(larger, key=lambda card: card.memory_bytes)
        yield Nearest(_HOST, f'--gpu "{card.name}"', "a card that takes more experts from the host")
