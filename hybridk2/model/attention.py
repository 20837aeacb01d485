"""Multi-head latent attention (MLA) over the paged latent cache.

Per token the cache holds one latent c (kv_lora_rank values, normed) and one rotated key (shared by
all heads). Two ways to the same result:

  un-absorbed   keys and values are expanded from the latents: W_UK c and W_UV c. Cheaper when many
                new tokens look at few old ones: prefill.
  absorbed      W_UK is applied to the queries and W_UV to the outputs instead, and attention runs
                on the latents themselves. Cheaper when few new tokens look at many old ones:
                decode.

(DeepSeek-V2, arXiv 2405.04434, section 2.1.) Scores, softmax and sums are fp32 in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridk2.checkpoint import AttentionWeights
from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.kv_cache import CacheSequence
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.model.flash import FlashState
from hybridk2.model.layers import Weight, linear, place_matrix, rms_norm, rotate

# Scores of one block of keys in fp32: 64 MB keeps a 512-token chunk of K2's 64 heads at 512 keys a
# block, and the memory of prefill independent of the context's length.
_SCORE_BYTES = 64 << 20
_MIN_BLOCK_KEYS = 64
_MAX_BLOCK_KEYS = 16_384


# Attention over pages by one kernel: (q, latents, page_table, lengths) to (rows, heads,
# kv_lora_rank) fp32. q: (rows, heads, latent_dim). latents: one layer's memory of the cache.
# page_table: (rows, pages) int32. lengths: (rows,) int32; the output of a row of length 0 is zero.
PagedMix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Keys of the past that are expanded at a time for flash attention: 170 MB for K2's 64 heads.
_PAST_BLOCK_KEYS = 2048


@dataclass(frozen=True)
class _Queries:
    plain: Tensor  # (heads, tokens, qk_nope_head_dim)
    rotated: Tensor  # (heads, tokens, qk_rope_head_dim)


class LatentAttention:
    """One layer's attention: reads and extends the layer's part of the latent cache."""

    def __init__(
        self,
        config: K2Config,
        weights: AttentionWeights,
        layer: int,
        device: Device,
        dtype: torch.dtype,
        paged_mix: PagedMix | None = None,
        int8: bool = False,
    ) -> None:
        """paged_mix: what decoding attends with, and prompts with flash kernels beside it; None
        computes both with torch, in fp32. int8: the form of projections but kv_b's, which is bf16
        always."""
        self._config = config
        self._layer = layer
        self._paged_mix = paged_mix
        self._has_kernels = device.has_kernels

        def place(tensor: Tensor) -> Tensor:
            return device.place(tensor.to(dtype))

        def place_projection(tensor: Tensor) -> Weight:
            return place_matrix(tensor, device, dtype, int8)

        self._q_a_proj = place_projection(weights.q_a_proj)
        self._q_a_norm = place(weights.q_a_norm)
        self._q_b_proj = place_projection(weights.q_b_proj)
        self._kv_a_proj = place_projection(weights.kv_a_proj)
        self._kv_a_norm = place(weights.kv_a_norm)
        self._kv_b_proj = place(weights.kv_b_proj)
        self._o_proj = place_projection(weights.o_proj)
        # Views, not copies: kv_b_proj stacks W_UK over W_UV head by head.
        per_head = self._kv_b_proj.view(
            config.num_attention_heads,
            config.qk_nope_head_dim + config.v_head_dim,
            config.kv_lora_rank,
        )
        self._w_uk = per_head[:, : config.qk_nope_head_dim]  # (heads, nope, kv_lora_rank)
        self._w_uv = per_head[:, config.qk_nope_head_dim :]  # (heads, v, kv_lora_rank)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        sequence: CacheSequence,
        absorbed: bool | None = None,
    ) -> Tensor:
        """Attention of new tokens over themselves and all that the sequence has cached.

        x: (tokens, hidden), normed. cos, sin: (tokens, rope_dim / 2) of the tokens' positions. The
        tokens continue the sequence: token t sees the cached ones and new ones up to t. absorbed:
        which form to compute; None takes the one with fewer operations. Returns (tokens, hidden).
        """
        start = sequence.length
        tokens = x.shape[0]
        latents = self._latents(x, cos, sin)
        sequence.write(self._layer, latents)
        queries = self._queries(x, cos, sin)
        if self._paged_mix is not None and not absorbed:
            heads = self._flash(queries, latents, sequence, start)
        else:
            if absorbed is None:
                absorbed = self._absorbed_is_cheaper(tokens, start)
            attend = self._absorbed if absorbed else self._expanded
            heads = attend(queries, sequence, start)  # (heads, tokens, v)
        return linear(heads.transpose(0, 1).reshape(tokens, -1), self._o_proj)

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, batch: DecodeBatch) -> Tensor:
        """Attention of one new token of each of the batch's sequences, in the absorbed form.

        x: (rows, hidden), normed. What a row comes to depends on its own sequence alone. Returns
        (rows, hidden).
        """
        if self._has_kernels and self._paged_mix is not None:
            return self._decode_by_kernels(x, cos, sin, batch, self._paged_mix)
        latents = self._latents(x, cos, sin)
        q = self._absorbed_queries(self._queries(x, cos, sin))
        mix = self._mix_each if self._paged_mix is None else self._mix_pages
        heads = torch.bmm(mix(q, latents, batch), self._w_uv.transpose(1, 2))
        return linear(heads.transpose(0, 1).reshape(x.shape[0], -1), self._o_proj)

    def _decode_by_kernels(
        self, x: Tensor, cos: Tensor, sin: Tensor, batch: DecodeBatch, mix: PagedMix
    ) -> Tensor:
        """The same with as few launches as there are: products write where the next one reads."""
        from hybridk2.model.triton import elementwise  # loads Triton

        config, cache, rows = self._config, batch.cache, x.shape[0]
        eps, nope = config.rms_norm_eps, config.qk_nope_head_dim
        q = elementwise.rms_norm(linear(x, self._q_a_proj), self._q_a_norm, eps)
        q = linear(q, self._q_b_proj).view(rows, config.num_attention_heads, config.qk_head_dim)
        queries = q.new_empty(rows, config.num_attention_heads, config.latent_dim)
        absorbed = queries[..., : config.kv_lora_rank].transpose(0, 1)
        torch.bmm(q[..., :nope].transpose(0, 1), self._w_uk, out=absorbed)
        compressed = linear(x, self._kv_a_proj)
        is_plain = cache.latent_format.is_plain
        latents = cache.rows(self._layer) if is_plain else torch.empty_like(compressed)
        elementwise.latents_and_queries(
            compressed,
            self._kv_a_norm,
            q,
            cos,
            sin,
            eps,
            queries=queries,
            latents=latents,
            places=batch.write_rows if is_plain else None,
        )
        if not is_plain:
            cache.write_rows(self._layer, batch.write_rows, latents)
        mixed = mix(queries, cache.latents(self._layer), batch.page_table, batch.lengths)
        heads = q.new_empty(rows, config.num_attention_heads, config.v_head_dim)
        mixed = mixed.transpose(0, 1).to(q.dtype)
        torch.bmm(mixed, self._w_uv.transpose(1, 2), out=heads.transpose(0, 1))
        return linear(heads.flatten(1), self._o_proj)

    def _mix_each(self, q: Tensor, latents: Tensor, batch: DecodeBatch) -> Tensor:
        """Write the new latents and mix, one sequence after another: (heads, rows, rank)."""
        mixed = q.new_zeros(*q.shape[:2], self._config.kv_lora_rank)
        for row, sequence in enumerate(batch.sequences):
            here = slice(row, row + 1)
            sequence.write(self._layer, latents[here])
            mixed[:, here] = self._mix_latents(q[:, here].float(), sequence, sequence.length)
        return mixed

    def _mix_pages(self, q: Tensor, latents: Tensor, batch: DecodeBatch) -> Tensor:
        """The same by the batch's tensors alone, so that a recorded step can do it again."""
        assert self._paged_mix is not None
        batch.cache.write_rows(self._layer, batch.write_rows, latents)
        pages = batch.cache.latents(self._layer)
        mixed = self._paged_mix(
            q.transpose(0, 1).contiguous(), pages, batch.page_table, batch.lengths
        )
        return mixed.transpose(0, 1).to(q.dtype)

    def _latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What the cache keeps of each token: (tokens, latent_dim)."""
        config = self._config
        compressed = linear(x, self._kv_a_proj)
        latent = rms_norm(
            compressed[:, : config.kv_lora_rank], self._kv_a_norm, config.rms_norm_eps
        )
        rotated_key = rotate(compressed[:, config.kv_lora_rank :], cos, sin)
        return torch.cat((latent, rotated_key), dim=-1)

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> _Queries:
        config = self._config
        q = rms_norm(linear(x, self._q_a_proj), self._q_a_norm, config.rms_norm_eps)
        q = linear(q, self._q_b_proj).view(-1, config.num_attention_heads, config.qk_head_dim)
        plain, rotated = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return _Queries(plain.transpose(0, 1), rotate(rotated, cos, sin).transpose(0, 1))

    def _absorbed_is_cheaper(self, tokens: int, start: int) -> bool:
        """Compare multiplications per head: expanding every old latent, or wider scores and sums.

        Expanding new latents and absorbing new queries cost the same, so only old ones count. For
        K2 the forms break even at about 170 new tokens, however long the past.
        """
        config = self._config
        expand = start * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        pairs = tokens * start + tokens * (tokens + 1) / 2
        wider = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
        return expand > pairs * wider

    def _expanded(self, queries: _Queries, sequence: CacheSequence, start: int) -> Tensor:
        config = self._config
        q = torch.cat((queries.plain, queries.rotated), dim=-1).float()
        state = _SoftmaxState(q, config.v_head_dim, config.softmax_scale, start)
        for first, block in sequence.read_blocks(self._layer, state.block_keys):
            k, v = self._keys_and_values(block)
            state.add(first, k.float(), v.float())
        return state.result().to(queries.plain.dtype)

    def _flash(
        self, queries: _Queries, latents: Tensor, sequence: CacheSequence, start: int
    ) -> Tensor:
        """The expanded form through flash kernels: the new tokens, then the past block by block."""
        config = self._config
        q = torch.cat((queries.plain, queries.rotated), dim=-1)
        state = FlashState(q, config.v_head_dim, config.softmax_scale)
        state.add(*self._keys_and_values(latents), causal=True)
        for first, block in sequence.read_blocks(self._layer, _PAST_BLOCK_KEYS):
            if first >= start:
                break
            state.add(*self._keys_and_values(block[: start - first]), causal=False)
        return state.result().to(q.dtype)

    def _keys_and_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents expanded: (heads, tokens, qk_head_dim) and (heads, tokens, v_head_dim)."""
        config = self._config
        latent, rotated = latents.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        expanded = linear(latent, self._kv_b_proj)
        expanded = expanded.view(latents.shape[0], config.num_attention_heads, -1)
        k, v = expanded.transpose(0, 1).split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        rotated = rotated.expand(config.num_attention_heads, -1, -1)
        return torch.cat((k, rotated), dim=-1), v

    def _absorbed(self, queries: _Queries, sequence: CacheSequence, start: int) -> Tensor:
        mixed = self._mix_latents(self._absorbed_queries(queries).float(), sequence, start)
        return torch.bmm(mixed.to(queries.plain.dtype), self._w_uv.transpose(1, 2))

    def _absorbed_queries(self, queries: _Queries) -> Tensor:
        """Queries against latents instead of keys: (heads, tokens, latent_dim)."""
        absorbed = torch.bmm(queries.plain, self._w_uk)
        return torch.cat((absorbed, queries.rotated), dim=-1)

    def _mix_latents(self, q: Tensor, sequence: CacheSequence, start: int) -> Tensor:
        """Latents weighted by the softmax of their scores: (heads, tokens, kv_lora_rank) fp32."""
        config = self._config
        state = _SoftmaxState(q, config.kv_lora_rank, config.softmax_scale, start)
        for first, block in sequence.read_blocks(self._layer, state.block_keys):
            wide = block.float()
            state.add(first, wide, wide[:, : config.kv_lora_rank])
        return state.result()


class _SoftmaxState:
    """Softmax-weighted sum over keys that arrive block by block, in fp32.

    Keeps for each query the largest score so far, the sum of exponentials below it and the weighted
    sum of values, rescaling both when a larger score arrives (Milakov and Gimelshein, arXiv
    1805.02867). Blocks start at fixed positions, so the rounding depends on nothing but the tokens.
    """

    def __init__(self, q: Tensor, value_dim: int, scale: float, start: int) -> None:
        """q: (heads, tokens, key_dim) fp32; its token t sees keys 0..start + t."""
        heads, tokens, _ = q.shape
        self._q = q * scale
        self._start = start
        self._visible = start + torch.arange(tokens, device=q.device)
        self._largest = q.new_full((heads, tokens, 1), float("-inf"))
        self._total = q.new_zeros((heads, tokens, 1))
        self._sum = q.new_zeros((heads, tokens, value_dim))
        keys = _SCORE_BYTES // (4 * heads * tokens)
        self.block_keys = min(max(keys, _MIN_BLOCK_KEYS), _MAX_BLOCK_KEYS)

    def add(self, first: int, k: Tensor, v: Tensor) -> None:
        """k: (heads, keys, key_dim) or (keys, key_dim) for all heads; v likewise; fp32.

        first: index of the block's first key. The first block holds key 0, which every query sees,
        so the largest score is finite from then on.
        """
        scores = self._q @ k.transpose(-1, -2)
        keys = first + torch.arange(k.shape[-2], device=k.device)
        if first + k.shape[-2] - 1 > self._start:
            scores.masked_fill_(keys > self._visible[:, None], float("-inf"))
        largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        shrink = torch.exp(self._largest - largest)
        weights = torch.exp_(scores - largest)
        self._total = self._total * shrink + weights.sum(-1, keepdim=True)
        self._sum = self._sum * shrink + weights @ v
        self._largest = largest

    def result(self) -> Tensor:
        return self._sum / self._total
