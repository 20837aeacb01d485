"""How fast this machine is at what the model does: the figures of a MachineProfile.

Owns two layers of random weights in K2's true dimensions and the timing of their parts, through the
engine's own kernels and operators: what is measured is what will run. A layer of negligible weights
gives the time that goes into operators instead of bytes. Parts are measured in turns, round by
round, so that a neighbour who comes and goes slows all of them alike; medians of the rounds count.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from hybridk2.checkpoint import (
    AttentionWeights,
    LayerWeights,
    Layout,
    MlpWeights,
    QuantizedLinear,
    RouterWeights,
    TensorSpec,
)
from hybridk2.config import GROUP_SIZE, KIMI_K2_THINKING, K2Config
from hybridk2.device import CpuDevice
from hybridk2.errors import OutOfMemoryError
from hybridk2.experts.host import READ_LOOPS, HostExperts, available_isas, usable_cores
from hybridk2.experts.router import ThreadRouter
from hybridk2.hardware import MachineProfile, SystemFacts
from hybridk2.kv_cache import PagedLatentCache
from hybridk2.measurement.process import process_bytes
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.model.k2 import DecoderLayer, K2Model
from hybridk2.model.layers import RotaryTable
from hybridk2.model.moe import RoutedExperts

# (what is being measured, rounds done, rounds in all)
OnProgress = Callable[[str, int, int], None]

# Two layers, the second of 32 experts, 0.8 GB, and a tenth of the vocabulary: 2.3 GB, beside which
# no cache counts, and each round reads most of it.
_TRUE = replace(
    KIMI_K2_THINKING,
    num_hidden_layers=2,
    n_routed_experts=32,
    vocab_size=16_384,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
# The same operators on next to no weights.
_NEGLIGIBLE = replace(
    _TRUE,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=64,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    vocab_size=64,
)
_NEEDED_BYTES = 4_000_000_000

_SHORT_PAST, _LONG_PAST = 64, 4096
_ROUNDS = 25
_SLOW_ROUNDS = 5  # of prompts
_TOKENS_PER_EXPERT = 16  # a chunk of 512 tokens gives each of K2's experts 11
_PROMPT_ROWS = 512
_BLOCK_VALUES = 1 << 20


def measure_machine(system: SystemFacts, on_progress: OnProgress) -> MachineProfile:
    """Measure everything that a profile holds; half a minute on two cores.

    system: what Linux says of the machine. on_progress may raise, which ends it. Raises
    OutOfMemoryError when less than 4 GB are free.
    """
    available_bytes = psutil.virtual_memory().available
    if available_bytes < _NEEDED_BYTES:
        raise OutOfMemoryError(
            f"measuring takes {_NEEDED_BYTES / 1e9:.0f} GB of memory, available are "
            f"{available_bytes / 1e9:.1f} GB. Close other programs"
        )
    on_progress("the process itself", 0, 1)
    of_process = process_bytes()
    cores = usable_cores()
    torch.set_num_threads(cores)
    on_progress("making random weights", 0, 1)
    with torch.inference_mode(), _Layers(_TRUE) as true, _Layers(_NEGLIGIBLE) as negligible:
        seconds = _median_seconds(true, negligible, on_progress)
        isa, nodes = true.experts.isa, len(true.experts.threads_of_node)
    return MachineProfile(
        name=system.processor,
        gpu=None,
        isa=isa,
        cores=cores,
        nodes=nodes,
        ram_bytes=system.usable_ram_bytes,
        process_bytes=of_process,
        measured=True,
        **_speeds(seconds),
    )


def arithmetic_roofs() -> dict[str, float]:
    """FLOP/s of all cores multiplying bf16 activations in registers, by instruction set.

    Instruction sets whose kernels have no such loop are left out.
    """
    roofs = {}
    for isa in available_isas():
        with HostExperts(1, 1, GROUP_SIZE, GROUP_SIZE, isa=isa) as experts:
            found = [experts.arithmetic_roof(torch.bfloat16) for _ in range(3)]
        measured = [roof for roof in found if roof is not None]
        if measured:
            roofs[isa] = max(measured)
    return roofs


def _speeds(seconds: dict[str, float]) -> dict[str, float]:
    """From medians by part to the fields of a profile."""
    expert_bytes = _expert_bytes(_TRUE)
    picked_bytes = _TRUE.num_experts_per_tok * expert_bytes
    flops_per_token = 2 * 3 * _TRUE.hidden_size * _TRUE.moe_intermediate_size
    layout = Layout(_TRUE)
    shared_bytes = _bf16_bytes(list(layout.shared_expert(1).values()))
    router_bytes = 4 * _TRUE.n_routed_experts * _TRUE.hidden_size  # fp32, as it is computed
    latent_bytes = 2 * _TRUE.latent_dim * (_LONG_PAST - _SHORT_PAST)

    def without_overhead(part: str) -> float:
        # A neighbour in the wrong round must not make a part faster than nothing at all.
        return max(seconds[part] - seconds[f"{part}, negligible"], seconds[part] / 4)

    return {
        "host_read_roof_bytes_per_second": _TRUE.n_routed_experts * expert_bytes / seconds["roof"],
        "host_read_bytes_per_second": picked_bytes / seconds["experts"],
        "moe_bytes_per_second": (picked_bytes + shared_bytes + router_bytes)
        / without_overhead("moe"),
        "attention_bytes_per_second": _bf16_bytes(list(layout.attention(0).values()))
        / without_overhead("attention"),
        "dense_bytes_per_second": _bf16_bytes(list(layout.dense_mlp(0).values()))
        / without_overhead("dense"),
        "head_bytes_per_second": _bf16_bytes([layout.lm_head()]) / seconds["head"],
        "latent_bytes_per_second": latent_bytes
        / max(seconds["long attention"] - seconds["attention"], seconds["attention"] / 100),
        "layer_overhead_seconds": seconds["layer, negligible"],
        "host_flops": _prompt_tokens()
        * _TRUE.num_experts_per_tok
        * flops_per_token
        / seconds["experts, prompt"],
        "dense_flops": _PROMPT_ROWS * shared_bytes / seconds["shared, prompt"],
    }


def _median_seconds(
    true: _Layers, negligible: _Layers, on_progress: OnProgress
) -> dict[str, float]:
    """Medians over the rounds of every part, by name."""
    quick: dict[str, Callable[[], object]] = {
        "attention": true.attend,
        "attention, negligible": negligible.attend,
        "dense": true.dense,
        "dense, negligible": negligible.dense,
        "moe": true.moe,
        "moe, negligible": negligible.moe,
        "layer, negligible": negligible.layer,
        "head": true.head,
        "long attention": lambda: true.attend(_LONG_PAST),
        # torch's threads spin for a while after the part before: beside them nothing is alone.
        "experts, beside spinning threads": lambda: true.run_experts(1),
        "experts": lambda: true.run_experts(1),
    }
    slow: dict[str, Callable[[], object]] = {
        "experts, prompt": lambda: true.run_experts(_prompt_tokens()),
        "shared, prompt": lambda: true.shared(_PROMPT_ROWS),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for parts, rounds, stage in (
        (quick, _ROUNDS, "decoding, part by part"),
        (slow, _SLOW_ROUNDS, "prompts"),
    ):
        for part in parts.values():  # the first call of each compiles and allocates
            part()
        for round_ in range(rounds):
            on_progress(stage, round_, rounds)
            for name, part in parts.items():
                seconds[name].append(_time(part))
            if parts is quick:
                # The best loop of each round: which one that is depends on the machine.
                loops = range(len(READ_LOOPS))
                seconds["roof"].append(min(map(true.experts.read_weights_seconds, loops)))
        on_progress(stage, rounds, rounds)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _time(part: Callable[[], object]) -> float:
    begin = time.perf_counter()
    part()
    return time.perf_counter() - begin


def _prompt_tokens() -> int:
    return _TOKENS_PER_EXPERT * _TRUE.n_routed_experts // _TRUE.num_experts_per_tok


class _Layers:
    """A dense layer, a MoE layer and lm_head of random weights, and a sequence to decode."""

    def __init__(self, config: K2Config) -> None:
        self._config = config
        self._generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(_BLOCK_VALUES, generator=self._generator).bfloat16() * 0.02
        device = CpuDevice()
        self.experts = HostExperts(
            1,
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            spins_when_idle=False,  # as in an engine that computes on the host
        )
        self._load_experts()
        layout = Layout(config)
        routed = RoutedExperts(ThreadRouter(self.experts, device))
        self._layers = [
            DecoderLayer(
                config, self._weights(layout, layer), layer, routed, device, torch.bfloat16
            )
            for layer in range(2)
        ]
        head, norm = self._tensor(layout.lm_head()), self._tensor(layout.final_norm())
        self._model = K2Model(
            config, head, self._layers, norm, head, device, torch.bfloat16, routed
        )
        self._rotary = RotaryTable(config, device)
        self._batches = {past: self._batch(past) for past in (_SHORT_PAST, _LONG_PAST)}

    def __enter__(self) -> _Layers:
        return self

    def __exit__(self, *error: object) -> None:
        self.experts.close()

    def attend(self, past: int = _SHORT_PAST) -> Tensor:
        x, cos, sin = self._token(past)
        return self._layers[0].attention.decode(x, cos, sin, self._batches[past])

    def dense(self) -> Tensor:
        return self._layers[0].feed_forward(self._rows(1))

    def moe(self) -> Tensor:
        return self._layers[1].feed_forward(self._rows(1))

    def layer(self) -> Tensor:
        x, cos, sin = self._token(_SHORT_PAST)
        layer, batch = self._layers[1], self._batches[_SHORT_PAST]
        return layer.decode(x, x, cos, sin, batch, layer.input_norm)[0]

    def head(self) -> Tensor:
        return self._model.logits(self._rows(1))

    def shared(self, rows: int) -> Tensor:
        moe = self._layers[1].moe
        assert moe is not None
        return moe.shared_expert(self._rows(rows))

    def run_experts(self, tokens: int) -> Tensor:
        """The routed experts alone; each token picks as many different ones as the model's do."""
        top_k, experts = self._config.num_experts_per_tok, self._config.n_routed_experts
        scores = torch.rand(tokens, experts, generator=self._generator)
        ids = scores.topk(top_k, dim=-1).indices.int()
        weights = torch.full((tokens, top_k), 1 / top_k)
        return self.experts.wait(self.experts.submit(0, self._rows(tokens), ids, weights))

    def _token(self, past: int) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = self._rotary(torch.tensor([past]))
        return self._rows(1), cos, sin

    def _rows(self, tokens: int) -> Tensor:
        """Other rows in every call, so that the router picks other experts."""
        shape = (tokens, self._config.hidden_size)
        return torch.randn(shape, generator=self._generator).bfloat16()

    def _batch(self, past: int) -> DecodeBatch:
        """A step of one token after so many."""
        cache = PagedLatentCache(self._config, past + 64, 64, CpuDevice(), torch.bfloat16)
        sequence = cache.open([0], repeatable=False)
        sequence.reserve(past + 1)
        latents = self._filled((past, self._config.latent_dim))
        for layer in range(2):
            sequence.write(layer, latents)
        sequence.advance([0] * past)
        batch = DecodeBatch(self._config, 1, cache, CpuDevice(), torch.bfloat16)
        batch.fill(self._rows(1), [sequence])
        return batch

    def _weights(self, layout: Layout, layer: int) -> LayerWeights:
        def tensors(specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
            return {name: self._tensor(spec) for name, spec in specs.items()}

        is_moe = self._config.is_moe(layer)
        return LayerWeights(
            **tensors(layout.norms(layer)),
            attention=AttentionWeights(**tensors(layout.attention(layer))),
            mlp=None if is_moe else MlpWeights(**tensors(layout.dense_mlp(layer))),
            router=RouterWeights(**tensors(layout.router(layer))) if is_moe else None,
            shared=MlpWeights(**tensors(layout.shared_expert(layer))) if is_moe else None,
        )

    def _tensor(self, spec: TensorSpec) -> Tensor:
        values = self._filled(spec.shape)
        return values.float() if spec.dtypes[0] == "F32" else values

    def _filled(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of its own with random values that repeat: speed does not depend on them."""
        values = torch.empty(shape, dtype=torch.bfloat16)
        for piece in values.view(-1).split(_BLOCK_VALUES):
            piece.copy_(self._block[: piece.numel()])
        return values

    def _load_experts(self) -> None:
        hidden, width = self._config.hidden_size, self._config.moe_intermediate_size

        def matrix(rows: int, columns: int) -> QuantizedLinear:
            codes = torch.randint(
                -(2**31), 2**31 - 1, (rows, columns // 8), generator=self._generator
            )
            scale = self._filled((rows, columns // GROUP_SIZE)).abs()
            return QuantizedLinear(codes.int(), scale)

        gate, up, down = matrix(width, hidden), matrix(width, hidden), matrix(hidden, width)
        for expert in range(self._config.n_routed_experts):
            self.experts.load_expert(0, expert, gate, up, down)


def _expert_bytes(config: K2Config) -> int:
    """4.5 bits a weight: nibbles, and a bf16 scale for every group."""
    weights = 3 * config.hidden_size * config.moe_intermediate_size
    return weights // 2 + weights // GROUP_SIZE * 2


def _bf16_bytes(specs: list[TensorSpec]) -> int:
    return sum(2 * torch.Size(spec.shape).numel() for spec in specs)
