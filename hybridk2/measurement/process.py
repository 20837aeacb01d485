"""What a process that runs the engine takes of memory beside its weights.

Owns a process of its own that answers a question with the embedded model: the interpreter, torch,
our extension, their threads, and what the first tokens compile and allocate are there, and next to
no weights. What grows with a model's dimensions is small: a process with K2's true ones took 30 MB
more, one with a seventh of them 4 MB (2 Zen 5 cores).
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import psutil

from hybridk2.checkpoint import locate_model
from hybridk2.config import EngineConfig
from hybridk2.engine import Engine
from hybridk2.planner import ModelSizes
from hybridk2.sampling import SamplingParams

_PROMPT_TOKENS = 64
_ANSWER_TOKENS = 4


def process_bytes() -> int:
    """Resident bytes, libraries included, without weights. Takes two seconds.

    Raises what loading the embedded model raises.
    """
    sizes = ModelSizes.from_checkpoint(locate_model(EngineConfig.model))
    return resident_bytes(EngineConfig.model) - sizes.host_weight_bytes


def resident_bytes(model: str) -> int:
    """Of a process in which this model has read a short prompt and decoded a few tokens."""
    # A new interpreter: this one may hold anything by now.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as process:
        return process.submit(_answer, model).result()


def _answer(model: str) -> int:
    engine = Engine.load(EngineConfig(model))
    try:
        params = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS)
        for _ in engine.generate([0] * _PROMPT_TOKENS, params, stop_ids=()):
            pass
        return psutil.Process().memory_info().rss
    finally:
        engine.close()
