"""The bench's peers: what is said over the pipe, and what happens when a worker fails."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from peers import client  # noqa: E402
from peers.client import Peer, PeerError, WeightFolder  # noqa: E402
from peers.llama_cpp_worker import q4_0  # noqa: E402
from peers.protocol import Shape, WeightFiles, widen_bfloat16  # noqa: E402
from peers.race import Peers, Race, running_peers  # noqa: E402

from hybridk2.checkpoint import QuantizedLinear  # noqa: E402

SHAPE = Shape(experts=3, hidden=64, intermediate=32, top_k=2)

# Scales x by the first scale of the first expert's gate, so that weights and calls both count. Its
# path "slow" sleeps, "crash" kills it, "refuse" raises; it prints where its engine would.
FAKE_WORKER = """
import os, time
import numpy as np
from peers.protocol import Engine, Features, serve, widen_bfloat16

class Fake(Engine):
    def load(self, files, threads, max_tokens, purpose):
        print("noise on standard output", flush=True)
        self.factor = widen_bfloat16(files.scale("gate")[0, 0, :1])
        return Features(f"fake {threads} {max_tokens} {purpose}", ["slow", "fast"], ["a remark"])

    def run(self, path, call):
        if path == "crash":
            os.abort()
        if path == "refuse":
            raise ValueError("no such path")
        if path == "hang":
            time.sleep(60)
        assert call.expert_ids.shape == call.weights.shape
        return 0.002 if path == "slow" else 0.001, widen_bfloat16(call.x) * self.factor

serve(Fake)
"""


@pytest.fixture(scope="module")
def weights() -> Iterator[WeightFiles]:
    with WeightFolder(SHAPE) as folder:
        for expert in range(SHAPE.experts):
            folder.add(expert, matrix(32, 64, expert), matrix(32, 64, 7), matrix(64, 32, 8))
        yield folder.files


def matrix(rows: int, columns: int, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(
        -(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int64
    )
    scale = torch.rand(rows, columns // 32, generator=generator) + 0.5
    return QuantizedLinear(packed.int(), scale.bfloat16())


@pytest.fixture
def fake(weights: WeightFiles) -> Iterator[Peer]:
    peer = start_fake(weights)
    yield peer
    peer.close()


def start_fake(weights: WeightFiles, answer_seconds: float = 60.0) -> Peer:
    return Peer(
        "fake",
        weights,
        threads=2,
        max_tokens=9,
        purpose="speed",
        command=[sys.executable, "-c", FAKE_WORKER],
        answer_seconds=answer_seconds,
    )


def inputs(tokens: int = 4, calls: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, SHAPE.hidden).bfloat16()
    routings = torch.zeros(calls, tokens, SHAPE.top_k, dtype=torch.int32)
    return x, routings, torch.full((tokens, SHAPE.top_k), 0.5)


def test_a_worker_sees_the_weights_and_the_call_that_the_bench_has(fake: Peer) -> None:
    assert fake.features.version == "fake 2 9 speed"
    x, routings, weights = inputs()
    out = fake.output("fast", x, routings[0], weights)
    factor = matrix(32, 64, 0).scale[0, 0].float()
    torch.testing.assert_close(out, x.float() * factor, rtol=0, atol=0)


def test_every_routing_is_timed_once(fake: Peer) -> None:
    assert fake.milliseconds("slow", *inputs(calls=5)) == pytest.approx([2.0] * 5)


def test_a_worker_with_nothing_to_answer_is_stopped(fake: Peer) -> None:
    def state() -> str:
        stat = Path(f"/proc/{fake._process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0]

    for _ in range(2):
        deadline = time.monotonic() + 5
        while state() != "T" and time.monotonic() < deadline:
            time.sleep(0.001)
        assert state() == "T"
        fake.milliseconds("fast", *inputs())


def test_what_an_engine_raises_is_the_reason_and_the_worker_goes_on(fake: Peer) -> None:
    with pytest.raises(PeerError, match=r"^ValueError: no such path$"):
        fake.milliseconds("refuse", *inputs())
    assert fake.milliseconds("fast", *inputs(calls=1)) == pytest.approx([1.0])


def test_a_crash_names_its_signal(fake: Peer) -> None:
    with pytest.raises(PeerError, match="SIGABRT"):
        fake.milliseconds("crash", *inputs())


def test_a_worker_that_does_not_answer_is_killed(weights: WeightFiles) -> None:
    peer = start_fake(weights)
    peer._answer_seconds = 0.2
    with pytest.raises(PeerError, match=r"0\.2 s without an answer"):
        peer.milliseconds("hang", *inputs())
    peer.close()


def test_a_worker_that_cannot_start_says_why(weights: WeightFiles) -> None:
    command = [sys.executable, "-c", "import an_engine_that_is_not_installed"]
    with pytest.raises(PeerError, match="No module named 'an_engine_that_is_not_installed'"):
        Peer("fake", weights, threads=1, max_tokens=1, purpose="speed", command=command)


def test_a_command_that_does_not_exist_is_the_reason(weights: WeightFiles) -> None:
    command = ["/no/such/python"]
    with pytest.raises(PeerError, match=r"does not start: .*/no/such/python"):
        Peer("fake", weights, threads=1, max_tokens=1, purpose="speed", command=command)


def test_a_peer_without_environment_is_listed_with_what_to_run(
    weights: WeightFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ENVIRONMENTS", tmp_path)
    with running_peers(
        ["kt", "llama.cpp"], weights, threads=1, max_tokens=1, purpose="speed"
    ) as peers:
        assert peers.running == []
    assert "kt: does not run here: no environment: run bench/peers/setup.sh kt" in peers.lines()
    assert set(peers.summary()["unavailable"]) == {"kt", "llama.cpp"}


def test_a_worker_dies_with_the_bench(weights: WeightFiles, tmp_path: Path) -> None:
    """Stopped workers would otherwise stay for ever, with their weights."""
    script = f"""
import os, sys
sys.path.insert(0, {str(BENCH)!r})
from pathlib import Path
from peers.client import Peer
from peers.protocol import Shape, WeightFiles
files = WeightFiles(Path({str(weights.folder)!r}), Shape(3, 64, 32, 2))
peer = Peer("fake", files, threads=1, max_tokens=1, purpose="speed",
            command=[sys.executable, "-c", {FAKE_WORKER!r}])
print(peer._process.pid, flush=True)
os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    ).stdout
    worker = Path(f"/proc/{int(printed)}/stat")
    deadline = time.monotonic() + 5
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(worker)


def alive(stat: Path) -> bool:
    """Neither gone nor a zombie that nobody has reaped yet."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_race_keeps_to_the_fastest_path_and_gives_the_ratio(fake: Peer) -> None:
    x, routings, weights = inputs()
    race = Race(Peers(running=[fake]), x, weights)
    race.round(routings)
    race.round(routings)
    (row,) = race.rows(our_median_ms=0.5)
    assert (row.path, row.calls) == ("fast", 6)
    assert (row.median_ms, row.times_ours) == (pytest.approx(1), pytest.approx(2))
    assert row.path_medians_ms == {"slow": pytest.approx(2), "fast": pytest.approx(1)}
    json.dumps(vars(row))


def test_a_race_of_one_call_has_no_spread(fake: Peer) -> None:
    x, routings, weights = inputs(calls=1)
    race = Race(Peers(running=[fake]), x, weights)
    race.round(routings)
    (row,) = race.rows(our_median_ms=1.0)
    assert (row.calls, row.spread) == (1, 0.0)


def test_a_peer_that_fails_in_a_race_is_out_with_its_reason(fake: Peer) -> None:
    x, routings, weights = inputs()
    peers = Peers(running=[fake])
    os.kill(fake._process.pid, signal.SIGKILL)
    race = Race(peers, x, weights)
    race.round(routings)
    race.round(routings)
    assert race.rows(our_median_ms=1.0) == []
    assert "SIGKILL" in peers.unavailable["fake"]


def test_q4_0_blocks_hold_the_same_weights() -> None:
    """Dequantised by the definition of block_q4_0: weight j low, j + 16 high, minus 8, times d."""
    source = matrix(4, 64, seed=3)
    blocks, inexact = q4_0(source.packed.numpy()[None], client.bfloat16_bits(source.scale)[None])
    assert inexact == 0
    scale = blocks[0, ..., :2].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[0, ..., 2:] & 15, blocks[0, ..., 2:] >> 4], axis=-1)
    found = ((nibbles.astype(np.float32) - 8) * scale).reshape(4, 64)
    expected = ((source.packed[:, :, None] >> (4 * torch.arange(8))) & 15).view(4, 2, 32) - 8
    expected = (expected * source.scale.float()[:, :, None]).view(4, 64)
    np.testing.assert_array_equal(found, expected.numpy())


def test_scales_that_float16_rounds_are_counted() -> None:
    tiny = torch.tensor([[2.0**-20 * 1.0078125, 1.0]]).bfloat16()
    packed = np.zeros((1, 1, 8), dtype=np.int32)
    _, inexact = q4_0(packed, client.bfloat16_bits(tiny)[None])
    assert inexact == 1


def test_bfloat16_bits_come_back_as_the_same_numbers() -> None:
    x = torch.tensor([0.0, -1.5, 3.3895e38, 1e-40]).bfloat16()
    np.testing.assert_array_equal(widen_bfloat16(client.bfloat16_bits(x)), x.float().numpy())
