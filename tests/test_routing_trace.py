"""Routing traces: what is written is read, whatever interrupts it; damage is refused by name."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridk2.assistant import Assistant
from hybridk2.chat.events import Finished
from hybridk2.config import EngineConfig
from hybridk2.engine import Engine
from hybridk2.errors import TuningError
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.model.moe import TopKRouter
from hybridk2.routing_trace import (
    RoutingTrace,
    TraceHeader,
    TraceRecorder,
    TraceWriter,
    read_trace,
)
from hybridk2.sampling import SamplingParams
from hybridk2.synthesis import synthesize, synthetic_config

K2 = TraceHeader("of-a-model", layers=60, experts=384, top_k=8, source="a workload")
SMALL = TraceHeader("of-a-model", layers=2, experts=8, top_k=2, source="a workload")


def random_ids(header: TraceHeader, tokens: int, seed: int = 0) -> np.ndarray:
    """(tokens, layers, top_k), as a recorder hands them over."""
    shape = (tokens, header.layers, header.top_k)
    return np.random.default_rng(seed).integers(header.experts, size=shape).astype(header.dtype)


def write(path: Path, header: TraceHeader, *blocks: np.ndarray) -> None:
    writer = TraceWriter(path, header)
    for block in blocks:
        writer.append(block)
    writer.close()


@pytest.mark.parametrize("experts", [2, 8, 256, 257, 384, 512, 513, 4096])
def test_ids_come_back_whatever_their_number_of_bits(experts: int, tmp_path: Path) -> None:
    header = replace(K2, experts=experts, layers=3, top_k=2)
    blocks = [random_ids(header, tokens) for tokens in (1, 0, 7)]
    write(tmp_path / "trace", header, *blocks)
    trace = read_trace(tmp_path / "trace")
    assert (trace.header, trace.blocks, trace.tokens) == (header, 3, 8)
    np.testing.assert_array_equal(trace.ids.swapaxes(0, 1), np.concatenate(blocks))


def test_requests_and_steps_come_back_block_by_block(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    writer = TraceWriter(tmp_path / "trace", SMALL)
    requests = [random.integers(256, size=tokens).astype(np.uint8) for tokens in (5, 0, 17)]
    begins = [random.random(len(block)) < 0.5 for block in requests]
    for block in zip(requests, begins, strict=True):
        writer.append(random_ids(SMALL, len(block[0])), *block)
    writer.append(random_ids(SMALL, 2))
    writer.close()
    trace = read_trace(tmp_path / "trace")
    np.testing.assert_array_equal(trace.requests, np.concatenate([*requests, [3, 3]]))
    np.testing.assert_array_equal(trace.begins, np.concatenate([*begins, [True, True]]))
    assert trace.steps == trace.begins.sum()


def test_version_1_is_read_as_a_request_in_each_block_and_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    blocks = [random_ids(SMALL, tokens) for tokens in (2, 3)]
    write(path, SMALL)
    old = bytearray(path.read_bytes())
    old[8:12] = struct.pack("<I", 1)
    for block in blocks:  # 3 bits an id: no planes of higher bits
        lengths = struct.pack("<III", len(block), block.size, zlib.crc32(block.tobytes()))
        old += lengths + struct.pack("<I", zlib.crc32(lengths)) + block.tobytes()
    path.write_bytes(old)
    trace = read_trace(path)
    np.testing.assert_array_equal(trace.ids.swapaxes(0, 1), np.concatenate(blocks))
    assert trace.requests.tolist() == [0, 0, 1, 1, 1]
    assert trace.steps == trace.tokens == 5
    with pytest.raises(TuningError, match="version 1 is read, but not continued"):
        TraceWriter(path, SMALL)
    assert path.read_bytes() == old


def test_a_token_of_k2_takes_541_bytes(tmp_path: Path) -> None:
    write(tmp_path / "trace", K2, random_ids(K2, 1000))
    assert (tmp_path / "trace").stat().st_size == pytest.approx(541.125 * 1000, abs=250)
    assert (tmp_path / "trace").stat().st_mode & 0o077 == 0, "readable by its owner only"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_trace_cut_anywhere_is_read_and_continued_from_its_last_whole_block(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "trace"
    blocks = [random_ids(SMALL, 3, seed) for seed in range(3)]
    ends = [0]
    for number in range(3):
        write(path, SMALL, blocks[number])
        ends.append(path.stat().st_size)
    block_bytes = ends[2] - ends[1]
    header_bytes = ends[1] - block_bytes
    cut = data.draw(st.integers(0, ends[3] - 1))
    os.truncate(path, cut)
    whole = max((cut - header_bytes) // block_bytes, 0)
    if cut >= header_bytes:
        assert read_trace(path).blocks == whole
    writer = TraceWriter(path, SMALL)
    assert (writer.blocks, writer.tokens) == (whole, 3 * whole)
    for block in blocks[whole:]:
        writer.append(block)
    writer.close()
    np.testing.assert_array_equal(read_trace(path).ids.swapaxes(0, 1), np.concatenate(blocks))


def test_every_flipped_bit_is_refused_by_the_file_s_name(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write(path, SMALL, random_ids(SMALL, 2), random_ids(SMALL, 2))
    good = path.read_bytes()
    for position in range(8 * len(good)):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(TuningError, match=str(path)):
            read_trace(path)
        with pytest.raises(TuningError, match=str(path)):
            TraceWriter(path, SMALL)
        assert path.read_bytes() == bad, "what is refused is left as it is"


def test_a_trace_of_another_model_or_workload_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write(path, SMALL, random_ids(SMALL, 2))
    for other in (replace(SMALL, model="another"), replace(SMALL, source="other prompts")):
        with pytest.raises(TuningError, match=r"another (model|source)"):
            TraceWriter(path, other)
    assert read_trace(path).tokens == 2


def test_two_processes_do_not_write_one_trace(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace", SMALL)
    with pytest.raises(TuningError, match="another process"):
        TraceWriter(tmp_path / "trace", SMALL)
    writer.close()
    TraceWriter(tmp_path / "trace", SMALL).close()


def test_other_files_and_other_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("my own notes, which are no trace\n" * 10)
    with pytest.raises(TuningError, match="not a routing trace"):
        TraceWriter(path, SMALL)
    assert path.read_text().startswith("my own notes")
    path.unlink()
    write(path, SMALL)
    later = bytearray(path.read_bytes())
    later[8:12] = struct.pack("<I", 3)
    path.write_bytes(later)
    with pytest.raises(TuningError, match="version 3"):
        read_trace(path)
    with pytest.raises(TuningError, match="cannot be read"):
        read_trace(tmp_path / "nowhere")


def test_a_step_that_failed_half_way_leaves_nothing(tmp_path: Path) -> None:
    recorder = TraceRecorder(TraceWriter(tmp_path / "trace", SMALL), block_tokens=2)
    picks = random_ids(SMALL, 3)
    recorder.begin_step([7])
    recorder.picked(0, picks[2:, 0])  # and layer 1 never comes
    for step in range(2):
        recorder.begin_step([7])
        for slot in range(SMALL.layers):
            recorder.picked(slot, picks[step : step + 1, slot])
    recorder.close()
    trace = read_trace(tmp_path / "trace")
    np.testing.assert_array_equal(trace.ids.swapaxes(0, 1), picks[:2])
    assert (trace.blocks, trace.steps) == (1, 2)


def test_a_full_disk_ends_the_recording_and_not_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TraceWriter(tmp_path / "trace", SMALL)
    recorder = TraceRecorder(writer, block_tokens=1)
    picks = random_ids(SMALL, 1)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    recorder.begin_step([0])
    recorder.picked(0, picks[:, 0])
    recorder.picked(1, picks[:, 1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        for _ in range(2):
            recorder.begin_step([0])
            recorder.picked(0, picks[:, 0])
            recorder.picked(1, picks[:, 1])
    recorder.close()
    assert caplog.text.count("no longer recorded") == 1
    assert "No space left" in caplog.text
    assert read_trace(tmp_path / "trace").tokens == 1, "what was written before is whole"


class Spy:
    """A router that also keeps what it picks."""

    def __init__(self, router: TopKRouter) -> None:
        self._router = router
        self.picks: list[np.ndarray] = []

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expert_ids, weights = self._router(x)
        self.picks.append(expert_ids.numpy().copy())
        return expert_ids, weights

    def decode(
        self, x: torch.Tensor, batch: DecodeBatch, slot: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        expert_ids, weights = self._router.decode(x, batch, slot)
        self.picks.append(expert_ids.numpy().copy())
        return expert_ids, weights

    def identifying_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._router.identifying_values()


def test_a_model_records_the_experts_of_each_token_that_it_decodes(tmp_path: Path) -> None:
    assistant = Assistant.load(EngineConfig(threads=1))
    header = assistant.trace_header("a test")
    assert (header.layers, header.experts, header.top_k) == (5, 32, 4)
    spies = []
    for layer in assistant._engine._model.layers:
        if layer.moe is not None:
            spies.append(Spy(layer.moe.router))
            layer.moe.router = spies[-1]  # type: ignore[assignment]
    assistant.record_routing(TraceRecorder(TraceWriter(tmp_path / "trace", header), 16))
    question = [{"role": "user", "content": "which one is bigger, 9.11 or 9.9?"}]
    finished = list(assistant.reply(question, None, SamplingParams(temperature=0.0)))[-1]
    assistant.close()

    assert isinstance(finished, Finished)
    trace = read_trace(tmp_path / "trace")
    # Each token of the answer was decoded to get the next one; the prompt was not decoded.
    assert trace.tokens == finished.usage.completion_tokens > 20
    assert trace.blocks == -(-trace.tokens // 16)
    assert trace.steps == trace.tokens
    assert set(trace.requests) == {0}
    for slot, spy in enumerate(spies):
        decoded = np.concatenate([picks for picks in spy.picks if len(picks) == 1])
        np.testing.assert_array_equal(trace.ids[slot], decoded)


def test_requests_that_run_side_by_side_are_told_apart(tmp_path: Path) -> None:
    """Two requests, the second joining in the middle of the first: what each picks is found again
    by its number, whatever ran beside it."""
    engine = Engine.load(EngineConfig(threads=1))
    config = engine.config
    header = TraceHeader(
        engine.routing_fingerprint(),
        *(config.num_moe_layers, config.n_routed_experts, config.num_experts_per_tok, "a test"),
    )

    def run(path: Path, prompts: list[list[int]], tokens: int) -> RoutingTrace:
        recorder = TraceRecorder(TraceWriter(path, header), 8)
        engine.watch_routing(
            lambda slot, ids: recorder.picked(slot, ids.numpy()), recorder.begin_step
        )
        # With a seed the numbers of a request do not depend on its company.
        params = SamplingParams(temperature=0.0, max_tokens=tokens, seed=0)
        first = engine.submit(prompts[0], params, stop_ids=())
        for _ in range(4):
            engine.step()
        others = [engine.submit(prompt, params, stop_ids=()) for prompt in prompts[1:]]
        while not all(generation.done for generation in (first, *others)):
            engine.step()
        recorder.close()
        return read_trace(path)

    left, right = list(range(40, 60)), list(range(80, 90))
    both = run(tmp_path / "both", [left, right], 12)
    alone = [run(tmp_path / str(prompt[0]), [prompt], 12) for prompt in (left, right)]
    engine.close()
    assert both.tokens == 2 * 11 > both.steps
    assert set(both.requests) == {0, 1}
    ends = np.append(np.flatnonzero(both.begins)[1:], both.tokens)
    assert set(ends - np.flatnonzero(both.begins)) == {1, 2}
    for number, trace in enumerate(alone):
        np.testing.assert_array_equal(both.ids[:, both.requests == number], trace.ids)


def test_models_of_one_shape_and_other_routers_have_other_fingerprints(tmp_path: Path) -> None:
    config = synthetic_config("tiny")
    fingerprints = set()
    for seed in (0, 1, 0):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        synthesize(folder, config, seed)
        engine = Engine.load(EngineConfig(model=str(folder), threads=1))
        fingerprints.add(engine.routing_fingerprint())
        engine.close()
    assert len(fingerprints) == 2
