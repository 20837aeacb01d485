"""Seconds of a token and of a prompt, part by part, and which resource each part waits for.

CPU: every part's bytes over the speed that such a part was measured to read with, and a measured
time per layer. GPU: the formula of two places that overlap,

    T_layer = T_attention + T_handoff + max(T_host_experts, T_shared + T_resident_experts),

with data-sheet speeds times an efficiency. Routing is taken as uniform over experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridk2.config import DenseDtype, KvDtype
from hybridk2.hardware import GpuProfile, MachineProfile
from hybridk2.planner.sizes import ModelSizes

HOST_BANDWIDTH = "host memory bandwidth"
HOST_ARITHMETIC = "host arithmetic"
GPU_BANDWIDTH = "GPU memory bandwidth"
GPU_ARITHMETIC = "GPU arithmetic"
BUS_BANDWIDTH = "bus bandwidth"
OVERHEAD = "overhead of operators"
HANDOFF = "handoff between GPU and host"

# Assumptions about a GPU engine on a card of which the data sheet is known: what kernels reach of
# its bandwidth in decode and of its arithmetic in prefill, and what a token costs beside its layers
# (sampling, launches). Of a card that was measured the kernels read at the speed of a copy, and a
# layer's small kernels are counted: an H100 took 12.2 ms for 61 layers of which 23.4 GB at 2.99 TB/s
# are 7.8 (bench/gpu_session.py).
_GPU_BANDWIDTH_SHARE = 0.85
_GPU_ARITHMETIC_SHARE = 0.5
_TOKEN_SECONDS = 1.57e-3
_SMALL_KERNELS_SECONDS = 70e-6
# Experts stream through the card once per chunk, so the longer the chunk the better; beyond this
# the activations no longer fit beside the weights.
GPU_CHUNK_TOKENS = 16_384
# A part that reads at less than this share of the roof does not wait for memory but for its own
# conversions and sums: as attention over the context does, which widens its latents to fp32.
_SHARE_BOUND_BY_MEMORY = 1 / 3
CPU_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Part:
    """One part of a token's way: what, how long, waiting for what."""

    name: str
    seconds: float
    resource: str


@dataclass(frozen=True)
class DecodeTime:
    """One token's time. overlapped_seconds: saved because parts run side by side."""

    parts: tuple[Part, ...]
    overlapped_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts) - self.overlapped_seconds

    @property
    def limit(self) -> str:
        """The resource that most of the time is spent on."""
        return _limit(self.parts)


@dataclass(frozen=True)
class PrefillTime:
    """A whole prompt's time, from an empty cache."""

    tokens: int
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def limit(self) -> str:
        return _limit(self.parts)


def _limit(parts: tuple[Part, ...]) -> str:
    seconds: dict[str, float] = {}
    for part in parts:
        seconds[part.resource] = seconds.get(part.resource, 0.0) + part.seconds
    return max(seconds, key=lambda resource: seconds[resource])


def cpu_decode(sizes: ModelSizes, machine: MachineProfile, context_tokens: int) -> DecodeTime:
    """Today's engine, one sequence with so many tokens in the cache."""
    experts = sizes.moe_layers * sizes.experts_per_token * sizes.expert_bytes
    moe = experts + sizes.shared_bytes + sizes.widened_router_bytes
    latents = context_tokens * sizes.latent_bytes("bf16")
    read = (
        ("experts: routed, shared, router", moe, machine.moe_bytes_per_second),
        ("attention's weights", sizes.attention_bytes, machine.attention_bytes_per_second),
        ("attention over the context", latents, machine.latent_bytes_per_second),
        ("dense layers", sizes.dense_mlp_bytes, machine.dense_bytes_per_second),
        ("lm_head", sizes.head_bytes, machine.head_bytes_per_second),
    )
    slow = machine.host_read_roof_bytes_per_second * _SHARE_BOUND_BY_MEMORY
    parts = tuple(
        Part(name, bytes_ / speed, HOST_BANDWIDTH if speed >= slow else HOST_ARITHMETIC)
        for name, bytes_, speed in read
    )
    overhead = sizes.layers * machine.layer_overhead_seconds
    return DecodeTime((*parts, Part("operators of all layers", overhead, OVERHEAD)))


def gpu_decode(
    sizes: ModelSizes,
    host_bytes_per_second: float,
    gpu: GpuProfile,
    *,
    context_tokens: int,
    kv_dtype: KvDtype,
    dense: DenseDtype,
    resident_share: float,
) -> DecodeTime:
    """A token with the dense part on a card, one sequence.

    host_bytes_per_second: of the experts' kernels. resident_share: of the routed experts, on the
    card.
    """
    bandwidth = _bandwidth(gpu)
    small = sizes.layers * _SMALL_KERNELS_SECONDS if gpu.measured else 0.0
    picked = sizes.moe_layers * sizes.experts_per_token * sizes.expert_bytes
    host = picked * (1 - resident_share) / host_bytes_per_second
    shared = sizes.shared_bytes * sizes.gpu_share(dense) / bandwidth
    resident = picked * resident_share / bandwidth
    weights = sizes.gpu_weight_bytes(dense) / bandwidth - shared
    latents = context_tokens * sizes.latent_bytes(kv_dtype) / bandwidth
    handoff = sizes.moe_layers * gpu.handoff_seconds + small + _TOKEN_SECONDS
    return DecodeTime(
        (
            Part("routed experts on the host", host, HOST_BANDWIDTH),
            Part("shared experts on the GPU", shared, GPU_BANDWIDTH),
            Part("routed experts on the GPU", resident, GPU_BANDWIDTH),
            Part("attention's and other weights", weights, GPU_BANDWIDTH),
            Part("attention over the context", latents, GPU_BANDWIDTH),
            Part("handoffs and launches", handoff, HANDOFF),
        ),
        overlapped_seconds=min(host, shared + resident),
    )


def cpu_prefill(sizes: ModelSizes, machine: MachineProfile, tokens: int) -> PrefillTime:
    """Today's engine: chunks of 512 tokens; attention is counted as products of full speed."""
    parts: list[Part] = []
    for begin in range(0, tokens, CPU_CHUNK_TOKENS):
        chunk = min(CPU_CHUNK_TOKENS, tokens - begin)
        parts.append(host_experts(sizes, machine, chunk, resident_share=0.0))
        # A bf16 weight is two bytes and two operations per token.
        reading = sizes.layer_bytes / machine.dense_bytes_per_second
        computing = chunk * sizes.layer_bytes / machine.dense_flops
        resource = HOST_BANDWIDTH if reading > computing else HOST_ARITHMETIC
        parts.append(Part("dense weights", max(reading, computing), resource))
        pairs = chunk * begin + chunk * (chunk + 1) / 2
        attention = pairs * sizes.pair_flops / machine.dense_flops
        parts.append(Part("attention over the context", attention, HOST_ARITHMETIC))
        overhead = sizes.layers * machine.layer_overhead_seconds
        parts.append(Part("operators of all layers", overhead, OVERHEAD))
    head = sizes.head_bytes / machine.head_bytes_per_second
    parts.append(Part("lm_head", head, HOST_BANDWIDTH))
    return PrefillTime(tokens, tuple(parts))


def gpu_prefill(
    sizes: ModelSizes,
    machine: MachineProfile,
    gpu: GpuProfile,
    tokens: int,
    *,
    resident_share: float,
) -> PrefillTime:
    """A prompt with the dense part on a card: each chunk's experts pass through the card or are
    computed on the host, whichever takes less, and the dense part beside them."""
    flops = gpu.flops * _GPU_ARITHMETIC_SHARE
    parts: list[Part] = []
    for begin in range(0, tokens, GPU_CHUNK_TOKENS):
        chunk = min(GPU_CHUNK_TOKENS, tokens - begin)
        pairs = chunk * begin + chunk * (chunk + 1) / 2
        dense = (chunk * sizes.layer_bytes + pairs * sizes.pair_flops) / flops
        routed_flops = chunk * sizes.moe_layers * sizes.experts_per_token * _expert_flops(sizes)
        hit = sizes.moe_layers * _experts_hit(sizes, chunk) * sizes.expert_bytes
        bus = hit * (1 - resident_share) / gpu.bus_bytes_per_second
        streamed = max(
            Part("experts through the bus", bus, BUS_BANDWIDTH),
            Part("GPU products", dense + routed_flops / flops, GPU_ARITHMETIC),
            key=lambda part: part.seconds,
        )
        on_host = max(
            host_experts(sizes, machine, chunk, resident_share),
            Part("GPU products", dense + resident_share * routed_flops / flops, GPU_ARITHMETIC),
            key=lambda part: part.seconds,
        )
        parts.append(min(streamed, on_host, key=lambda part: part.seconds))
    weights = sizes.gpu_weight_bytes("bf16") / _bandwidth(gpu)
    parts.append(Part("the first token", weights, GPU_BANDWIDTH))
    return PrefillTime(tokens, tuple(parts))


def host_experts(
    sizes: ModelSizes, machine: MachineProfile, tokens: int, resident_share: float
) -> Part:
    """The host's share of all layers' routed experts for a chunk.

    An expert with m tokens costs max(bytes / bandwidth, m times its operations / arithmetic).
    """
    hit = _experts_hit(sizes, tokens)
    each = tokens * sizes.experts_per_token / hit if hit else 0.0
    reading = sizes.expert_bytes / machine.host_read_bytes_per_second
    computing = each * _expert_flops(sizes) / machine.host_flops
    seconds = sizes.moe_layers * hit * (1 - resident_share) * max(reading, computing)
    resource = HOST_BANDWIDTH if reading > computing else HOST_ARITHMETIC
    return Part("routed experts on the host", seconds, resource)


def _bandwidth(gpu: GpuProfile) -> float:
    """What the kernels of decoding read, bytes a second."""
    return gpu.bytes_per_second * (1.0 if gpu.measured else _GPU_BANDWIDTH_SHARE)


def _experts_hit(sizes: ModelSizes, tokens: int) -> float:
    """Expected number of different experts that so many tokens pick in one layer."""
    share = sizes.experts_per_token / sizes.experts_per_layer
    return sizes.experts_per_layer * (1 - (1 - share) ** tokens)


def _expert_flops(sizes: ModelSizes) -> float:
    return 2.0 * sizes.expert_parameters
