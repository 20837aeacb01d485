"""NVIDIA's driver without a card: C functions that keep what they were called with.

What is behind a pointer is read as bytes, at the places where cuda.h has the fields, so that a
struct that is packed wrongly is seen to be. tests/test_cuda_driver.py holds these places to the
header itself.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import c_int, c_uint, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import Any

MODULE, KERNEL = 0x1111, 0x2222
MAP_VALUE = b"a tensor map" + bytes(116)
INVALID_PTX, TOO_LARGE = 218, 720
_NAMES = {
    INVALID_PTX: ctypes.create_string_buffer(b"CUDA_ERROR_INVALID_PTX"),
    TOO_LARGE: ctypes.create_string_buffer(b"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"),
}


@dataclass(frozen=True)
class TiledMap:
    """What cuTensorMapEncodeTiled was told."""

    alignment: int  # of the map's address, up to 128
    dtype: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    modes: tuple[int, int, int, int]  # interleave, swizzle, promotion, fill


@dataclass(frozen=True)
class LaunchedKernel:
    """What cuLaunchKernelEx was told. attributes: 64 bytes by id. arguments: their bytes, as many
    as the kernel takes."""

    kernel: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    attributes: dict[int, bytes]
    arguments: list[bytes]


@dataclass
class FakedDriver:
    """argument_bytes: of each of the kernel's arguments. refusals: of a function, its result."""

    argument_bytes: tuple[int, ...] = ()
    refusals: dict[str, int] = field(default_factory=dict)
    jit_log: bytes = b""
    images: list[bytes] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    function_attributes: list[tuple[int, int, int]] = field(default_factory=list)
    maps: list[TiledMap] = field(default_factory=list)
    launches: list[LaunchedKernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        def prototype(*arguments: Any) -> Any:
            return ctypes.CFUNCTYPE(c_int, *arguments)

        pointer = c_void_p
        map_types = (pointer, c_int, c_uint, pointer, *[pointer] * 4, *[c_int] * 4)
        self.cuGetErrorName = prototype(c_int, pointer)(self._get_error_name)
        self.cuModuleLoadDataEx = prototype(pointer, pointer, c_uint, pointer, pointer)(self._load)
        self.cuModuleGetFunction = prototype(pointer, pointer, pointer)(self._get_function)
        self.cuFuncSetAttribute = prototype(pointer, c_int, c_int)(self._set_attribute)
        self.cuTensorMapEncodeTiled = prototype(*map_types)(self._encode)
        self.cuLaunchKernelEx = prototype(pointer, pointer, pointer, pointer)(self._launch)

    def _get_error_name(self, result: int, name: int) -> int:
        if result not in _NAMES:
            return 1
        c_void_p.from_address(name).value = ctypes.addressof(_NAMES[result])
        return 0

    def _load(self, module: int, image: int, count: int, options: int, values: int) -> int:
        self.images.append(ctypes.string_at(image))
        given = dict(zip((c_int * count).from_address(options), _words(values, count), strict=True))
        log, log_bytes = given[5], given[6]
        said = self.jit_log[: log_bytes - 1] + b"\0"
        ctypes.memmove(log, said, len(said))
        c_void_p.from_address(module).value = MODULE
        return self.refusals.get("cuModuleLoadDataEx", 0)

    def _get_function(self, function: int, module: int, name: int) -> int:
        self.names.append(ctypes.string_at(name))
        c_void_p.from_address(function).value = KERNEL
        return 0 if module == MODULE else 400

    def _set_attribute(self, function: int, attribute: int, value: int) -> int:
        self.function_attributes.append((function, attribute, value))
        return self.refusals.get("cuFuncSetAttribute", 0)

    def _encode(self, at: int, dtype: int, rank: int, address: int, *rest: int) -> int:
        sizes, strides, box, steps, *modes = rest
        self.maps.append(
            TiledMap(
                at & -at if at % 128 else 128,
                dtype,
                address,
                tuple((c_uint64 * rank).from_address(sizes)),
                tuple((c_uint64 * (rank - 1)).from_address(strides)),
                tuple((c_uint32 * rank).from_address(box)),
                tuple((c_uint32 * rank).from_address(steps)),
                (modes[0], modes[1], modes[2], modes[3]),
            )
        )
        ctypes.memmove(at, MAP_VALUE, len(MAP_VALUE))
        return self.refusals.get("cuTensorMapEncodeTiled", 0)

    def _launch(self, config: int, kernel: int, values: int, extra: int | None) -> int:
        sizes = struct.unpack("7I4xQQI", ctypes.string_at(config, 52))
        *dimensions, shared_bytes, stream, attributes, count = sizes
        each = [ctypes.string_at(attributes + 72 * number, 72) for number in range(count)]
        addresses = _words(values, len(self.argument_bytes))
        self.launches.append(
            LaunchedKernel(
                kernel,
                tuple(dimensions[:3]),
                tuple(dimensions[3:]),
                shared_bytes,
                stream,
                {int.from_bytes(one[:4], "little"): one[8:] for one in each},
                [
                    ctypes.string_at(address, size)
                    for address, size in zip(addresses, self.argument_bytes, strict=True)
                ],
            )
        )
        return self.refusals.get("cuLaunchKernelEx", 0 if extra is None else 1)


def _words(address: int, count: int) -> list[int]:
    return list((c_uint64 * count).from_address(address))
