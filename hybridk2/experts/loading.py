"""Routed experts from the checkpoint's files to where they live, on several threads.

Owns the threads, the order of the reads, the progress and the question whether the memory is there.
How an expert is stored on disk is `checkpoint`'s business, how it lies in memory is `HostExperts`'
and `ResidentExperts`'; which of the two it is for, a placement says.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from torch import Tensor

from hybridk2.checkpoint import (
    Checkpoint,
    ExpertReader,
    ExpertWeights,
    LoadProgress,
    QuantizedLinear,
)
from hybridk2.errors import OutOfMemoryError
from hybridk2.placement import Placement

__all__ = [
    "ExpertStore",
    "LoadProgress",
    "ResidentStore",
    "check_memory",
    "load_experts",
    "load_placement",
]

# One thread can not keep an NVMe drive busy: it alternates between reading and repacking. Eight
# hold the drive's queue filled; each costs the memory of one expert, 25 MB in K2.
_MAX_THREADS = 8
_PROGRESS_SECONDS = 0.1

# What loading and serving need beyond the weights: buffers, activations, the interpreter, torch.
_WORKING_BYTES = 1_000_000_000


class ExpertStore(Protocol):
    """Where experts go: `HostExperts`, as far as loading sees it. Calls come from many threads."""

    def load_expert(
        self,
        slot: int,
        expert: int,
        gate: QuantizedLinear,
        up: QuantizedLinear,
        down: QuantizedLinear,
    ) -> None: ...

    def pack_expert(
        self, gate: QuantizedLinear, up: QuantizedLinear, down: QuantizedLinear
    ) -> Tensor: ...


class ResidentStore(Protocol):
    """Experts that live elsewhere: `ResidentExperts`, as far as loading sees it. Any thread."""

    def is_resident(self, slot: int, expert: int) -> bool: ...

    def load(self, slot: int, expert: int, packed: Tensor) -> None: ...


def load_placement(path: Path, checkpoint: Checkpoint) -> Placement:
    """The placement in a file, which must be of this very model.

    Raises TuningError, naming the file, when it cannot be read, is damaged or was made for another
    model, and CheckpointError when the routers that tell one model from another cannot be read.
    """
    placement = Placement.load(path)
    config = checkpoint.config
    placement.check_model(
        path, checkpoint.routing_fingerprint(), config.num_moe_layers, config.n_routed_experts
    )
    return placement


def check_memory(
    checkpoint: Checkpoint,
    available_bytes: int,
    *,
    expert_bytes: int | None = None,
    dense_bytes: int | None = None,
    cache_bytes: int = 0,
) -> None:
    """Refuse a model that does not fit into `available_bytes` of RAM.

    expert_bytes: of the routed experts that the host keeps (`HostExperts.weight_bytes`); None for
    all. dense_bytes: what the dense weights take when loaded; None for their size on disk.
    cache_bytes: of the latent cache. Raises OutOfMemoryError with all numbers.
    """
    expert_bytes = checkpoint.expert_bytes if expert_bytes is None else expert_bytes
    dense_bytes = checkpoint.dense_bytes if dense_bytes is None else dense_bytes
    needed_bytes = expert_bytes + dense_bytes + cache_bytes + _WORKING_BYTES
    if needed_bytes > available_bytes:
        raise OutOfMemoryError(
            f"{checkpoint.folder}: the model needs {_gigabytes(needed_bytes)} of RAM: "
            f"{_gigabytes(expert_bytes)} for routed experts, "
            f"{_gigabytes(dense_bytes)} for all other weights, {_gigabytes(cache_bytes)} for the "
            f"latent cache and {_gigabytes(_WORKING_BYTES)} to work with. Available are "
            f"{_gigabytes(available_bytes)}, so {_gigabytes(needed_bytes - available_bytes)} are "
            "missing. Close other programs, shorten the context, or use a machine with more memory"
        )


def load_experts(
    checkpoint: Checkpoint,
    experts: ExpertStore,
    on_progress: Callable[[LoadProgress], None],
    *,
    threads: int | None = None,
    resident: ResidentStore | None = None,
    keep_host_copy: bool = False,
) -> None:
    """Read every routed expert and hand it to `experts`, which repacks it.

    Slot 0 of `experts` is the first MoE layer. resident: gets those that live there, packed, which
    `experts` then gets only with keep_host_copy. on_progress is called from the calling thread, at
    most ten times a second and once at the end. threads: None for as many as pay, up to eight.
    Memory: one expert per thread beyond what `experts` keeps. What was read is dropped from the
    kernel's page cache, which would otherwise fill with bytes that are now in memory twice.

    The first error (CheckpointError for damaged files) stops all threads and is raised; so does an
    exception from on_progress, or Ctrl-C.
    """
    loading = _Loading(checkpoint, experts, resident, keep_host_copy)
    num_threads = threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    start = time.monotonic()

    def report() -> None:
        seconds = time.monotonic() - start
        on_progress(LoadProgress("experts", loading.done_bytes, checkpoint.expert_bytes, seconds))

    with ThreadPoolExecutor(num_threads, thread_name_prefix="hybridk2-load") as pool:
        try:
            running: set[Future[None]] = {pool.submit(loading.work) for _ in range(num_threads)}
            while running:
                done, running = wait(running, _PROGRESS_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if running:
                    report()
        finally:
            loading.stop()
    report()


class _Loading:
    """The experts still to be read, shared by the threads that read them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: ExpertStore,
        resident: ResidentStore | None,
        keep_host_copy: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._experts = experts
        self._resident = resident
        self._keep_host_copy = keep_host_copy
        self._lock = threading.Lock()
        self._left: Iterator[tuple[int, int]] = checkpoint.experts_in_file_order()
        self.done_bytes = 0

    def stop(self) -> None:
        """Let every thread end after the expert it is at."""
        with self._lock:
            self._left = iter(())

    def work(self) -> None:
        """Read experts until none is left. An error leaves none to the other threads."""
        reader = ExpertReader(self._checkpoint)
        try:
            while (next_expert := self._take()) is not None:
                layer, expert = next_expert
                slot = layer - self._checkpoint.config.first_k_dense_replace
                self._hand_over(slot, expert, reader.read(layer, expert))
                reader.forget(layer, expert)
                with self._lock:
                    self.done_bytes += reader.expert_bytes
        except BaseException:
            self.stop()
            raise

    def _hand_over(self, slot: int, expert: int, weights: ExpertWeights) -> None:
        matrices = weights.gate, weights.up, weights.down
        resident = self._resident
        if resident is not None and resident.is_resident(slot, expert):
            resident.load(slot, expert, self._experts.pack_expert(*matrices))
            if not self._keep_host_copy:
                return
        self._experts.load_expert(slot, expert, *matrices)

    def _take(self) -> tuple[int, int] | None:
        with self._lock:
            return next(self._left, None)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
