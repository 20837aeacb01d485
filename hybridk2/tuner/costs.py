"""What a decoded token costs on a card and its host: the planner's figures, cut into experts.

Knows sizes and speeds, no routing. Everything that the planner assumes of a GPU holds here too, so
that both commands predict the same for the same share of hits.
"""

from __future__ import annotations

from hybridk2.hardware import GpuProfile
from hybridk2.planner import Choices, ModelSizes
from hybridk2.planner.timing import DecodeTime, gpu_decode
from hybridk2.tuner.replay import StepCost


def step_cost(
    sizes: ModelSizes, host_bytes_per_second: float, gpu: GpuProfile, choices: Choices
) -> StepCost:
    """The cost of a token of this model there, in a conversation of the choices' length.

    host_bytes_per_second: with which the host's kernels read experts.
    """

    def decode(resident_share: float) -> DecodeTime:
        return gpu_decode(
            sizes,
            host_bytes_per_second,
            gpu,
            context_tokens=min(choices.decode_context_tokens, choices.context_tokens),
            kv_dtype=choices.kv_dtype,
            dense=choices.dense,
            resident_share=resident_share,
        )

    picks = sizes.moe_layers * sizes.experts_per_token
    host, shared, _, *others = decode(0.0).parts
    resident = decode(1.0).parts[2]
    return StepCost(
        top_k=sizes.experts_per_token,
        fixed=sum(part.seconds for part in others),
        host=host.seconds / picks,
        gpu=resident.seconds / picks,
        shared=shared.seconds / sizes.moe_layers,
        upload=sizes.expert_bytes / gpu.bus_bytes_per_second,
    )
