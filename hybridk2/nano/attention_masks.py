"""Which position may attend to which: packed documents in training, a growing cache in generation.

Both are callables with network.Attend's signature, so the network is one and the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128


class PackedDocuments:
    """Causal attention inside each document of a packed batch.

    On a GPU by FlexAttention over a block mask whose buffers are rewritten for every batch (the
    compiled kernels stay); for small trials on the CPU by a plain boolean mask.
    """

    def __init__(
        self, num_tokens: int, scale: float, device: torch.device, *, by_blocks: bool
    ) -> None:
        """by_blocks: use FlexAttention; num_tokens must then be a multiple of 128."""
        self._scale = scale
        self._blocks = num_tokens // _BLOCK if by_blocks else 0
        self._starts = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        if self._blocks:
            self._column = torch.arange(self._blocks, dtype=torch.int32, device=device)
            self.mask = self._new_mask(device)

    def _new_mask(self, device: torch.device) -> BlockMask:
        blocks, starts = self._blocks, self._starts

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= starts[query])

        indices = self._column.repeat(blocks, 1)[None, None].contiguous()
        return BlockMask.from_kv_blocks(
            torch.full((1, 1, blocks), blocks, dtype=torch.int32, device=device),
            indices,
            BLOCK_SIZE=_BLOCK,
            mask_mod=allowed,
        )

    def set_documents(self, starts: Tensor) -> None:
        """starts: (tokens,) int32, the index of the first token of each token's document."""
        self._starts.copy_(starts)
        if not self._blocks:
            return
        # Documents are contiguous, so a block of queries sees the blocks from its first query's
        # document start up to itself, and a block of keys is seen by a contiguous run as well.
        first = (starts[::_BLOCK] // _BLOCK).to(torch.int32)
        self.mask.kv_num_blocks[0, 0] = self._column - first + 1
        self.mask.kv_indices[0, 0] = (first[:, None] + self._column).clamp(max=self._blocks - 1)
        last = torch.searchsorted(first, self._column, right=True, out_int32=True) - 1
        assert self.mask.q_num_blocks is not None
        assert self.mask.q_indices is not None
        self.mask.q_num_blocks[0, 0] = last - self._column + 1
        self.mask.q_indices[0, 0] = (self._column[:, None] + self._column).clamp(
            max=self._blocks - 1
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        if self._blocks:
            out = flex_attention(query, key, value, block_mask=self.mask, scale=self._scale)
        else:
            index = torch.arange(self._starts.numel(), dtype=torch.int32)
            mask = (index <= index[:, None]) & (index >= self._starts[:, None])
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self._scale
            )
        return out[0].transpose(0, 1)


class CachedRows:
    """Causal attention of equally long rows with everything before them, left padding hidden.

    Keys and values of every layer are kept; each call appends. `padding`: (rows,) number of
    padding tokens at the left of each row.
    """

    def __init__(self, padding: Tensor, longest: int, scale: float) -> None:
        self._padding, self._longest, self._scale = padding, longest, scale
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._layer = 0
        self.length = 0
        self.new = 0

    def extend(self, count: int) -> None:
        """Announce that the next pass over the layers brings `count` tokens for each row."""
        self.length += count
        self.new = count
        self._layer = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = self._padding.numel()
        query, key, value = (
            x.unflatten(0, (rows, self.new)).transpose(1, 2) for x in (query, key, value)
        )
        layer = self._layer
        self._layer += 1
        if layer not in self._keys:
            shape = (rows, key.shape[1], self._longest)
            self._keys[layer] = key.new_zeros(*shape, key.shape[-1])
            self._values[layer] = value.new_zeros(*shape, value.shape[-1])
        spots = slice(self.length - self.new, self.length)
        self._keys[layer][:, :, spots], self._values[layer][:, :, spots] = key, value
        index = torch.arange(self.length, device=key.device)
        mask = index[None, None] <= index[spots][None, :, None]
        # A padding query sees itself, so that no row of the softmax is empty.
        visible = (index[None, None] >= self._padding[:, None, None]) | (
            index[None, None] == index[spots][None, :, None]
        )
        out = F.scaled_dot_product_attention(
            query,
            self._keys[layer][:, :, : self.length],
            self._values[layer][:, :, : self.length],
            attn_mask=(mask & visible)[:, None],
            scale=self._scale,
        )
        return out.transpose(1, 2).flatten(0, 1)
