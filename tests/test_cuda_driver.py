"""The driver's calls: what reaches C, and what becomes of a refusal."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from hybridk2 import cuda_driver
from hybridk2.cuda_driver import CudaDriver, Launch, LaunchAttribute, LaunchConfig, LaunchValue
from hybridk2.errors import DriverError, EngineError

from .faked_driver import INVALID_PTX, KERNEL, MAP_VALUE, TOO_LARGE, FakedDriver

LAUNCH = Launch(grid=(132, 3), cluster=1, threads=384, shared_bytes=200_000, stream=2**40 + 5)


class Numbers(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint64), ("second", ctypes.c_float))


def test_a_kernel_is_loaded_by_its_name_and_may_use_the_memory_it_asked_for() -> None:
    faked = FakedDriver()
    assert CudaDriver(faked).kernel("the text", "its_name", 123_456) == KERNEL
    assert (faked.images, faked.names) == ([b"the text"], [b"its_name"])
    assert faked.function_attributes == [(KERNEL, 8, 123_456)]


def test_a_launch_reaches_the_driver_as_it_was_given() -> None:
    faked = FakedDriver(argument_bytes=(128, 16))
    driver = CudaDriver(faked)
    made = driver.tensor_map(2**41, (64, 32), (2**36,), (64, 8))
    driver.launch(KERNEL, LAUNCH, [made, Numbers(2**50 + 1, 0.5)])
    (found,) = faked.launches
    assert (found.kernel, found.grid, found.block) == (KERNEL, (132, 3, 1), (384, 1, 1))
    assert (found.shared_bytes, found.stream) == (200_000, 2**40 + 5)
    one = struct.pack("i", 1) + bytes(60)
    assert found.attributes == {2: one, 6: one}
    assert found.arguments[0] == MAP_VALUE
    assert struct.unpack("Qf", found.arguments[1][:12]) == (2**50 + 1, 0.5)


def test_neighbours_that_share_memory_are_asked_for_where_there_are_any() -> None:
    faked = FakedDriver()
    pairs = Launch(**{**vars(LAUNCH), "cluster": 2})
    CudaDriver(faked).launch(KERNEL, pairs, [])
    (found,) = faked.launches
    assert found.attributes[4] == struct.pack("3I", 2, 1, 1) + bytes(52)
    assert set(found.attributes) == {2, 4, 6}


def test_a_tensor_map_is_made_of_what_was_given() -> None:
    faked = FakedDriver()
    CudaDriver(faked).tensor_map(2**41, (64, 32, 7), (2**36, 128), (64, 8, 1))
    (found,) = faked.maps
    assert found.alignment >= 64
    assert (found.dtype, found.address, found.sizes) == (9, 2**41, (64, 32, 7))
    assert (found.strides, found.box, found.steps) == ((2**36, 128), (64, 8, 1), (1, 1, 1))
    assert found.modes == (0, 3, 3, 0)


def test_a_refused_module_says_what_the_drivers_compiler_said() -> None:
    faked = FakedDriver(refusals={"cuModuleLoadDataEx": INVALID_PTX}, jit_log=b"line 7: what?\n")
    expected = r"^cuModuleLoadDataEx: .*CUDA_ERROR_INVALID_PTX \(218\): line 7: what\?$"
    with pytest.raises(DriverError, match=expected):
        CudaDriver(faked).kernel("text", "name", 0)


def test_a_refused_launch_is_an_error_of_the_step_that_a_recording_knows() -> None:
    faked = FakedDriver(refusals={"cuLaunchKernelEx": TOO_LARGE})
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernelEx: .*_LAUNCH_TOO_LARGE \(720\)$") as e:
        CudaDriver(faked).launch(KERNEL, LAUNCH, [])
    assert isinstance(e.value, EngineError)


def test_an_error_that_the_driver_has_no_name_for_is_told_by_its_number() -> None:
    faked = FakedDriver(refusals={"cuFuncSetAttribute": 12345})
    with pytest.raises(DriverError, match=r"^cuFuncSetAttribute: .*an unknown error \(12345\)$"):
        CudaDriver(faked).kernel("text", "name", 0)


def test_an_old_driver_is_refused_by_the_call_that_it_lacks() -> None:
    faked = FakedDriver()
    del faked.cuTensorMapEncodeTiled
    with pytest.raises(DriverError, match="has no cuTensorMapEncodeTiled; install a driver for"):
        CudaDriver(faked)


def test_a_machine_without_a_driver_is_told_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libthat-is-not-here.so.1")
    with pytest.raises(DriverError, match=r"no NVIDIA driver: libthat-is-not-here\.so\.1: cannot"):
        CudaDriver.load()


def test_structs_and_numbers_are_those_of_the_drivers_header(tmp_path: Path) -> None:
    """By a C++ compiler, on the header that Triton brings."""
    triton = pytest.importorskip("triton", reason="Triton is not installed, which has cuda.h")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    config = {
        **{"gridDimX": "grid", "blockDimX": "block", "sharedMemBytes": "shared_bytes"},
        **{"hStream": "stream", "attrs": "attributes", "numAttrs": "num_attributes"},
    }
    attribute = {"id": "id", "value": "value"}
    value = {"cooperative": "cooperative", "clusterDim": "cluster"}
    value["programmaticStreamSerializationAllowed"] = "programmatic"
    claims = []
    for name, ours, fields in (
        ("CUlaunchConfig", LaunchConfig, config),
        ("CUlaunchAttribute", LaunchAttribute, attribute),
        ("CUlaunchAttributeValue", LaunchValue, value),
    ):
        claims.append(f"sizeof({name}) == {ctypes.sizeof(ours)}")
        for theirs, field in fields.items():
            claims.append(f"offsetof({name}, {theirs}) == {getattr(ours, field).offset}")
    claims += [f"sizeof(CUtensorMap) == {len(MAP_VALUE)}", "alignof(CUtensorMap) % 64 == 0"]
    for constant, number in (
        ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", cuda_driver.MAX_DYNAMIC_SHARED_BYTES),
        ("CU_JIT_ERROR_LOG_BUFFER", cuda_driver.JIT_ERROR_LOG),
        ("CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES", cuda_driver.JIT_ERROR_LOG_BYTES),
        ("CU_LAUNCH_ATTRIBUTE_COOPERATIVE", cuda_driver.COOPERATIVE),
        ("CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION", cuda_driver.CLUSTER_DIMENSION),
        (
            "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
            cuda_driver.PROGRAMMATIC_SERIALIZATION,
        ),
        ("CU_TENSOR_MAP_DATA_TYPE_BFLOAT16", cuda_driver.BFLOAT16),
        ("CU_TENSOR_MAP_INTERLEAVE_NONE", cuda_driver.INTERLEAVE_NONE),
        ("CU_TENSOR_MAP_SWIZZLE_128B", cuda_driver.SWIZZLE_128B),
        ("CU_TENSOR_MAP_L2_PROMOTION_L2_256B", cuda_driver.L2_PROMOTION_256B),
        ("CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE", cuda_driver.FILL_NONE),
        ("CUDA_ERROR_INVALID_PTX", INVALID_PTX),
        ("CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", TOO_LARGE),
    ):
        claims.append(f"{constant} == {number}")
    source = tmp_path / "claims.cc"
    source.write_text(
        "#include <cstddef>\n#include <cuda.h>\n"
        + "".join(f'static_assert({claim}, "{claim}");\n' for claim in claims)
    )
    command = [compiler, "-std=c++17", "-fsyntax-only", "-I", include, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
