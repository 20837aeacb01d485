"""Steps of decoding: one token further for several sequences, recorded where that pays.

Owns the batches, one for each number of rows, and their recorded steps. A step begins with its
inputs on their way to the device and ends with logits and picks on the host; between them nothing
is read back. What a step computes is the model's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.experts.router import AsyncRouter
from hybridk2.kv_cache import CacheSequence, PagedLatentCache
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.timeline import Timeline

logger = logging.getLogger(__name__)

Compute = Callable[[DecodeBatch, Timeline | None], Tensor]


class _Step:
    """All that belongs to one number of rows."""

    def __init__(self, batch: DecodeBatch) -> None:
        self.batch = batch
        self.logits: Tensor | None = None  # of the last run; a recorded step's stay where they are
        self.replay: Callable[[], None] | None = None


class DecodeSteps:
    """Runs a model's steps over one cache."""

    def __init__(
        self,
        config: K2Config,
        compute: Compute,
        router: AsyncRouter,
        cache: PagedLatentCache,
        device: Device,
        dtype: torch.dtype,
    ) -> None:
        """compute: enqueues a batch's step, fills its picks and returns logits (rows, vocab) fp32.

        router: whose experts the step uses, told where it begins and ends.
        """
        self.cache = cache
        self._config = config
        self._compute = compute
        self._router = router
        self._device = device
        self._dtype = dtype
        self._steps: dict[int, _Step] = {}
        self._failed = False  # the last step; its router has not been reset yet
        self._records = device.replays_steps and router.records

    def run(
        self,
        embedded: Tensor,
        sequences: Sequence[CacheSequence],
        rows: int,
        timeline: Timeline | None,
    ) -> tuple[Tensor, Tensor]:
        """One step. See DecodeBatch.fill for embedded and sequences.

        Returns on the host, until the next step: logits (tokens, vocab) fp32, and picks (MoE
        layers, tokens, top_k) int32. Raises what went wrong; the next step may be run then.
        """
        tokens = len(sequences)
        if self._failed:
            self._reset()
        if rows not in self._steps:
            batch = DecodeBatch(self._config, rows, self.cache, self._device, self._dtype)
            self._steps[rows] = _Step(batch)
        step = self._steps[rows]
        step.batch.fill(embedded, sequences)
        if timeline is not None:
            timeline.mark("embedding")
        # The first step of its rows runs as it is, which compiles what it needs; the second is
        # recorded, before the host's workers look for it, and it and all later ones are replayed.
        if step.replay is None and self._records and step.logits is not None:
            self._record(step)
        try:
            self._router.begin_step()
            self._advance(step, timeline)
            assert step.logits is not None
            logits = self._device.to_host(step.logits[:tokens])
            picks = self._device.to_host(step.batch.picks[:, :tokens])
            self._device.wait()
            self._router.end_step()
        except BaseException:
            self._failed = True
            raise
        return logits, picks

    def _reset(self) -> None:
        """Get over a step that failed. Raises EngineError while the host's workers are still in it;
        the next step tries again."""
        self._device.wait()
        self._router.reset()
        self._failed = False

    def _advance(self, step: _Step, timeline: Timeline | None) -> None:
        if step.replay is None:
            step.logits = self._compute(step.batch, timeline)
            return
        step.replay()
        if timeline is not None:
            timeline.mark("recorded step")

    def _record(self, step: _Step) -> None:
        def compute() -> None:
            step.logits = self._compute(step.batch, None)

        try:
            step.replay = self._device.record(compute)
        except RuntimeError as error:
            self._records = False
            logger.warning(
                "steps of decoding are not recorded but enqueued one operation at a time, which is "
                "slower: recording %d rows failed: %s",
                step.batch.rows,
                error,
            )
