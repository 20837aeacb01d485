"""Where Triton kernels run in tests.

Without a GPU they run in Triton's interpreter, on CPU tensors. On one, `TRITON_INTERPRET=0 pytest
tests/test_triton_*.py` runs the same tests on it. conftest.py sets the variable before anything
imports Triton: what it compiles and what it interprets is decided then, once for a process.

The interpreter keeps bf16 numbers as uint16 and does not support arithmetic on them: it multiplies
their bits in tl.dot, takes integers for bits, and cuts fp32 off instead of rounding it. In Triton
3.6 and older it also converts scalars in a way that NumPy 2.4 refuses. `mend_interpreter` puts this
right, test_triton_interpreter.py holds it to that; 3.4, 3.6, 3.7 and 3.9 pass.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def mend_interpreter() -> None:
    """Make the interpreter's conversions to and from bf16, its products of bf16 and its scalars
    right."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "bf16_is_mended", False):
        return
    cast, dot, convert = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
        InterpreterBuilder.create_fp_to_fp,
    )
    patch_tensor = interpreter._patch_lang_tensor

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return tensor.view(torch.int16).numpy().view(np.uint16)

    # A handle is true when all its values are: `is None` is the question everywhere.
    def between(source: Any, target: Any) -> Any:
        """A handle converted from bf16 to fp32 or from fp32 or integers to bf16, else None."""
        kinds = source.dtype.scalar, target.scalar
        if kinds == (bfloat16, float32):
            return TensorHandle(widened(source.data), float32)
        if kinds == (float32, bfloat16):
            return TensorHandle(rounded(source.data), bfloat16)
        if target.scalar == bfloat16 and source.dtype.scalar.is_int():
            return TensorHandle(rounded(source.data.astype(np.float32)), bfloat16)
        return None

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        converted = between(source, target)
        return cast(self, source, target) if converted is None else converted

    def mended_convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        converted = between(source, target)
        return convert(self, source, target, rounding) if converted is None else converted

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (between(side, float32) for side in (a, b))
        sides = (old if new is None else new for old, new in zip((a, b), wide, strict=True))
        return dot(self, *sides, *rest)

    def mended_patch(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = mended_patch
    InterpreterBuilder.cast_impl = mended_cast
    InterpreterBuilder.create_fp_to_fp = mended_convert
    InterpreterBuilder.create_dot = mended_dot
    InterpreterBuilder.bf16_is_mended = True


if INTERPRETED:
    mend_interpreter()
