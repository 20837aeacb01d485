"""llama.cpp's routed experts: its library ggml, its graph, on Q4_0 weights in its repacked buffer.

Q4_0 is the same format (groups of 32, value - 8) with a float16 scale: converting is exact as long
as a scale lies in float16's range, and the worker says when one does not. ggml quantises the
activations to 8 bits in groups of 32.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.protocol import (
    GROUP,
    MATRICES,
    Call,
    Engine,
    Features,
    Purpose,
    WeightFiles,
    serve,
    timed,
    widen_bfloat16,
)

TYPE_F32, TYPE_Q4_0, TYPE_I32 = 0, 2, 26  # enum ggml_type
BLOCK_BYTES = 2 + GROUP // 2  # block_q4_0: scale, nibbles


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class ThreadpoolParams(ctypes.Structure):
    """struct ggml_threadpool_params."""

    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class Ggml:
    """The functions that are needed of libggml-base and libggml-cpu, with their signatures."""

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        pointer, extent = c_void_p, c_int64
        for library, name, result, arguments in (
            (self.base, "ggml_version", c_char_p, ()),
            (self.base, "ggml_init", pointer, (InitParams,)),
            (self.base, "ggml_free", None, (pointer,)),
            (self.base, "ggml_new_tensor_2d", pointer, (pointer, c_int, extent, extent)),
            (self.base, "ggml_new_tensor_3d", pointer, (pointer, c_int, extent, extent, extent)),
            (self.base, "ggml_mul_mat_id", pointer, (pointer,) * 4),
            (self.base, "ggml_swiglu_split", pointer, (pointer,) * 3),
            (self.base, "ggml_mul", pointer, (pointer,) * 3),
            (self.base, "ggml_add", pointer, (pointer,) * 3),
            (
                self.base,
                "ggml_view_2d",
                pointer,
                (pointer, pointer, extent, extent, c_size_t, c_size_t),
            ),
            (self.base, "ggml_new_graph", pointer, (pointer,)),
            (self.base, "ggml_build_forward_expand", None, (pointer, pointer)),
            (self.base, "ggml_backend_alloc_ctx_tensors", pointer, (pointer, pointer)),
            (self.base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, (pointer, pointer)),
            (self.base, "ggml_backend_buffer_free", None, (pointer,)),
            (self.base, "ggml_backend_buft_name", c_char_p, (pointer,)),
            (self.base, "ggml_backend_graph_compute", c_int, (pointer, pointer)),
            (self.base, "ggml_backend_reg_dev_get", pointer, (pointer, c_size_t)),
            (self.base, "ggml_backend_reg_get_proc_address", pointer, (pointer, c_char_p)),
            (
                self.base,
                "ggml_backend_tensor_set",
                None,
                (pointer, pointer, c_size_t, c_size_t),
            ),
            (
                self.base,
                "ggml_backend_tensor_get",
                None,
                (pointer, pointer, c_size_t, c_size_t),
            ),
            (self.base, "ggml_threadpool_params_init", None, (pointer, c_int)),
            (self.cpu, "ggml_threadpool_new", pointer, (POINTER(ThreadpoolParams),)),
            (self.cpu, "ggml_backend_cpu_init", pointer, ()),
            (self.cpu, "ggml_backend_cpu_reg", pointer, ()),
            (self.cpu, "ggml_backend_cpu_set_n_threads", None, (pointer, c_int)),
            (self.cpu, "ggml_backend_cpu_set_threadpool", None, (pointer, pointer)),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"ggml_{name} is not declared here")

    def repack_buffer_type(self) -> int | None:
        """Where Q4_0 weights are rearranged for this processor; None if it has no such kernels."""
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        extra_types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(
            self.backend_reg_dev_get(registry, 0)
        )
        for kind in extra_types:
            if kind is None:
                return None
            if self.backend_buft_name(kind) == b"CPU_REPACK":
                return kind
        return None


class Graph:
    """The experts of one layer for one number of tokens, as llama.cpp's build_moe_ffn has them."""

    def __init__(
        self, ggml: Ggml, backend: int, weights: dict[str, int], files: WeightFiles, tokens: int
    ) -> None:
        self._ggml, self._backend = ggml, backend
        shape = files.shape
        self._out_shape = (tokens, shape.hidden)
        self._context = context = ggml.init(InitParams(16 << 20, None, True))
        self._x = ggml.new_tensor_3d(context, TYPE_F32, shape.hidden, 1, tokens)
        self._ids = ggml.new_tensor_2d(context, TYPE_I32, shape.top_k, tokens)
        self._weights = ggml.new_tensor_3d(context, TYPE_F32, 1, shape.top_k, tokens)
        gate = ggml.mul_mat_id(context, weights["gate"], self._x, self._ids)
        up = ggml.mul_mat_id(context, weights["up"], self._x, self._ids)
        both = ggml.swiglu_split(context, gate, up)
        down = ggml.mul_mat_id(context, weights["down"], both, self._ids)
        experts = ggml.mul(context, down, self._weights)
        self._graph = ggml.new_graph(context)
        row = shape.hidden * 4
        slices = [
            ggml.view_2d(context, experts, shape.hidden, tokens, row * shape.top_k, row * slot)
            for slot in range(shape.top_k)
        ]
        self._out = slices[0]
        for one in slices[1:]:
            self._out = ggml.add(context, self._out, one)
        ggml.build_forward_expand(self._graph, self._out)
        self._buffer = ggml.backend_alloc_ctx_tensors(context, backend)
        if not self._buffer:
            raise MemoryError(f"ggml has no memory for {tokens} tokens")

    def run(self, call: Call) -> tuple[float, NDArray[np.float32]]:
        for tensor, array in (
            (self._x, widen_bfloat16(call.x)),
            (self._ids, call.expert_ids),
            (self._weights, call.weights),
        ):
            self._ggml.backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
        status = 0

        def compute() -> None:
            nonlocal status
            status = self._ggml.backend_graph_compute(self._backend, self._graph)

        seconds = timed(compute)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        out = np.empty(self._out_shape, dtype=np.float32)
        self._ggml.backend_tensor_get(self._out, out.ctypes.data, 0, out.nbytes)
        return seconds, out

    def free(self) -> None:
        self._ggml.backend_buffer_free(self._buffer)
        self._ggml.free(self._context)


class LlamaCpp(Engine):
    """Keeps one graph: that of the last number of tokens."""

    def load(self, files: WeightFiles, threads: int, max_tokens: int, purpose: Purpose) -> Features:
        self._files = files
        self._ggml = Ggml(Path(sys.prefix) / "ggml" / "lib")
        self._backend = self._ggml.backend_cpu_init()
        self._ggml.backend_cpu_set_n_threads(self._backend, threads)
        parameters = ThreadpoolParams()
        self._ggml.threadpool_params_init(byref(parameters), threads)
        pool = self._ggml.threadpool_new(byref(parameters))
        self._ggml.backend_cpu_set_threadpool(self._backend, pool)
        self._graph: tuple[int, Graph] | None = None
        repacked = self._ggml.repack_buffer_type()
        inexact = self._load_weights(files, repacked)
        remarks = [f"{inexact} scales are not exact in float16"] if inexact else []
        version = (
            f"llama-cpp-python {(Path(sys.prefix) / 'ggml' / 'VERSION').read_text().strip()}, "
            f"ggml {self._ggml.version().decode()}"
        )
        return Features(version, ["q4_0 repacked" if repacked else "q4_0"], remarks)

    def run(self, path: str, call: Call) -> tuple[float, NDArray[np.float32]]:
        tokens = len(call.x)
        if self._graph is None or self._graph[0] != tokens:
            if self._graph is not None:
                self._graph[1].free()
            self._graph = (
                tokens,
                Graph(self._ggml, self._backend, self._weights, self._files, tokens),
            )
        return self._graph[1].run(call)

    def _load_weights(self, files: WeightFiles, buffer_type: int | None) -> int:
        """Number of scales that float16 does not hold exactly."""
        ggml = self._ggml
        context = ggml.init(InitParams(1 << 20, None, True))
        self._weights = {}
        for name in MATRICES:
            rows, columns = files.shape.rows_columns(name)
            self._weights[name] = ggml.new_tensor_3d(
                context, TYPE_Q4_0, columns, rows, files.shape.experts
            )
        if buffer_type is None:
            buffer = ggml.backend_alloc_ctx_tensors(context, self._backend)
        else:
            buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise MemoryError("ggml has no memory for the weights")
        inexact = 0
        for name, tensor in self._weights.items():
            blocks, wrong = q4_0(files.packed(name), files.scale(name))
            inexact += wrong
            ggml.backend_tensor_set(tensor, blocks.ctypes.data, 0, blocks.nbytes)
        return inexact


def q4_0(packed: NDArray[np.int32], scale: NDArray[np.uint16]) -> tuple[NDArray[np.uint8], int]:
    """Q4_0 blocks of a matrix, (experts, rows, groups, 18) bytes, and how many scales are rounded.

    A block holds its scale, then byte j has weight j in its low half and weight j + 16 in its high
    one; here byte j of a group has weights 2 j and 2 j + 1.
    """
    experts, rows, groups = scale.shape
    blocks = np.empty((experts, rows, groups, BLOCK_BYTES), dtype=np.uint8)
    inexact = 0
    for expert in range(experts):
        exact = widen_bfloat16(scale[expert])
        half = exact.astype(np.float16)
        inexact += int((half.astype(np.float32) != exact).sum())
        block = blocks[expert]
        block[..., :2] = half[..., None].view(np.uint8)
        pairs = packed[expert].view(np.uint8).reshape(rows, groups, GROUP // 2)
        first, second = pairs[..., : GROUP // 4], pairs[..., GROUP // 4 :]
        block[..., 2::2] = (first & 15) | (second << 4)
        block[..., 3::2] = (first >> 4) | (second & 0xF0)
    return blocks, inexact


if __name__ == "__main__":
    serve(LlamaCpp)
