"""Replays: what a placement, or a cache of experts, would have done on recorded routing.

Owns the cost of a decoded token and the replays of fixed and of changing placements. Knows no
model, no file and no machine beyond the seconds it is given. Each token is priced as if it were
decoded alone, as on a workstation with one person at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybridk2.placement import Mask
from hybridk2.routing_trace import Ids

Counts = NDArray[np.int64]
Seconds = NDArray[np.float64]

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class StepCost:
    """Seconds of a decoded token: fixed + sum over MoE layers of max(host's share, GPU's share).

    T_layer = max(misses * host, shared + hits * gpu): resident experts run beside those of the
    host. fixed: attention, dense layers, head and all handoffs. host, gpu: one expert there.
    shared: the shared expert. upload: one expert over the bus, while the host reads it once more.
    """

    top_k: int
    fixed: float
    host: float
    gpu: float
    shared: float
    upload: float

    def layer_seconds(self) -> Seconds:
        """Seconds of a layer for 0 .. top_k hits: (top_k + 1,), convex in the hits."""
        hits = np.arange(self.top_k + 1)
        return np.maximum((self.top_k - hits) * self.host, self.shared + hits * self.gpu)

    @property
    def host_is_the_limit(self) -> bool:
        """Whether a hit saves the same time however many there are."""
        return bool(self.shared + (self.top_k - 1) * self.gpu <= self.host)


@dataclass(frozen=True)
class Replay:
    """hit_rate: of all picks, those that were on the GPU. seconds, uploads: per decoded token."""

    hit_rate: float
    seconds: float
    uploads: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


def count_picks(ids: Ids, experts: int) -> Counts:
    """How often each expert was picked. ids: (layers, tokens, top_k). Returns (layers, experts)."""
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in ids])


def hits_histogram(ids: Ids, mask: Mask) -> Counts:
    """How many tokens had 0 .. top_k hits: (layers, top_k + 1). mask: (layers, experts)."""
    top_k = ids.shape[2]
    rows = []
    for layer, resident in zip(ids, mask.astype(np.uint16), strict=True):
        hits = resident[layer[:, 0]]
        for pick in range(1, top_k):
            hits += resident[layer[:, pick]]
        rows.append(np.bincount(hits, minlength=top_k + 1))
    return np.stack(rows)


def priced(histogram: Counts, cost: StepCost) -> Replay:
    """A placement that stays as it is, by its histogram of hits."""
    tokens = histogram[0].sum()
    hits = (histogram * np.arange(cost.top_k + 1)).sum()
    seconds = cost.fixed + float((histogram @ cost.layer_seconds()).sum() / tokens)
    return Replay(float(hits / (histogram.sum() * cost.top_k)), seconds)


def saved_time_gains(ids: Ids, experts: int, cost: StepCost, most: int) -> Seconds:
    """Seconds that each expert saves when it joins those of its layer that save more: (layers,
    experts), summed over the tokens; -1 where it would cost time, or after `most` of a layer.

    A layer's time is convex in a token's hits, so the n-th expert of a layer saves less the more
    often it works beside those already there: the greedy order gives falling gains, and the largest
    of all layers together are again greedy. Where the host is always the limit this is a count.
    """
    saved = -np.diff(cost.layer_seconds())  # by one more hit, at 0 .. top_k - 1 hits
    if cost.host_is_the_limit:
        return saved[0] * count_picks(ids, experts)
    return np.stack([_layer_gains(layer, experts, saved, most) for layer in ids])


def _layer_gains(ids: Ids, experts: int, saved: Seconds, most: int) -> Seconds:
    """ids: (tokens, top_k). The greedy order of one layer, as gains."""
    tokens, top_k = ids.shape
    order = np.argsort(ids, axis=None, kind="stable")
    counts = np.bincount(ids.ravel(), minlength=experts)
    ends = np.cumsum(counts)
    hits = np.zeros(tokens, np.int64)
    left = saved[0] * counts
    gains = np.full(experts, -1.0)
    changes = np.append(np.diff(saved), 0.0)  # of what a hit saves, by one hit more
    ceiling = np.inf
    for _ in range(min(most, experts)):
        best = int(left.argmax())
        if left[best] < 0:
            break
        ceiling = gains[best] = min(left[best], ceiling)
        mine = order[ends[best] - counts[best] : ends[best]] // top_k
        change = changes[hits[mine]]
        hits[mine] += 1
        changed = change != 0
        left += np.bincount(
            ids[mine[changed]].ravel(), np.repeat(change[changed], top_k), minlength=experts
        )
        left[best] = -np.inf
    return gains


@dataclass(frozen=True)
class Windows:
    """Stretches of a trace that a cache is replayed on, side by side: all of one length, by the
    tokens they begin with, ascending."""

    starts: tuple[int, ...]
    length: int

    @classmethod
    def spread(cls, tokens: int, most: int, length: int) -> Windows:
        """Up to `most` windows of at least so many tokens, evenly over a trace; the whole trace
        where it is shorter than two."""
        count = max(min(most, tokens // length), 1)
        length = length if count == most else tokens // count
        starts = np.linspace(0, tokens - length, count).astype(int)
        return cls(tuple(starts.tolist()), length)

    @property
    def tokens(self) -> int:
        return len(self.starts) * self.length

    def cut(self, ids: Ids) -> Ids:
        """ids: (layers, tokens, top_k). Returns (windows x layers, length, top_k)."""
        return np.concatenate([ids[:, start : start + self.length] for start in self.starts])

    def joined(self, counts: Counts) -> Counts:
        """counts: (windows x layers, length). Returns (layers, tokens)."""
        by_window = counts.reshape(len(self.starts), -1, self.length)
        return by_window.swapaxes(0, 1).reshape(-1, self.tokens)


def replay_lru(ids: Ids, start: Mask, cost: StepCost, windows: Windows | None = None) -> Replay:
    """Each layer keeps the experts picked last. start: what is there before the trace, and how
    many. windows: replay these only, None for all; what was picked before them counts."""
    windows = windows or Windows((0,), ids.shape[1])
    never = _order_of_never_picked(start)

    def keys(counts: Counts, last: Counts) -> Counts:
        return np.where(counts > 0, last, never)

    def renewed(picks: Counts, old: Counts) -> Counts:
        return np.broadcast_to(picks, old.shape)

    return _priced_cache(*_replay_by_history(ids, start, windows, keys, renewed), cost)


def replay_lfu(ids: Ids, start: Mask, cost: StepCost, windows: Windows | None = None) -> Replay:
    """Each layer keeps those picked most often so far; a new one comes once it leads. For the rest
    see replay_lru."""
    _, tokens, top_k = ids.shape
    windows = windows or Windows((0,), tokens)
    never = _order_of_never_picked(start)
    # Of two with as many picks the one stays that had them first: count * step - last pick.
    step = tokens * top_k - int(never.min())

    def keys(counts: Counts, last: Counts) -> Counts:
        return np.where(counts > 0, counts * step - last, never)

    def renewed(picks: Counts, old: Counts) -> Counts:
        return (-(-old // step) + 1) * step - picks

    return _priced_cache(*_replay_by_history(ids, start, windows, keys, renewed), cost)


def replay_belady(ids: Ids, start: Mask, cost: StepCost, windows: Windows | None = None) -> Replay:
    """Each layer keeps those picked again soonest, knowing the future: no cache with as many
    experts in each layer has more hits. Its first fill, of each window, is free, and so are its
    uploads."""
    windows = windows or Windows((0,), ids.shape[1])
    ids, start = windows.cut(ids), np.tile(start, (len(windows.starts), 1))
    following, first = _next_use(ids, start.shape[1])
    fill = np.zeros(start.shape, bool)
    for row, soonest in enumerate(np.argsort(first, axis=1, kind="stable")):
        fill[row, soonest[: start[row].sum()]] = True
    found, _ = _replay_cache(ids, fill, -first, lambda step, old: -following[:, step])
    hits = windows.joined(found)
    return _priced_cache(hits, np.zeros_like(hits), cost)


def _order_of_never_picked(start: Mask) -> Counts:
    """Keys of experts before their first pick, all of them negative and different: those that are
    there at the start by their ids, then the others. start: (layers, experts)."""
    ids = np.arange(start.shape[1])
    return np.where(start, -1 - ids, -1 - len(ids) - ids)


def _replay_by_history(
    ids: Ids,
    start: Mask,
    windows: Windows,
    keys: Callable[[Counts, Counts], Counts],
    renewed: Callable[[Counts, Counts], Counts],
) -> tuple[Counts, Counts]:
    """Hits and uploads (layers, tokens of the windows) of a cache that keeps the experts of the
    highest keys, which only a pick changes, and only upwards.

    So what it holds before a window is known without a replay up to there: an expert that is
    neither held nor picked has as many above it as the cache holds, and they only rise. keys: from
    picks so far and the number of the last one, both (layers, experts), to keys, no two of a layer
    the same. renewed: from the numbers of picks and the picked experts' keys to their new ones.
    """
    layers, _, top_k = ids.shape
    histories = [keys(*history) for history in _histories(ids, start.shape[1], windows.starts)]
    key = np.concatenate(histories)
    sizes = np.tile(start.sum(axis=1, keepdims=True), (len(windows.starts), 1))
    rank = np.argsort(np.argsort(-key, axis=1), axis=1)
    origin = np.repeat(np.array(windows.starts) * top_k, layers)[:, None] + np.arange(top_k)
    hits, uploads = _replay_cache(
        windows.cut(ids),
        rank < sizes,
        key,
        lambda step, old: renewed(origin + step * top_k, old),
    )
    return windows.joined(hits), windows.joined(uploads)


def _histories(ids: Ids, experts: int, starts: Sequence[int]) -> Iterator[tuple[Counts, Counts]]:
    """Before each of these tokens, ascending: how often each expert was picked, and the number of
    its last pick; (layers, experts) both. Picks are numbered through the trace."""
    layers, _, top_k = ids.shape
    counts = np.zeros((layers, experts), np.int64)
    last = np.zeros((layers, experts), np.int64)
    begin = 0
    for end in starts:
        numbers = np.arange(begin * top_k, end * top_k)
        for layer in range(layers):
            picks = ids[layer, begin:end].ravel()
            counts[layer] += np.bincount(picks, minlength=experts)
            last[layer, picks] = numbers  # of several, the last one stays
        yield counts.copy(), last.copy()
        begin = end


def _replay_cache(
    ids: Ids, start: Mask, priority: Counts, renewed: Callable[[int, Counts], Counts]
) -> tuple[Counts, Counts]:
    """Hits and uploads: (rows, tokens) each. Step by step, all rows at once; a row is a layer, or a
    layer in a window.

    start: (rows, experts), and as many experts as a row may have. priority: (rows, experts), of
    which each row keeps the highest, among what it has and what the token picked.
    renewed(step, old): the priorities (rows, top_k) of what the token picked.
    """
    layers, experts = start.shape
    sizes = start.sum(axis=1, keepdims=True)
    layer = np.arange(layers)[:, None]
    nothing = experts  # an empty slot: one more expert, of the lowest priority
    resident = np.pad(start, ((0, 0), (0, 1)))
    priority = np.pad(priority, ((0, 0), (0, 1)), constant_values=-_NEVER)
    columns = np.arange(int(sizes.max()))
    slots = np.argsort(~resident, axis=1, kind="stable")[:, : len(columns)]
    slots[columns >= sizes] = nothing
    hits = np.empty(ids.shape[:2], np.int64)
    uploads = np.empty(ids.shape[:2], np.int64)
    for step in range(ids.shape[1]):
        picked = ids[:, step].astype(np.int64)
        known = resident[layer, picked]
        hits[:, step] = known.sum(axis=1)
        priority[layer, picked] = renewed(step, priority[layer, picked])
        candidates = np.concatenate([slots, np.where(known, nothing, picked)], axis=1)
        order = np.argsort(-priority[layer, candidates], axis=1, kind="stable")
        slots = candidates[layer, order[:, : len(columns)]]
        slots[columns >= sizes] = nothing
        resident[:] = False
        resident[layer, slots] = True
        resident[:, nothing] = False
        uploads[:, step] = (resident[layer, picked] & ~known).sum(axis=1)
    return hits, uploads


def _priced_cache(hits: Counts, uploads: Counts, cost: StepCost) -> Replay:
    """hits, uploads: (layers, tokens). An upload takes the bus, and reads the host's memory as a
    miss does."""
    host = (cost.top_k - hits + uploads) * cost.host
    gpu = cost.shared + hits * cost.gpu
    layers = np.maximum(np.maximum(host, gpu), uploads * cost.upload)
    seconds = cost.fixed + float(layers.sum(axis=0).mean())
    hit_rate = float(hits.mean() / cost.top_k)
    return Replay(hit_rate, seconds, float(uploads.sum(axis=0).mean()))


def _next_use(ids: Ids, experts: int) -> tuple[Counts, Counts]:
    """For each pick the token of the expert's next one (layers, tokens, top_k), and for each expert
    that of its first (layers, experts); _NEVER where there is none."""
    layers, tokens, top_k = ids.shape
    following = np.full((layers, tokens * top_k), _NEVER)
    first = np.full((layers, experts), _NEVER)
    for layer in range(layers):
        flat = ids[layer].ravel()
        order = np.argsort(flat, kind="stable")
        same = flat[order[:-1]] == flat[order[1:]]
        following[layer, order[:-1][same]] = order[1:][same] // top_k
        known, where = np.unique(flat, return_index=True)
        first[layer, known] = where // top_k
    return following.reshape(ids.shape), first
