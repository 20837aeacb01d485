"""Replays: what a placement, or a cache of experts, would have done on recorded routing.

Owns the cost of a decoded token and the replays of fixed and of changing placements. Knows no
model, no file and no machine beyond the seconds it is given. Each token is priced as if it were
decoded alone, as on a workstation with one person at it.
"""

from __future__ import annotations

from collections.abc import Callable
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


def replay_lru(ids: Ids, start: Mask, cost: StepCost) -> Replay:
    """Each layer keeps the experts picked last. start: what is there before, and how many."""
    no_use = np.zeros(start.shape, np.int64)
    cache = _replay_cache(ids, start, no_use, lambda step, uses: np.full_like(uses, step + 1))
    return _priced_cache(*cache, cost)


def replay_lfu(ids: Ids, start: Mask, cost: StepCost) -> Replay:
    """Each layer keeps those picked most often so far; a new one comes once it leads."""
    no_use = np.zeros(start.shape, np.int64)
    cache = _replay_cache(ids, start, no_use, lambda step, uses: uses + 1)
    return _priced_cache(*cache, cost)


def replay_belady(ids: Ids, start: Mask, cost: StepCost) -> Replay:
    """Each layer keeps those picked again soonest, knowing the future: no cache with as many
    experts in each layer has more hits. Its first fill is free, and so are its uploads."""
    following, first = _next_use(ids, start.shape[1])
    fill = np.zeros(start.shape, bool)
    for layer, soonest in enumerate(np.argsort(first, axis=1, kind="stable")):
        fill[layer, soonest[: start[layer].sum()]] = True
    hits, uploads = _replay_cache(ids, fill, -first, lambda step, uses: -following[:, step])
    return _priced_cache(hits, np.zeros_like(uploads), cost)


def _replay_cache(
    ids: Ids, start: Mask, priority: Counts, renewed: Callable[[int, Counts], Counts]
) -> tuple[Counts, Counts]:
    """Hits and uploads: (layers, tokens) each. Step by step, all layers at once.

    start: (layers, experts), and as many experts as a layer may have. priority: (layers, experts),
    of which each layer keeps the highest, among what it has and what the token picked.
    renewed(step, old): the priorities (layers, top_k) of what the token picked.
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
    """An upload takes the bus, and reads the host's memory as a miss does."""
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
