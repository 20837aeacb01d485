"""The model at full depth: equal numbers by every mechanism, overlap, tokens per second.

Parts of a step are measured in the same run, so that the whole can be held to them:

    T <= 1.15 (max(T_host, T_gpu_moe) + T_attention)

T_host: the host's experts of all layers, alone. T_gpu_moe: the card's share of the MoE blocks
(router, shared expert), alone. T_attention: everything else of a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.crossing import NobodyRouter, PicksByPosition, host_step
from gpu.shaped_model import Alias, AliasedRouter, random_model
from gpu.table import Table, median_seconds
from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.experts.host import HostExperts
from hybridk2.experts.router import AsyncRouter
from hybridk2.kv_cache import CacheSequence, PagedLatentCache
from hybridk2.model.attention import PagedMix
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.model.k2 import K2Model
from hybridk2.model.moe import RoutedExperts

DECODE_SLACK = 1.15
OVERLAP = 0.85
_BALANCED = 0.2  # of the greater side's time that the lesser takes, at least
_OVERLAP_TURNS = 5
# Of the largest logit: what one bf16 rounding more or less does in each of 61 layers.
EQUAL = 0.03


@dataclass
class WholeModel:
    """One set of weights; who computes its experts is exchanged between measurements."""

    config: K2Config
    device: Device
    experts: HostExperts
    alias: Alias
    model: K2Model
    cache: PagedLatentCache

    @classmethod
    def build(
        cls,
        config: K2Config,
        device: Device,
        experts: HostExperts,
        real_layers: int,
        paged_mix: PagedMix | None,
        cache_tokens: int,
    ) -> WholeModel:
        routed = RoutedExperts(NobodyRouter(device))
        model = random_model(config, device, lambda: routed, paged_mix)
        cache = PagedLatentCache(config, cache_tokens, 2048, device, torch.bfloat16)
        for layer in range(config.num_hidden_layers):
            cache.latents(layer).normal_()
        alias = Alias(real_layers, config.n_routed_experts)
        return cls(config, device, experts, alias, model, cache)

    def use(self, routed: RoutedExperts) -> None:
        """From now on these experts compute; recorded steps are forgotten."""
        self.model._experts = routed
        self.model._decode_steps = None
        for layer in self.model.layers:
            if layer.moe is not None:
                layer.moe._experts = routed

    def aliased(self, router: AsyncRouter) -> AsyncRouter:
        return AliasedRouter(router, self.alias)  # type: ignore[return-value]

    def sequence(self, tokens: int) -> CacheSequence:
        """As if so many tokens had been read: their latents are whatever the memory holds."""
        sequence = self.cache.open([], repeatable=True)
        sequence.reserve(tokens + 64)
        sequence.advance([1] * tokens)
        return sequence

    def decode(self, sequences: Sequence[CacheSequence]) -> Tensor:
        with torch.inference_mode():
            tokens = list(range(1, len(sequences) + 1))
            return self.model.decode(tokens, sequences, rows_are_independent=False).clone()

    def seconds_of_a_token(self, sequences: Sequence[CacheSequence], rounds: int = 10) -> float:
        return median_seconds(self.device, lambda: self.decode(sequences), rounds)

    def moe_step(self, batch: DecodeBatch) -> Callable[[], None]:
        """All MoE blocks of a step of one token, one after another, without attention."""
        torch.manual_seed(2)
        at = self.device.torch_device
        x = torch.randn(batch.rows, self.config.hidden_size, device=at).bfloat16()

        def run() -> None:
            batch.deferred = None
            for layer in self.model.layers:
                if layer.moe is not None:
                    layer.moe.decode(x, batch)

        return run

    def batch(self, sequence: CacheSequence) -> DecodeBatch:
        batch = DecodeBatch(self.config, 1, self.cache, self.device, torch.bfloat16)
        batch.fill(torch.zeros(1, self.config.hidden_size), [sequence])
        return batch

    def seconds_of_moe(self, router: AsyncRouter, batch: DecodeBatch, rounds: int = 10) -> float:
        """Of the MoE blocks with this router, recorded where that can be."""
        step = self.moe_step(batch)

        def whole(run: Callable[[], None]) -> None:
            router.begin_step()
            with torch.inference_mode():
                run()
            self.device.wait()
            router.end_step()

        whole(step)
        replays = self.device.replays_steps and router.records
        with torch.inference_mode():
            run = self.device.record(step) if replays else step
        return median_seconds(self.device, lambda: whole(run), rounds)


def check_equal(
    table: Table, whole: WholeModel, reference: AsyncRouter, others: Sequence[AsyncRouter]
) -> None:
    """Eager steps with the host waited for, and recorded ones by each mechanism."""
    for rows in (1, 3):
        sequences = [whole.sequence(1000 + 100 * row) for row in range(rows)]
        whole.use(RoutedExperts(whole.aliased(reference)))
        wanted = whole.decode(sequences)
        for router in others:
            whole.use(RoutedExperts(whole.aliased(router)))
            for _ in range(3):  # as it is, recorded, replayed
                found = whole.decode(sequences)
            error = float((found - wanted).abs().max() / wanted.abs().max())
            table.at_most(f"{router.name}, {rows} tokens: logits off by", error, "", EQUAL)
        for sequence in sequences:
            sequence.close()


def measure_overlap(
    table: Table,
    whole: WholeModel,
    router: AsyncRouter,
    packed: Tensor,
    arithmetic: Callable[..., Tensor],
) -> None:
    """(T_gpu + T_host - T) / min(T_gpu, T_host) of the MoE blocks, by how many of a token's picks
    the host computes. All are shown. Where one side has next to nothing to do, its time drowns in
    the other's noise: held to the target is the median of those that take the lesser side a fifth
    of the greater's time or more."""
    config, device = whole.config, whole.device
    sequence = whole.sequence(1000)
    batch = whole.batch(sequence)
    nobody, crossing = NobodyRouter(device), whole.aliased(router)
    balanced = []
    for on_host in (config.num_experts_per_tok, config.num_experts_per_tok // 2, 2, 1):
        picks = PicksByPosition(on_host, packed, arithmetic, config.moe_intermediate_size)
        alone = host_step(whole.experts, config, whole.alias, on_host)
        times: dict[str, list[float]] = {"gpu": [], "host": [], "both": []}
        for _ in range(_OVERLAP_TURNS):  # in turns, as the host's speed changes by the second
            whole.use(RoutedExperts(nobody, resident=picks))
            times["gpu"].append(whole.seconds_of_moe(nobody, batch, 3))
            times["host"].append(median_seconds(device, alone, 3))
            whole.use(RoutedExperts(crossing, resident=picks))
            times["both"].append(whole.seconds_of_moe(crossing, batch, 3))
        gpu, host, both = (statistics.median(times[name]) for name in ("gpu", "host", "both"))
        share = (gpu + host - both) / min(gpu, host)
        if min(gpu, host) >= _BALANCED * max(gpu, host):
            balanced.append(share)
        what = f"overlap, host {on_host} of {config.num_experts_per_tok} picks"
        table.figure(
            f"{what} (card {gpu * 1e3:.2f}, host {host * 1e3:.2f}, both {both * 1e3:.2f} ms)",
            share,
            "",
        )
    found = statistics.median(balanced) if balanced else float("nan")
    table.at_least("overlap efficiency where both have work, median", found, "", OVERLAP)
    sequence.close()


def measure_decode(
    table: Table, whole: WholeModel, router: AsyncRouter, contexts: Sequence[int]
) -> None:
    for context in contexts:
        sequence = whole.sequence(context)
        batch = whole.batch(sequence)
        nobody = NobodyRouter(whole.device)
        whole.use(RoutedExperts(nobody))
        card_alone = whole.seconds_of_a_token([sequence])
        card_moe = whole.seconds_of_moe(nobody, batch)
        picks = whole.config.num_experts_per_tok
        host = median_seconds(
            whole.device, host_step(whole.experts, whole.config, whole.alias, picks), 10
        )
        whole.use(RoutedExperts(whole.aliased(router)))
        found = whole.seconds_of_a_token([sequence])
        parts = max(host, card_moe) + (card_alone - card_moe)
        what = f"decode at {context:,} tokens, full depth"
        table.figure(what, 1 / found, "tok/s")
        table.figure(f"{what}: host alone {host * 1e3:.1f} ms, card alone", card_alone * 1e3, "ms")
        table.at_most(f"{what}: time over its parts'", found / parts, "", DECODE_SLACK)
        sequence.close()


def measure_prefill(
    table: Table, whole: WholeModel, prompts: AsyncRouter, tokens: Sequence[int]
) -> None:
    whole.use(RoutedExperts(NobodyRouter(whole.device), prompts=whole.aliased(prompts)))
    for count in tokens:
        ids = torch.randint(whole.config.vocab_size, (count,))
        sequence = whole.cache.open([], repeatable=True)
        sequence.reserve(count)

        def read(ids: Tensor = ids, sequence: CacheSequence = sequence) -> None:
            with torch.inference_mode():
                whole.model.forward(ids, torch.arange(len(ids)), sequence)

        began = _now(whole.device)
        read()
        seconds = _now(whole.device) - began
        table.figure(
            f"prefill of {count:,} tokens, one chunk, full depth", count / seconds, "tok/s"
        )
        sequence.close()


def _now(device: Device) -> float:
    device.wait()
    return time.perf_counter()
