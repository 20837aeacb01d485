"""All routed experts arrive once, whole and in their slots, or loading stops with the reason."""

import ctypes
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from hybridk2.checkpoint import Checkpoint, LoadProgress
from hybridk2.errors import CheckpointError, EngineError, OutOfMemoryError, TuningError
from hybridk2.experts.loading import check_memory, load_experts, load_placement
from hybridk2.placement import Placement
from hybridk2.synthesis import synthesize, synthetic_config


class RecordingStore:
    """Stands in for HostExperts: keeps copies, as it keeps panels."""

    def __init__(self, delay_seconds: float = 0.0, fail_at: tuple[int, int] | None = None) -> None:
        self.experts: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.threads: set[int] = set()
        self.calls = 0
        self._delay_seconds = delay_seconds
        self._fail_at = fail_at
        self._lock = threading.Lock()

    def load_expert(self, slot, expert, gate, up, down) -> None:
        with self._lock:
            self.calls += 1
        if (slot, expert) == self._fail_at:
            raise RuntimeError("no room for this one")
        time.sleep(self._delay_seconds)
        tensors = [
            tensor.clone()
            for linear in (gate, up, down)
            for tensor in (linear.packed, linear.scale)
        ]
        with self._lock:
            assert (slot, expert) not in self.experts, "loaded twice"
            self.experts[slot, expert] = tensors
            self.threads.add(threading.get_ident())


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
def test_every_expert_arrives_once_in_its_slot_whatever_the_number_of_threads(
    small_checkpoint, threads
):
    checkpoint, store = Checkpoint.open(small_checkpoint), RecordingStore()
    load_experts(checkpoint, store, lambda progress: None, threads=threads)
    assert store.experts.keys() == {(slot, expert) for slot in range(2) for expert in range(8)}
    for (slot, number), found in store.experts.items():
        expert = checkpoint.expert(slot + 1, number)
        expected = [
            tensor
            for linear in (expert.gate, expert.up, expert.down)
            for tensor in (linear.packed, linear.scale)
        ]
        assert all(map(torch.equal, found, expected)), (slot, number)


def test_the_experts_kept_by_the_extension_are_those_of_the_checkpoint(small_checkpoint):
    host = pytest.importorskip("hybridk2.experts.host", reason="the extension is not built")
    checkpoint = Checkpoint.open(small_checkpoint)
    config = checkpoint.config
    with host.HostExperts.of_model(
        config,
        threads=2,
    ) as experts:
        load_experts(checkpoint, experts, lambda progress: None)
        for slot, number in [(0, 0), (1, 7)]:
            stored = checkpoint.expert(slot + 1, number)
            kept = experts.expert_weights(slot, number)
            for linear, weights in zip((stored.gate, stored.up, stored.down), kept, strict=True):
                shifts = torch.arange(0, 32, 4, dtype=torch.int32)
                codes = (linear.packed.unsqueeze(-1) >> shifts & 15).flatten(1) - 8
                expected = codes * linear.scale.float().repeat_interleave(32, dim=1)
                assert torch.equal(weights, expected), (slot, number)


@pytest.mark.parametrize("keep_host_copy", [False, True])
@pytest.mark.parametrize("residents", ["none", "some", "all"])
def test_experts_go_where_the_placement_says_and_to_the_host_only_if_asked_or_none_of_it(
    small_checkpoint, residents, keep_host_copy
):
    host = pytest.importorskip("hybridk2.experts.host", reason="the extension is not built")
    from hybridk2.device import CpuDevice
    from hybridk2.experts.resident import ResidentExperts

    checkpoint = Checkpoint.open(small_checkpoint)
    config = checkpoint.config
    shape = (config.num_moe_layers, config.n_routed_experts)
    sizes = (config.hidden_size, config.moe_intermediate_size)
    mask = np.full(shape, residents == "all")
    if residents == "some":
        mask[0, [0, 3]] = mask[1, 7] = True
    resident = ResidentExperts(mask, *sizes, CpuDevice())
    elsewhere = None if keep_host_copy else mask
    with host.HostExperts(*shape, *sizes, threads=2, elsewhere=elsewhere) as experts:
        reports: list[LoadProgress] = []
        load_experts(
            checkpoint, experts, reports.append, resident=resident, keep_host_copy=keep_host_copy
        )
        resident.check_loaded()
        assert reports[-1].done_bytes == checkpoint.expert_bytes
        on_host = np.ones(shape, bool) if keep_host_copy else ~mask
        assert experts.weight_bytes == on_host.sum() * experts.expert_bytes
        for slot, number in np.ndindex(shape):
            stored = checkpoint.expert(slot + 1, number)
            packed = experts.pack_expert(stored.gate, stored.up, stored.down)
            if mask[slot, number]:
                assert torch.equal(resident.panel(slot, number), packed)
            if on_host[slot, number]:
                [region] = experts.expert_regions(slot, number)
                assert ctypes.string_at(region.address, region.bytes) == packed.numpy().tobytes()
            else:
                with pytest.raises(EngineError, match=r"is not loaded"):
                    experts.expert_regions(slot, number)


def test_a_placement_is_of_the_very_model_or_refused_by_the_name_of_its_file(
    small_checkpoint, tmp_path
):
    checkpoint = Checkpoint.open(small_checkpoint)
    path, mask = tmp_path / "day.json", np.zeros((2, 8), bool)
    mask[1, 5] = True
    fingerprint = checkpoint.routing_fingerprint()
    Placement.from_mask(fingerprint, "frequency", mask).save(path)
    assert np.array_equal(load_placement(path, checkpoint).mask(), mask)

    synthesize(tmp_path / "other", synthetic_config("tiny"), seed=1)
    with pytest.raises(
        TuningError, match=r"day\.json: .* made for a model that routes by"
    ) as error:
        load_placement(path, Checkpoint.open(tmp_path / "other"))
    assert fingerprint[:12] in str(error.value)

    Placement.from_mask(fingerprint, "frequency", mask[:, :6]).save(path)
    with pytest.raises(
        TuningError, match=r"day\.json: .*2 layers of 6 experts, and this model has 2 of 8\."
    ):
        load_placement(path, checkpoint)
    with pytest.raises(TuningError, match=r"nowhere\.json: cannot be read"):
        load_placement(tmp_path / "nowhere.json", checkpoint)


def test_a_checkpoint_has_the_fingerprint_of_the_model_that_is_loaded_from_it(small_checkpoint):
    host = pytest.importorskip("hybridk2.experts.host", reason="the extension is not built")
    from hybridk2.device import CpuDevice
    from hybridk2.model.loading import load_model

    checkpoint = Checkpoint.open(small_checkpoint)
    with host.HostExperts(2, 8, 64, 32, threads=1) as experts:
        for dtype in (torch.float32, torch.bfloat16):
            model = load_model(checkpoint, experts, CpuDevice(), dtype)
            assert model.routing_fingerprint() == checkpoint.routing_fingerprint()


def test_progress_counts_up_to_the_expert_bytes_at_most_ten_times_a_second(small_checkpoint):
    checkpoint, reports = Checkpoint.open(small_checkpoint), list[LoadProgress]()
    load_experts(checkpoint, RecordingStore(delay_seconds=0.03), reports.append, threads=1)
    done = [report.done_bytes for report in reports]
    assert done == sorted(done)
    assert done[-1] == checkpoint.expert_bytes
    assert {report.total_bytes for report in reports} == {checkpoint.expert_bytes}
    assert 2 <= len(reports) <= 10 * reports[-1].seconds + 1


def test_progress_tells_rate_and_time_left():
    progress = LoadProgress("experts", done_bytes=4 * 10**9, total_bytes=10**10, seconds=2.0)
    assert progress.gigabytes_per_second == 2.0
    assert progress.eta_seconds == 3.0
    start = LoadProgress("experts", done_bytes=0, total_bytes=10**10, seconds=0.0)
    assert start.gigabytes_per_second == 0.0
    assert start.eta_seconds is None


def test_an_error_of_the_store_stops_the_other_threads_and_is_raised(small_checkpoint):
    store = RecordingStore(delay_seconds=0.05, fail_at=(0, 1))
    with pytest.raises(RuntimeError, match="no room for this one"):
        load_experts(Checkpoint.open(small_checkpoint), store, lambda progress: None, threads=2)
    assert store.calls <= 4  # of 16: each thread may have been inside one more expert


def test_a_damaged_expert_stops_loading_with_the_name_of_the_tensor(small_checkpoint, tmp_path):
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "damaged"))
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model-00003-of-000004.safetensors", 100_000)
    with pytest.raises(CheckpointError, match=r"model-00003-of-000004.*model\.layers\.2\.mlp"):
        load_experts(checkpoint, RecordingStore(), lambda progress: None)


def test_an_interrupt_while_progress_is_shown_stops_loading(small_checkpoint):
    def interrupt(progress: LoadProgress) -> None:
        raise KeyboardInterrupt

    store = RecordingStore(delay_seconds=0.08)
    with pytest.raises(KeyboardInterrupt):
        load_experts(Checkpoint.open(small_checkpoint), store, interrupt, threads=1)
    assert store.calls < 16
    assert not [thread for thread in threading.enumerate() if "hybridk2-load" in thread.name]


def test_memory_is_checked_before_loading_and_refused_with_all_numbers(small_checkpoint):
    checkpoint = Checkpoint.open(small_checkpoint)
    needed_bytes = checkpoint.expert_bytes + checkpoint.dense_bytes + 10**9
    check_memory(checkpoint, needed_bytes)
    with pytest.raises(OutOfMemoryError) as error:
        check_memory(checkpoint, needed_bytes - 10**9)
    assert f"{needed_bytes / 1e9:.2f} GB of RAM" in str(error.value)
    assert "1.00 GB are missing" in str(error.value)
    check_memory(checkpoint, needed_bytes + 5 * 10**9, cache_bytes=5 * 10**9)
    with pytest.raises(OutOfMemoryError, match=r"5\.00 GB for the latent cache"):
        check_memory(checkpoint, needed_bytes + 4 * 10**9, cache_bytes=5 * 10**9)
    kept_bytes = checkpoint.expert_bytes // 4
    check_memory(checkpoint, needed_bytes - 3 * kept_bytes, expert_bytes=kept_bytes)
    with pytest.raises(OutOfMemoryError, match=r"0\.00 GB for routed experts"):
        check_memory(checkpoint, needed_bytes - 3 * kept_bytes - 1, expert_bytes=kept_bytes)
    with pytest.raises(OutOfMemoryError, match=r"7\.00 GB for all other weights"):
        check_memory(checkpoint, 7 * 10**9, dense_bytes=7 * 10**9)


@pytest.mark.soak
def test_loading_needs_one_expert_of_memory_per_thread_beyond_what_is_kept(tmp_path):
    """1.2 GB of experts with K2's true dimensions pass through two buffers of 25 MB."""
    synthesize(tmp_path / "wide", synthetic_config("full", layers=2, experts=48), seed=0)
    checkpoint, process = Checkpoint.open(tmp_path / "wide"), psutil.Process()
    resident_bytes = process.memory_info().rss
    peak_bytes = 0

    class Watch:
        def load_expert(self, slot, expert, gate, up, down) -> None:
            nonlocal peak_bytes
            peak_bytes = max(peak_bytes, process.memory_info().rss - resident_bytes)

    load_experts(checkpoint, Watch(), lambda progress: None, threads=2)
    # Two experts of 24,772,608 bytes, and the check's scratch and Python's own on top.
    assert 24_772_608 <= peak_bytes <= 2 * 24_772_608 + 16_000_000
