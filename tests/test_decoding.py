"""A recorded step of decoding computes what one run as it is computes, whatever its inputs are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridk2.checkpoint import Checkpoint
from hybridk2.device import CpuDevice
from hybridk2.errors import EngineError
from hybridk2.experts.host import HostExperts
from hybridk2.experts.loading import load_experts
from hybridk2.experts.router import ThreadRouter
from hybridk2.kv_cache import PAGE_TOKENS, CacheSequence, PagedLatentCache
from hybridk2.model.k2 import K2Model
from hybridk2.model.loading import load_model
from hybridk2.model.moe import RoutedExperts
from tests.recorded_device import EnqueuedRouter, RecordedDevice, mix_pages

CACHE_TOKENS = 32 * PAGE_TOKENS


class Side:
    """A model over a cache of its own, and sequences in it."""

    def __init__(self, model: K2Model, cache: PagedLatentCache) -> None:
        self.model = model
        self.cache = cache

    def read(self, ids: Sequence[int]) -> CacheSequence:
        sequence = self.cache.open([*ids, 0], repeatable=False)
        start = sequence.length
        sequence.reserve(len(ids) - start)
        tokens = torch.tensor(ids[start:])
        with torch.inference_mode():
            self.model.forward(tokens, torch.arange(start, len(ids)), sequence)
        return sequence

    def decode(
        self, ids: Sequence[int], sequences: Sequence[CacheSequence], *, advance: bool = True
    ) -> Tensor:
        for sequence in sequences:
            sequence.reserve(1)
        with torch.inference_mode():
            logits = self.model.decode(ids, sequences, rows_are_independent=False)
        for token, sequence in zip(ids, sequences, strict=True):
            if advance:
                sequence.advance([token])
        return logits.clone()


class Pair:
    """The same weights twice: recorded steps, and steps on the host as they are."""

    def __init__(self, folder: Path, deferred: int = 0) -> None:
        self.device = RecordedDevice()
        with Checkpoint.open(folder) as checkpoint:
            config = checkpoint.config
            self.experts = HostExperts.of_model(
                config,
                threads=1,
            )
            load_experts(checkpoint, self.experts, lambda progress: None)
            mix = partial(mix_pages, scale=config.softmax_scale, rank=config.kv_lora_rank)
            self.router = EnqueuedRouter(self.experts, self.device)
            recorded = load_model(
                checkpoint,
                self.experts,
                self.device,
                torch.float32,
                routed=RoutedExperts(self.router, deferred=deferred),
                paged_mix=mix,
            )
            plain = load_model(
                checkpoint,
                self.experts,
                CpuDevice(),
                torch.float32,
                routed=RoutedExperts(ThreadRouter(self.experts, CpuDevice()), deferred=deferred),
            )
        self.config = config
        self.recorded = Side(recorded, self._cache(self.device))
        self.plain = Side(plain, self._cache(CpuDevice()))

    def _cache(self, device: CpuDevice) -> PagedLatentCache:
        cache = PagedLatentCache(self.config, CACHE_TOKENS, 128, device, torch.float32)
        for layer in range(self.config.num_hidden_layers):
            cache.latents(layer).fill_(float("nan"))  # nothing may be read before it is written
        return cache

    def ids(self, tokens: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, (tokens,), generator=generator).tolist()


@pytest.fixture
def pair(small_checkpoint: Path) -> Iterator[Pair]:
    made = Pair(small_checkpoint)
    yield made
    made.experts.close()


def assert_close(found: Tensor, wanted: Tensor, where: str) -> None:
    # fp32 sums in another order over logits of order 1: a few hundred ulps at most.
    difference = float((found - wanted).abs().max())
    assert difference <= 2e-4 * float(wanted.abs().max()), f"{where}: off by {difference:.1e}"
    assert torch.equal(found.argmax(-1), wanted.argmax(-1)), where


def test_replays_follow_other_tokens_lengths_pages_and_numbers_of_sequences(pair: Pair) -> None:
    lengths = (1, 63, 64, 65, 130, 3, 200, 17)
    prompts = [pair.ids(tokens, seed) for seed, tokens in enumerate(lengths)]
    mine = [pair.recorded.read(ids) for ids in prompts]
    theirs = [pair.plain.read(ids) for ids in prompts]
    generator = torch.Generator().manual_seed(5)
    for step in range(40):
        rows = step % 8 + 1
        chosen = torch.randperm(8, generator=generator)[:rows].tolist()
        tokens = pair.ids(rows, 100 + step)
        found = pair.recorded.decode(tokens, [mine[index] for index in chosen])
        wanted = pair.plain.decode(tokens, [theirs[index] for index in chosen])
        assert_close(found, wanted, f"step {step}, sequences {chosen}")
    assert pair.device.recorded == 4, "one for each of 1, 2, 4 and 8 rows"
    assert pair.device.replayed == 40 - 4, "all but the first of each"
    assert pair.recorded.model.experts_read == pair.plain.model.experts_read


def test_deferred_experts_are_recorded_as_well(small_checkpoint: Path) -> None:
    pair = Pair(small_checkpoint, deferred=1)
    prompt = pair.ids(40, 7)
    mine, theirs = pair.recorded.read(prompt), pair.plain.read(prompt)
    for token in range(6):
        found = pair.recorded.decode([token], [mine])
        assert_close(found, pair.plain.decode([token], [theirs]), f"token {token}")
    assert pair.device.replayed == 5
    pair.experts.close()


def test_a_recorded_step_tells_the_picks_of_its_tokens_alone(pair: Pair) -> None:
    prompts = [pair.ids(10, seed) for seed in range(3)]
    mine = [pair.recorded.read(ids) for ids in prompts]
    theirs = [pair.plain.read(ids) for ids in prompts]
    told: dict[str, list[tuple[int, list[list[int]]]]] = {"mine": [], "theirs": []}

    def keep(side: str, slot: int, picks: Tensor) -> None:
        told[side].append((slot, picks.sort(dim=-1).values.tolist()))

    pair.recorded.model.watch_routing(partial(keep, "mine"))
    pair.plain.model.watch_routing(partial(keep, "theirs"))
    for step in range(4):
        tokens = pair.ids(3, step)
        pair.recorded.decode(tokens, mine)
        pair.plain.decode(tokens, theirs)
    assert told["mine"] == told["theirs"]
    assert len(told["mine"]) == 4 * pair.config.num_moe_layers


def test_a_failed_step_leaves_the_next_one_as_it_was(pair: Pair) -> None:
    sequence = pair.recorded.read(pair.ids(70, 1))
    for _ in range(3):
        wanted = pair.recorded.decode([5], [sequence], advance=False)
    pair.router.failing = EngineError("injected")
    with pytest.raises(EngineError, match="injected"):
        pair.recorded.decode([5], [sequence], advance=False)
    assert torch.equal(pair.recorded.decode([5], [sequence], advance=False), wanted)


@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("full")])
def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_that_is_said_once(
    pair: Pair, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    pair.device.refuse = error
    prompt = pair.ids(66, 2)
    mine, theirs = pair.recorded.read(prompt), pair.plain.read(prompt)
    with caplog.at_level("WARNING", "hybridk2"):
        for token in range(4):
            found = pair.recorded.decode([token], [mine])
            assert_close(found, pair.plain.decode([token], [theirs]), f"token {token}")
    (record,) = caplog.records
    assert "recording 1 rows failed" in record.getMessage()
    assert (pair.device.recorded, pair.device.replayed) == (0, 0)


def test_a_value_that_is_read_back_cannot_be_recorded() -> None:
    device = RecordedDevice()
    values = torch.ones(3)
    with pytest.raises(RuntimeError, match="reads back"):
        device.record(lambda: print(values.sum().item()))
    with pytest.raises(RuntimeError, match="to_host"):
        device.record(lambda: print(device.to_host(values)))


def test_a_replay_reads_tensors_and_nothing_else() -> None:
    """The fake itself: a Python value of the recording stays, a tensor's is read anew."""
    device = RecordedDevice()
    source, target, factor = torch.ones(2), torch.zeros(2), 3.0

    def step() -> None:
        target.copy_(source * factor)

    replay = device.record(step)
    factor = 7.0
    source.fill_(2.0)
    replay()
    assert target.tolist() == [6.0, 6.0]
