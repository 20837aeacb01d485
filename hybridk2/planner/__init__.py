"""Bytes and time of a model on a machine, before anything is loaded.

Places and bytes are those that the engine takes. Times without a graphics card rest on what was
measured; with one on data sheets and stated assumptions.
"""

from hybridk2.planner.card import CardLayout, lay_out_card
from hybridk2.planner.plan import (
    GPU_RESERVED_CHUNK_TOKENS,
    Choices,
    Place,
    Plan,
    free_gpu_bytes,
    plan,
)
from hybridk2.planner.sizes import BUILT_IN, ModelSizes
from hybridk2.planner.timing import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS, DecodeTime, PrefillTime

__all__ = [
    "BUILT_IN",
    "CPU_CHUNK_TOKENS",
    "GPU_CHUNK_TOKENS",
    "GPU_RESERVED_CHUNK_TOKENS",
    "CardLayout",
    "Choices",
    "DecodeTime",
    "ModelSizes",
    "Place",
    "Plan",
    "PrefillTime",
    "free_gpu_bytes",
    "lay_out_card",
    "plan",
]
