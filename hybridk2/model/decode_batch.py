"""The inputs of a step of decoding, in tensors that stay where they are.

A recorded step reads these and nothing else, so a batch of so many rows is made once and filled
anew for each step. Owns the way from sequences to tensors; does no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.experts.router import PendingExperts
from hybridk2.kv_cache import CacheSequence, PagedLatentCache


class _Input:
    """A tensor on the device with its twin on the host, through which it is filled."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.host = device.host_buffer(shape, dtype)
        self.tensor = device.place(self.host)

    def send(self, device: Device) -> None:
        if self.tensor is not self.host:
            device.copy(self.tensor, self.host)


class DecodeBatch:
    """One new token of each of up to `rows` sequences of one cache; rows beyond them are padding.

    rows: of every tensor. sequences: whose tokens they are, in order. On the device:
    hidden: (rows, hidden), the tokens' embeddings, zero in padding.
    positions: (rows,) int32. lengths: (rows,) int32, tokens that attention sees, the new one
    included; 0 in padding. in_use: (rows, 1) bool. page_table: (rows, pages) int32, each
    sequence's pages in order. write_rows: (rows,) int64, where the cache takes the new latents.
    picks: (MoE layers, rows, top_k) int32, the experts that a step picked, filled by the step.
    deferred: while a step is enqueued, what a layer left to the next one; then None.
    """

    def __init__(
        self,
        config: K2Config,
        rows: int,
        cache: PagedLatentCache,
        device: Device,
        dtype: torch.dtype,
    ) -> None:
        self.rows = rows
        self.cache = cache
        self.sequences: tuple[CacheSequence, ...] = ()
        self.deferred: PendingExperts | None = None
        self._device = device
        self._hidden = _Input(device, (rows, config.hidden_size), dtype)
        self._positions = _Input(device, (rows,), torch.int32)
        self._lengths = _Input(device, (rows,), torch.int32)
        self._in_use = _Input(device, (rows, 1), torch.bool)
        self._page_table = _Input(device, (rows, cache.num_pages), torch.int32)
        self._write_rows = _Input(device, (rows,), torch.int64)
        # How many pages of which sequence each row of the table holds: pages are only ever added.
        self._known_pages: list[tuple[CacheSequence | None, int]] = [(None, 0)] * rows
        self.hidden, self.positions = self._hidden.tensor, self._positions.tensor
        self.lengths, self.in_use = self._lengths.tensor, self._in_use.tensor
        self.page_table, self.write_rows = self._page_table.tensor, self._write_rows.tensor
        self.picks = device.place(
            torch.zeros(config.num_moe_layers, rows, config.num_experts_per_tok, dtype=torch.int32)
        )

    def fill(self, embedded: Tensor, sequences: Sequence[CacheSequence]) -> None:
        """Make it the inputs of the next step, once the step before has been waited for.

        embedded: (tokens, hidden) on the host, up to `rows` of them. sequences: as many, each with
        room for one more token (CacheSequence.reserve).
        """
        tokens = len(sequences)
        assert tokens == embedded.shape[0] <= self.rows, f"{tokens} tokens, {self.rows} rows"
        self.sequences = tuple(sequences)
        self.deferred = None
        self._hidden.host[:tokens] = embedded
        self._hidden.host[tokens:] = 0
        lengths = [sequence.length for sequence in sequences]
        padding = [0] * (self.rows - tokens)
        nobodys = [self.cache.nobodys_row] * len(padding)
        _set(self._positions.host, lengths + padding)
        _set(self._lengths.host, [length + 1 for length in lengths] + padding)
        _set(self._write_rows.host, [sequence.next_row for sequence in sequences] + nobodys)
        self._in_use.host[:tokens] = True
        self._in_use.host[tokens:] = False
        inputs = [self._hidden, self._positions, self._lengths, self._in_use, self._write_rows]
        if sum(self._set_pages(row, sequence) for row, sequence in enumerate(sequences)):
            inputs.append(self._page_table)
        for each in inputs:
            each.send(self._device)

    def _set_pages(self, row: int, sequence: CacheSequence) -> bool:
        """Write down the pages of a row's sequence that are new. Returns whether there were any."""
        pages = sequence.page_ids
        owner, known = self._known_pages[row]
        if owner is not sequence:
            known = 0
        if known == len(pages):
            return False
        _set(self._page_table.host[row, known : len(pages)], pages[known:])
        self._known_pages[row] = (sequence, len(pages))
        return True


def _set(target: Tensor, values: Sequence[int]) -> None:
    target.copy_(torch.tensor(values, dtype=target.dtype))
