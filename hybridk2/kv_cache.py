"""Paged cache of attention latents, with content-hashed reuse of whatever was computed before.

Owns the memory of all layers' latents, the pages it is cut into, and who holds which. A page that
is full is known by the hash of all tokens up to its end; a new sequence starts with the pages of
its longest known prefix and, inside the next page, with a copy of the rows that still agree. Pages
that nobody holds stay known until their memory is needed, least recently used first.

Two kinds of reuse. By default any known page serves. A *repeatable* sequence takes only pages that
were computed as a cold start would compute them, in whole aligned chunks on top of such pages: a
matrix product over another number of rows may round differently, so only these make the same
request give the same bits, whatever was cached before it. Knows nothing of attention's arithmetic.
"""

from __future__ import annotations

import array
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.errors import EngineError

PAGE_TOKENS = 64  # 64 x 576 bf16 values: 72 KB per layer of K2, 4.4 MB over its 61 layers

_ROOT = b""


@dataclass
class _Page:
    holders: int = 0
    known: bool = False
    repeatable: bool = False
    parent: bytes = _ROOT  # hash of everything before the page
    digest: bytes = _ROOT  # hash up to its end; only full pages are known by it
    tokens: tuple[int, ...] = ()


def _as_it_is(latents: Tensor) -> Tensor:
    return latents


@dataclass(frozen=True)
class LatentFormat:
    """How a token's latents lie in the cache: `width` values of `dtype` in each layer.

    encode: (..., latent_dim) in the activations' dtype to (..., width) of dtype. decode: back.
    """

    dtype: torch.dtype
    width: int
    encode: Callable[[Tensor], Tensor] = _as_it_is
    decode: Callable[[Tensor], Tensor] = _as_it_is

    @property
    def is_plain(self) -> bool:
        """Whether latents lie in the cache as attention makes them."""
        return self.encode is _as_it_is

    @classmethod
    def plain(cls, config: K2Config, dtype: torch.dtype) -> LatentFormat:
        """As attention makes them."""
        return cls(dtype, config.latent_dim)

    def bytes_for(self, config: K2Config, capacity_tokens: int) -> int:
        """What a cache of that capacity takes once all of it is in use."""
        tokens = (_pages_for(capacity_tokens) + 1) * PAGE_TOKENS
        return config.num_hidden_layers * tokens * self.width * self.dtype.itemsize


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array.array("q", tokens).tobytes(), digest_size=16).digest()


def _shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


class PagedLatentCache:
    """Latents of every layer for up to `capacity_tokens` tokens over all sequences."""

    def __init__(
        self,
        config: K2Config,
        capacity_tokens: int,
        chunk_tokens: int,
        device: Device,
        dtype: torch.dtype,
        latent_format: LatentFormat | None = None,
    ) -> None:
        """chunk_tokens: the aligned chunk that prefill computes; a multiple of PAGE_TOKENS. dtype:
        of activations. latent_format: None keeps latents as attention makes them."""
        assert chunk_tokens % PAGE_TOKENS == 0, f"{chunk_tokens=} is not whole pages"
        latent_format = latent_format or LatentFormat.plain(config, dtype)
        num_pages = _pages_for(capacity_tokens)
        self.capacity_tokens = num_pages * PAGE_TOKENS
        self.chunk_tokens = chunk_tokens
        # Not initialised: a page costs memory from its first use on. The last one is nobody's.
        self._latents = torch.empty(
            (config.num_hidden_layers, num_pages + 1, PAGE_TOKENS, latent_format.width),
            dtype=latent_format.dtype,
            device=device.torch_device,
        )
        self.num_pages = num_pages
        self.latent_format = latent_format
        self._pages = [_Page() for _ in range(num_pages)]
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, held by nobody, oldest first
        self._by_digest: dict[bytes, int] = {}
        self._children: dict[bytes, list[int]] = {}  # known pages by the hash before them

    @property
    def nobodys_row(self) -> int:
        """Where `write_rows` puts what is to be forgotten."""
        return self.num_pages * PAGE_TOKENS

    def latents(self, layer: int) -> Tensor:
        """One layer's memory: (pages, PAGE_TOKENS, width of the format), by sequences' page ids."""
        return self._latents[layer]

    def write_rows(self, layer: int, rows: Tensor, latents: Tensor) -> None:
        """Store one layer's latents of single tokens, by indices alone.

        rows: (tokens,) int64 on the device, CacheSequence.next_row of each token's sequence.
        latents: (tokens, latent_dim).
        """
        encoded = self.latent_format.encode(latents)
        self.rows(layer).index_copy_(0, rows, encoded)

    def rows(self, layer: int) -> Tensor:
        """The memory that `write_rows` writes to: (tokens of all pages, width of the format)."""
        return self._latents[layer].flatten(0, 1)

    @property
    def available_tokens(self) -> int:
        """Tokens that new pages can still take, counting pages that may be forgotten."""
        return (len(self._free) + len(self._idle)) * PAGE_TOKENS

    def open(self, token_ids: Sequence[int], *, repeatable: bool) -> CacheSequence:
        """A sequence that starts with what is known of token_ids, all but the last at most.

        The last token is always left to compute, because its logits are what a caller wants.
        repeatable: reuse only what a cold start would have computed bit for bit.
        """
        sequence = CacheSequence(self)
        for page_id in self._known_pages(token_ids, repeatable):
            self._hold(page_id)
            sequence._append_page(page_id, self._pages[page_id])
        if not repeatable:
            self._reuse_part_of_a_page(sequence, token_ids[:-1])
        return sequence

    def known_tokens(self, token_ids: Sequence[int], *, repeatable: bool) -> int:
        """How many leading tokens `open` would take from whole pages."""
        return len(self._known_pages(token_ids, repeatable)) * PAGE_TOKENS

    def shared_tokens(self, token_ids: Sequence[int], *, repeatable: bool) -> int:
        """Of the tokens that `open` would take from whole pages, those that somebody holds now, so
        that holding them too takes no memory."""
        known = self._known_pages(token_ids, repeatable)
        return sum(PAGE_TOKENS for page_id in known if self._pages[page_id].holders)

    def _known_pages(self, token_ids: Sequence[int], repeatable: bool) -> list[int]:
        """Pages of the longest known prefix without the last token, whole chunks if repeatable."""
        found: list[int] = []
        digest = _ROOT
        for end in range(PAGE_TOKENS, len(token_ids), PAGE_TOKENS):
            tokens = tuple(token_ids[end - PAGE_TOKENS : end])
            digest = _digest(digest, tokens)
            page_id = self._by_digest.get(digest)
            if page_id is None:
                break
            page = self._pages[page_id]
            # The hash names the content; the comparison makes a collision harmless too.
            if page.tokens != tokens or (repeatable and not page.repeatable):
                break
            found.append(page_id)
        if repeatable:
            del found[len(found) - len(found) % (self.chunk_tokens // PAGE_TOKENS) :]
        return found

    def _reuse_part_of_a_page(self, sequence: CacheSequence, token_ids: Sequence[int]) -> None:
        rest = token_ids[sequence.length : sequence.length + PAGE_TOKENS]
        candidates = self._children.get(sequence._digest, [])
        if not rest or not candidates:
            return
        best = max(candidates, key=lambda page: _shared_length(self._pages[page].tokens, rest))
        rows = _shared_length(self._pages[best].tokens, rest)
        if rows == 0:
            return
        self._hold(best)  # or the new page might take its memory
        if not self._free and not self._idle:
            self._release(best)
            return
        page_id = self._allocate()
        self._release(best)
        self._latents[:, page_id, :rows] = self._latents[:, best, :rows]
        sequence._pages.append(page_id)
        sequence.token_ids.extend(rest[:rows])

    def _hold(self, page_id: int) -> None:
        self._pages[page_id].holders += 1
        self._idle.pop(page_id, None)

    def _release(self, page_id: int) -> None:
        page = self._pages[page_id]
        page.holders -= 1
        if page.holders:
            return
        if page.known:
            self._idle[page_id] = None
        else:
            self._free.append(page_id)

    def _allocate(self) -> int:
        if not self._free:
            if not self._idle:
                raise EngineError(
                    f"the latent cache is full: all of its {self.capacity_tokens} tokens belong to "
                    "running requests. Wait for one to end, or give the cache more tokens"
                )
            self._forget(next(iter(self._idle)))
        page_id = self._free.pop()
        self._pages[page_id] = _Page(holders=1)
        return page_id

    def _register(
        self, page_id: int, parent: bytes, tokens: tuple[int, ...], repeatable: bool
    ) -> None:
        """Make a page findable. Of two pages with the same tokens the repeatable one stays."""
        page = self._pages[page_id]
        digest = _digest(parent, tokens) if len(tokens) == PAGE_TOKENS else _ROOT
        siblings = self._children.setdefault(parent, [])
        for other_id in list(siblings):
            other = self._pages[other_id]
            if other.tokens == tokens and (other.repeatable or not repeatable):
                return
            if other.tokens == tokens or (
                other.digest == _ROOT and other.tokens == tokens[: len(other.tokens)]
            ):
                self._forget(other_id)
        page.known, page.repeatable, page.parent = True, repeatable, parent
        page.tokens, page.digest = tokens, digest
        self._children.setdefault(parent, []).append(page_id)
        if digest != _ROOT:
            self._by_digest[digest] = page_id

    def _forget(self, page_id: int) -> None:
        """Make a page unfindable; its memory is free once nobody holds it."""
        page = self._pages[page_id]
        if page.digest != _ROOT:
            del self._by_digest[page.digest]
        siblings = self._children[page.parent]
        siblings.remove(page_id)
        if not siblings:
            del self._children[page.parent]
        page.known = False
        if page_id in self._idle:
            del self._idle[page_id]
            self._free.append(page_id)


@dataclass(eq=False)
class CacheSequence:
    """The cached past of one sequence, and the room that its next tokens are written to."""

    _cache: PagedLatentCache
    token_ids: list[int] = field(default_factory=list)
    _pages: list[int] = field(default_factory=list)
    _digest: bytes = _ROOT  # hash of the full pages so far
    _hashed: int = 0  # full pages in that hash
    _repeatable: int = 0  # leading tokens computed as a cold start computes them
    _written: int = 0
    _closed: bool = False

    @property
    def length(self) -> int:
        """Tokens whose latents every layer holds."""
        return len(self.token_ids)

    @property
    def held_tokens(self) -> int:
        """Tokens that its pages have room for, the present ones included."""
        return len(self._pages) * PAGE_TOKENS

    @property
    def cache(self) -> PagedLatentCache:
        return self._cache

    @property
    def page_ids(self) -> Sequence[int]:
        """Its pages in order. Until it is closed they are only ever added to."""
        return self._pages

    @property
    def next_row(self) -> int:
        """Where the next token's latents belong, for which there is room: a row of all pages."""
        page, row = divmod(self.length, PAGE_TOKENS)
        return self._pages[page] * PAGE_TOKENS + row

    def reserve(self, tokens: int) -> None:
        """Make room for that many tokens after the present ones. Raises EngineError when full."""
        while self.held_tokens < self.length + tokens:
            self._pages.append(self._cache._allocate())

    def write(self, layer: int, latents: Tensor) -> None:
        """Store one layer's latents of the next tokens: (tokens, latent_dim)."""
        start, end = self.length, self.length + latents.shape[0]
        assert end <= len(self._pages) * PAGE_TOKENS, "reserve() comes before write()"
        storage = self._cache._latents[layer]
        latents = self._cache.latent_format.encode(latents)
        for first in range(start - start % PAGE_TOKENS, end, PAGE_TOKENS):
            low, high = max(first, start), min(first + PAGE_TOKENS, end)
            page = storage[self._pages[first // PAGE_TOKENS]]
            page[low - first : high - first] = latents[low - start : high - start]
        self._written = end

    def read_blocks(self, layer: int, block_keys: int) -> Iterator[tuple[int, Tensor]]:
        """One layer's latents, written ones included, in blocks of about block_keys tokens.

        Yields (index of the block's first token, (tokens, latent_dim)). Blocks start at multiples
        of a fixed size, so that sums over them round the same way at any length.
        """
        storage = self._cache._latents[layer]
        pages_per_block = max(block_keys // PAGE_TOKENS, 1)
        for first_page in range(0, _pages_for(self._written), pages_per_block):
            pages = self._pages[first_page : first_page + pages_per_block]
            first = first_page * PAGE_TOKENS
            block = storage[pages].flatten(0, 1)[: self._written - first]
            yield first, self._cache.latent_format.decode(block)

    def advance(self, token_ids: Sequence[int]) -> None:
        """The tokens that were written to every layer now belong to the past."""
        start = self.length
        chunk = self._cache.chunk_tokens
        if start == self._repeatable and start % chunk == 0 and len(token_ids) == chunk:
            self._repeatable += chunk
        self.token_ids.extend(token_ids)
        while (self._hashed + 1) * PAGE_TOKENS <= self.length:
            first = self._hashed * PAGE_TOKENS
            tokens = tuple(self.token_ids[first : first + PAGE_TOKENS])
            repeatable = first + PAGE_TOKENS <= self._repeatable
            self._cache._register(self._pages[self._hashed], self._digest, tokens, repeatable)
            self._digest = _digest(self._digest, tokens)
            self._hashed += 1

    def close(self) -> None:
        """Let go of the pages. What was computed stays known until its memory is needed."""
        if self._closed:
            return
        self._closed = True
        tail = tuple(self.token_ids[self._hashed * PAGE_TOKENS :])
        if tail:
            self._cache._register(self._pages[self._hashed], self._digest, tail, False)
        # The end of a sequence becomes the oldest: it is of use to fewer others than its start.
        for page_id in reversed(self._pages):
            self._cache._release(page_id)
        self._pages.clear()

    def _append_page(self, page_id: int, page: _Page) -> None:
        if page.repeatable and self._repeatable == self.length:
            self._repeatable += PAGE_TOKENS
        self._pages.append(page_id)
        self.token_ids.extend(page.tokens)
        self._digest = page.digest
        self._hashed += 1
