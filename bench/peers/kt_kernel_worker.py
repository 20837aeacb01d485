"""kt-kernel's native INT4 experts (method RAWINT4), driven without its Python layer.

The wheel's extension needs neither torch nor triton, which the package around it does; its loader
picks the build for this processor, as kt-kernel itself would.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import time
from pathlib import Path
from types import ModuleType
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

# Backends of RAWINT4. The first is its choice from AVX-512 on and quantises activations to 8 bits;
# the second multiplies bf16 ones, at a fraction of the speed. A third, "blocked", has the first's
# arithmetic and took 1.5 to 2 times as long at 1, 16 and 256 tokens.
BACKENDS = {"kgroup": "AMXInt4_KGroup_MOE", "avx2": "AVX2RawInt4_MOE"}
DRIVERS = ("queue", "direct")
SPIN_SECONDS = 0.06  # its pools spin for 50 ms after a call


class KtKernel(Engine):
    """One instance per backend and number of workers: each is bound to its own thread pool."""

    def load(self, files: WeightFiles, threads: int, max_tokens: int, purpose: Purpose) -> Features:
        self._extension, variant = load_extension()
        self._shape = files.shape
        self._instances: dict[str, tuple[Any, Any]] = {}
        self._last = ""
        if purpose == "speed":
            # The caller spins through every call, beside the workers: with one worker fewer the
            # processor is not oversubscribed, which is the better choice where cores are few.
            for workers in sorted({threads, max(threads - 1, 1)}, reverse=True):
                self._add("kgroup", workers, files, max_tokens)
            drivers: tuple[str, ...] = DRIVERS
        else:
            for backend in BACKENDS:
                self._add(backend, threads, files, max_tokens)
            drivers = DRIVERS[:1]
        return Features(
            f"kt-kernel {importlib.metadata.version('kt-kernel')} ({variant})",
            [f"{name}, {driver}" for name, driver in itertools.product(self._instances, drivers)],
            [
                "the wheel's calling thread spins beside its workers: run with as many workers as "
                "threads and with one fewer, the better counts"
            ],
        )

    def run(self, path: str, call: Call) -> tuple[float, NDArray[np.float32]]:
        name, _, driver = path.rpartition(", ")
        queue, experts = self._instances[name]
        if self._last not in (name, ""):
            time.sleep(SPIN_SECONDS)  # until the other pool has stopped spinning
        self._last = name
        tokens, top_k = call.expert_ids.shape
        ids = call.expert_ids.astype(np.int64)
        count = np.array([tokens], dtype=np.int32)
        out = np.empty((tokens, self._shape.hidden), dtype=np.uint16)
        arguments = (
            count.ctypes.data,
            top_k,
            ids.ctypes.data,
            call.weights.ctypes.data,
            call.x.ctypes.data,
            out.ctypes.data,
            False,
        )

        def through_queue() -> None:
            queue.submit(experts.forward_task(*arguments))
            queue.sync()

        def directly() -> None:
            experts.forward(*arguments)

        seconds = timed(through_queue if driver == "queue" else directly)
        return seconds, widen_bfloat16(out)

    def _add(self, backend: str, workers: int, files: WeightFiles, max_tokens: int) -> None:
        kind = getattr(self._extension.moe, BACKENDS[backend], None)
        if kind is None:
            raise RuntimeError(f"kt-kernel has no {BACKENDS[backend]} for this processor")
        nodes = min(numa_nodes(), workers)  # it splits every expert over them
        pool = self._extension.WorkerPoolConfig()
        pool.subpool_count = nodes
        pool.subpool_numa_map = list(range(nodes))
        pool.subpool_thread_count = [
            workers // nodes + (node < workers % nodes) for node in range(nodes)
        ]
        queue = self._extension.CPUInfer(pool)
        matrices = {name: (files.packed(name), files.scale(name)) for name in MATRICES}
        experts = kind(self._configuration(matrices, queue, max_tokens))
        identity = np.arange(files.shape.experts, dtype=np.int64)
        queue.submit(experts.load_weights_task(identity.ctypes.data))
        queue.sync()  # it has copied the matrices
        self._instances[f"{backend}, {workers} workers"] = (queue, experts)

    def _configuration(
        self, matrices: dict[str, tuple[NDArray[Any], NDArray[Any]]], queue: Any, max_tokens: int
    ) -> Any:
        shape = self._shape
        configuration = self._extension.moe.MOEConfig(
            shape.experts, shape.top_k, shape.hidden, shape.intermediate, 0
        )
        configuration.max_len = max_tokens
        configuration.quant_config.bits = 4
        configuration.quant_config.group_size = GROUP
        configuration.quant_config.zero_point = False
        configuration.pool = queue.backend_
        for name, (packed, scale) in matrices.items():
            setattr(configuration, f"{name}_proj", packed.ctypes.data)
            setattr(configuration, f"{name}_scale", scale.ctypes.data)
        return configuration


def numa_nodes() -> int:
    return max(len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))), 1)


def load_extension() -> tuple[ModuleType, str]:
    """The wheel's extension and the name of the build that fits this processor."""
    package = importlib.util.find_spec("kt_kernel")
    if package is None or package.origin is None:
        raise ImportError("kt-kernel is not installed in this environment")
    loader = Path(package.origin).with_name("_cpu_detect.py")
    specification = importlib.util.spec_from_file_location("kt_cpu_detect", loader)
    if specification is None or specification.loader is None:
        raise ImportError(f"kt-kernel has no loader where 0.7 has it: {loader}")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    extension, variant = module.initialize()
    return extension, variant


if __name__ == "__main__":
    serve(KtKernel)
