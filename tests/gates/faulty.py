"""`hybridk2` with faults built in: `python -m tests.gates.faulty serve ...`.

A request whose prompt begins with one of these token ids meets its fault once it is decoded, or
when its next chunk is read: in the middle of a batch with others.
"""

from __future__ import annotations

import torch

from hybridk2.cli import main
from hybridk2.engine import Engine
from hybridk2.kv_cache import CacheSequence

ERROR = [71, 3, 71, 3]  # an exception in the work of this request
NO_MEMORY = [72, 3, 72, 3]  # an allocation that Python refuses
NO_TENSOR_MEMORY = [73, 3, 73, 3]  # one that torch's allocator refuses
CRASH = [74, 3, 74, 3]  # an exception in the engine itself, outside any request's work

_write = CacheSequence.write
_step = Engine.step


def _faulty_write(sequence: CacheSequence, layer: int, latents: torch.Tensor) -> None:
    match sequence.token_ids[:4]:
        case [71, 3, 71, 3]:
            raise ZeroDivisionError("injected")
        case [72, 3, 72, 3]:
            bytearray(1 << 62)
        case [73, 3, 73, 3]:
            torch.empty(1 << 60, dtype=torch.uint8)
    _write(sequence, layer, latents)


def _faulty_step(engine: Engine) -> bool:
    running = engine._scheduler.running
    if any(list(generation.prompt_ids[:4]) == CRASH for generation in running):
        raise RuntimeError("injected")
    return _step(engine)


if __name__ == "__main__":
    CacheSequence.write = _faulty_write  # type: ignore[method-assign]
    Engine.step = _faulty_step  # type: ignore[method-assign]
    main()
