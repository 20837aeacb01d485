"""What Triton kernels compile to for cards that are not here.

Launches are caught where Triton would compile and start them, so what is compiled is what the
project launches: its argument types, its constants, its options. That takes a process in which
Triton compiles instead of interpreting: `compiled` starts one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# sm_80: A100. 89: RTX 40. 90: H100, H200. 120: RTX 50, PRO 6000.
CARDS = (80, 89, 90, 120)
# What one program may have of shared memory on sm_89 and sm_120, the smallest of them.
MOST_SHARED_BYTES = 99 * 1024
# A thread's local memory: two words may lie there whatever a kernel does, spilled tiles are more.
MOST_STACK_BYTES = 16

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one card. stack_bytes: of a thread's local memory, spilled registers."""

    kernel: str
    card: int
    shared_bytes: int
    registers: int
    stack_bytes: int


def compiled(module: str, function: str, cards: tuple[int, ...] = CARDS) -> list[Compiled]:
    """The kernels that `function` of `module` launches on CPU tensors, compiled for each card."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", __name__, module, function, *map(str, cards)]
        root = Path(__file__).resolve().parents[1]
        result = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=False
        )
    assert result.returncode == 0, result.stderr[-4000:]
    return [Compiled(**found) for found in json.loads(result.stdout.splitlines()[-1])]


def main(module: str, function: str, *cards: str) -> None:
    launches = _caught(getattr(importlib.import_module(module), function))
    found = [_compile(*launch, int(card)) for launch in launches for card in cards]
    print(json.dumps([asdict(kernel) for kernel in found]))


def _caught(call: Callable[[], None]) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(kernel, its arguments by name, options) of every launch in `call`, none of which runs."""
    from triton.runtime.jit import JITFunction

    launches = []

    def catch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.append((kernel, named, options))

    JITFunction.run = catch
    call()
    return launches


def _compile(
    kernel: Any, arguments: dict[str, Any], options: dict[str, Any], card: int
) -> Compiled:
    """As Triton would: pointers and integers that 16 divides are known to be so divided."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    registers, stack = _resources(result.asm["cubin"])
    return Compiled(kernel.__name__, card, result.metadata.shared, registers, stack)


def _resources(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main(*sys.argv[1:])
