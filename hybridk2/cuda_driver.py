"""Calls of NVIDIA's driver that torch does not have: kernels from PTX, launched with attributes.

Owns the driver's structs and numbers, as cuda.h has them since CUDA 12.0; knows no kernel. The card
is the one of the thread's context, which is torch's once torch has put a tensor there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from hybridk2.errors import DriverError

_LIBRARY = "libcuda.so.1"

# CUfunction_attribute, CUjit_option, CUlaunchAttributeID.
MAX_DYNAMIC_SHARED_BYTES = 8
JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES = 5, 6
COOPERATIVE, CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 2, 4, 6
# Of a tensor map: CUtensorMapDataType, ...Interleave, ...Swizzle, ...L2promotion, ...FloatOOBfill.
BFLOAT16, INTERLEAVE_NONE, SWIZZLE_128B, L2_PROMOTION_256B, FILL_NONE = 9, 0, 3, 3, 0

_LOG_BYTES = 4096
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, c_void_p),
    "cuModuleLoadDataEx": (c_void_p, c_char_p, c_uint32, c_void_p, c_void_p),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuTensorMapEncodeTiled": (
        *(c_void_p, c_int, c_uint32, c_void_p),
        *(c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_int, c_int, c_int, c_int),
    ),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
}


class LaunchValue(ctypes.Union):
    """CUlaunchAttributeValue."""

    _fields_ = (
        ("cooperative", c_int),
        ("cluster", c_uint32 * 3),
        ("programmatic", c_int),
        ("whole", c_uint64 * 8),
    )


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("value", LaunchValue))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("shared_bytes", c_uint32),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", c_uint32),
    )


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    grid: programs, x and y. cluster: neighbours along x that share their shared memory; it divides
    grid's x. threads: of a program. shared_bytes: that it takes beside what its kernel declares.
    stream: the driver's handle.
    """

    grid: tuple[int, int]
    cluster: int
    threads: int
    shared_bytes: int
    stream: int


class TensorMap:
    """CUtensorMap: what the copy engine knows of a tensor; an argument of kernels."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        self.address = -(-ctypes.addressof(self._memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT


class CudaDriver:
    """The driver, with what it refuses as errors. Nothing is waited for."""

    def __init__(self, library: Any) -> None:
        """library: with _SIGNATURES' functions. Raises DriverError for one that is missing."""
        self._functions: dict[str, Any] = {}
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise DriverError(
                    f"the NVIDIA driver's {_LIBRARY} has no {name}; install a driver for CUDA 12 "
                    "or newer"
                ) from error
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function

    @classmethod
    def load(cls) -> CudaDriver:
        """This machine's. Raises DriverError when there is none, or an old one."""
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise DriverError(f"no NVIDIA driver: {error}; install it") from error
        return cls(library)

    def kernel(self, ptx: str, name: str, shared_bytes: int) -> int:
        """The handle of a module's kernel, compiled for the card; it may be launched with so many
        bytes of shared memory. Stays loaded. Raises DriverError with the compiler's words."""
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (c_int * 2)(JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES)
        values = (c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        module, kernel = c_void_p(), c_void_p()
        arguments = ctypes.byref(module), ptx.encode(), len(options), options, values
        self._call("cuModuleLoadDataEx", *arguments, log=log)
        self._call("cuModuleGetFunction", ctypes.byref(kernel), module, name.encode())
        self._call("cuFuncSetAttribute", kernel, MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
        assert kernel.value is not None
        return kernel.value

    def tensor_map(
        self, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> TensorMap:
        """Of bf16 numbers from `address` of the card's memory on.

        sizes: of all dimensions, the innermost first. strides: bytes, of all but the innermost, of
        which numbers lie side by side. box: numbers of each dimension that one copy brings; of the
        innermost 128 bytes, whose chunks of 16 are exchanged as the tensor cores want it.
        """
        rank = len(sizes)
        assert len(strides) == rank - 1, f"{strides=} of {rank} dimensions"
        assert len(box) == rank, f"{box=} of {rank} dimensions"
        made = TensorMap()
        self._call(
            "cuTensorMapEncodeTiled",
            made.address,
            BFLOAT16,
            rank,
            address,
            (c_uint64 * rank)(*sizes),
            (c_uint64 * (rank - 1))(*strides),
            (c_uint32 * rank)(*box),
            (c_uint32 * rank)(*([1] * rank)),
            INTERLEAVE_NONE,
            SWIZZLE_128B,
            L2_PROMOTION_256B,
            FILL_NONE,
        )
        return made

    def launch(
        self, kernel: int, launch: Launch, arguments: Sequence[TensorMap | ctypes.Structure]
    ) -> None:
        """Enqueue a kernel all of whose programs are on the card at the same time, and which may
        begin before the one in front of it has ended: it waits for that itself (griddepcontrol).

        arguments: their values are taken now.
        """
        chosen = [
            LaunchAttribute(COOPERATIVE, LaunchValue(cooperative=1)),
            LaunchAttribute(PROGRAMMATIC_SERIALIZATION, LaunchValue(programmatic=1)),
        ]
        if launch.cluster > 1:
            cluster = LaunchValue(cluster=(launch.cluster, 1, 1))
            chosen.append(LaunchAttribute(CLUSTER_DIMENSION, cluster))
        attributes = (LaunchAttribute * len(chosen))(*chosen)
        config = LaunchConfig(
            (*launch.grid, 1),
            (launch.threads, 1, 1),
            launch.shared_bytes,
            launch.stream,
            attributes,
            len(chosen),
        )
        addresses = [
            given.address if isinstance(given, TensorMap) else ctypes.addressof(given)
            for given in arguments
        ]
        values = (c_void_p * len(addresses))(*addresses)
        self._call("cuLaunchKernelEx", ctypes.byref(config), kernel, values, None)

    def _call(self, name: str, *arguments: Any, log: Any = None) -> None:
        result = self._functions[name](*arguments)
        if result == 0:
            return
        said = c_char_p()
        unnamed = self._functions["cuGetErrorName"](result, ctypes.byref(said)) != 0
        error = "an unknown error" if unnamed or said.value is None else said.value.decode()
        words = log.value.decode(errors="replace").strip() if log is not None else ""
        raise DriverError(
            f"{name}: the NVIDIA driver said {error} ({result})" + (f": {words}" if words else "")
        )
