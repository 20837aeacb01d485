"""Bytes and time of a model on a machine, before anything is loaded.

Without a graphics card the plan is that of today's engine; with one it is that of an engine that
does not exist yet, from data sheets and stated assumptions.
"""

from hybridk2.planner.plan import Choices, Place, Plan, free_gpu_bytes, plan
from hybridk2.planner.sizes import BUILT_IN, ModelSizes
from hybridk2.planner.timing import DecodeTime, PrefillTime

__all__ = [
    "BUILT_IN",
    "Choices",
    "DecodeTime",
    "ModelSizes",
    "Place",
    "Plan",
    "PrefillTime",
    "free_gpu_bytes",
    "plan",
]
