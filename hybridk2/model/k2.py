"""The whole decoder: embedding, layers, final norm, logits.

Knows tensors and the cache, not where weights come from on disk, requests, sampling or text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridk2.checkpoint import LayerWeights, routing_fingerprint
from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.kv_cache import CacheSequence, PagedLatentCache
from hybridk2.model.attention import LatentAttention, PagedMix
from hybridk2.model.decode_batch import DecodeBatch
from hybridk2.model.decoding import DecodeSteps
from hybridk2.model.layers import (
    DECODE_ROWS,
    RotaryTable,
    add_rms_norm,
    exact_product,
    place_matrix,
    place_mlp,
    rms_norm,
    swiglu,
)
from hybridk2.model.moe import MixtureOfExperts, RoutedExperts
from hybridk2.model.triton.int8 import Int8Linear
from hybridk2.timeline import Phase, Timeline

# Rows of lm_head that are widened to fp32 at a time. 4 MB stays in cache; blocks of 30 MB and more
# went through DRAM and took four times as long on a 7168 x 18432 matrix (2 Zen 4 cores).
_LOGIT_BLOCK_BYTES = 4 << 20


class DecoderLayer:
    """One pre-norm layer: h += attention(norm(h)), then h += feed_forward(norm(h))."""

    def __init__(
        self,
        config: K2Config,
        weights: LayerWeights,
        layer: int,
        experts: RoutedExperts | None,
        device: Device,
        dtype: torch.dtype,
        paged_mix: PagedMix | None = None,
        int8: bool = False,
    ) -> None:
        """experts: needed by MoE layers, None for dense ones. int8: the form of matrices but
        kv_b's and the router's. paged_mix: see LatentAttention."""
        self._layer = layer
        self._eps = config.rms_norm_eps
        self._has_kernels = device.has_kernels
        self.input_norm = device.place(weights.input_norm.to(dtype))
        self._post_attention_norm = device.place(weights.post_attention_norm.to(dtype))
        self.attention = LatentAttention(
            config, weights.attention, layer, device, dtype, paged_mix, int8
        )
        self.moe: MixtureOfExperts | None = None
        if weights.mlp is not None:
            self._mlp = place_mlp(weights.mlp, device, dtype, int8)
        else:
            assert weights.router is not None
            assert weights.shared is not None
            assert experts is not None, f"layer {layer} is a MoE layer and needs routed experts"
            self.moe = MixtureOfExperts(
                config,
                layer - config.first_k_dense_replace,
                weights.router,
                weights.shared,
                experts,
                device,
                dtype,
                int8,
            )

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        sequence: CacheSequence,
        absorbed: bool | None = None,
        timeline: Timeline | None = None,
    ) -> Tensor:
        """hidden: (tokens, hidden). See LatentAttention.forward for the rest."""
        x = self.attention_input(hidden)
        hidden = hidden + self.attention.forward(x, cos, sin, sequence, absorbed)
        self._mark(timeline, "attention")
        hidden = hidden + self.feed_forward(self.feed_forward_input(hidden), timeline)
        self._mark(timeline, "dense MLP" if self.moe is None else "adding")
        return hidden

    def decode(
        self,
        hidden: Tensor,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: DecodeBatch,
        next_norm: Tensor,
        timeline: Timeline | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layer, and the norm that is next: its input is at hand where the layer's sum is.

        hidden: (rows, hidden), one token of each of the batch's sequences, then padding. x: its
        `attention_input`. next_norm: (hidden,), the weight of what takes the layer's output.
        Returns that output, and its norm.
        """
        attended = self.attention.decode(x, cos, sin, batch)
        hidden, x = self._add_norm(hidden, attended, None, self._post_attention_norm)
        self._mark(timeline, "attention")
        if self.moe is None:
            branch = swiglu(x, self._mlp, has_kernels=self._has_kernels)
            hidden, x = self._add_norm(hidden, branch, None, next_norm)
        else:
            shared, routed = self.moe.decode(x, batch, timeline)
            hidden, x = self._add_norm(hidden, shared, routed, next_norm)
        self._mark(timeline, "dense MLP" if self.moe is None else "adding")
        return hidden, x

    def _add_norm(
        self, hidden: Tensor, branch: Tensor, routed: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(
            hidden, branch, routed, weight, self._eps, has_kernels=self._has_kernels
        )

    def _mark(self, timeline: Timeline | None, phase: Phase) -> None:
        if timeline is not None:
            timeline.mark(phase, self._layer)

    def attention_input(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.input_norm, self._eps)

    def feed_forward_input(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self._post_attention_norm, self._eps)

    def feed_forward(self, x: Tensor, timeline: Timeline | None = None) -> Tensor:
        """x: (tokens, hidden), normed. See MixtureOfExperts.forward for the rest."""
        if self.moe is None:
            return swiglu(x, self._mlp)
        return self.moe.forward(x, timeline)


class K2Model:
    """Hidden states and logits of token sequences.

    timeline: told what ran when; None, as at first, where nobody asks.
    """

    def __init__(
        self,
        config: K2Config,
        embedding: Tensor,
        layers: list[DecoderLayer],
        final_norm: Tensor,
        lm_head: Tensor,
        device: Device,
        dtype: torch.dtype,
        experts: RoutedExperts,
        int8: bool = False,
    ) -> None:
        """embedding, lm_head: (vocab, hidden) bf16, kept as they are, the embedding on the host.
        dtype: of activations. experts: the layers', told where each step begins and ends. int8:
        the head's form instead."""
        self.config = config
        self.layers = layers
        self.timeline: Timeline | None = None
        # Called between two steps of decoding, with the picks of the first: (MoE layers, tokens,
        # top_k) int32 on the host.
        self.after_decoding: Callable[[Tensor], None] | None = None
        self._device = device
        self._dtype = dtype
        self._experts = experts
        self._decode_steps: DecodeSteps | None = None
        self._prompt_failed = False  # the last chunk; its router has not been reset yet
        self._embedding = embedding
        self._final_norm = device.place(final_norm.to(dtype))
        self._lm_head = place_matrix(lm_head, device, lm_head.dtype, int8)
        self._rotary = RotaryTable(config, device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sequence: CacheSequence,
        absorbed: bool | None = None,
    ) -> Tensor:
        """Run new tokens of one sequence and extend its cache by them.

        token_ids, positions: (tokens,) int64 on the host. The sequence must have room for them
        (CacheSequence.reserve). Returns hidden states after the last layer: (tokens, hidden).
        """
        timeline = self.timeline
        if timeline is not None:
            timeline.begin("prefill", token_ids.shape[0], sequence.length)
        hidden = self._device.place(F.embedding(token_ids, self._embedding).to(self._dtype))
        cos, sin = self._rotary(self._device.place(positions))
        if timeline is not None:
            timeline.mark("embedding")
        router = self._experts.of_prompts
        if self._prompt_failed:
            router.reset()
        self._prompt_failed = True
        router.begin_step()
        for layer in self.layers:
            hidden = layer.forward(hidden, cos, sin, sequence, absorbed, timeline)
        self._device.wait()
        router.end_step()
        self._prompt_failed = False
        sequence.advance(token_ids.tolist())
        return hidden

    def decode(
        self,
        token_ids: Sequence[int],
        sequences: Sequence[CacheSequence],
        *,
        rows_are_independent: bool,
    ) -> Tensor:
        """Run one new token of each of several sequences.

        token_ids, sequences: up to DECODE_ROWS of them, each sequence with a past and with room
        (CacheSequence.reserve). rows_are_independent: a sequence's numbers are bit for bit the same
        whatever runs beside it, alone included; False lets one that is alone save the padding.

        Returns logits (len(sequences), vocab) fp32 on the host, which the next step may overwrite.
        The caller advances the sequences once the step has succeeded; until then it may be
        repeated.
        """
        tokens = len(sequences)
        assert 1 <= tokens == len(token_ids) <= DECODE_ROWS, f"{tokens} sequences"
        timeline = self.timeline
        if timeline is not None:
            timeline.begin("decode", tokens, max(sequence.length for sequence in sequences))
        choices = self._device.decode_rows
        enough = (rows for rows in choices if rows >= tokens)
        rows = choices[-1] if rows_are_independent else next(enough)
        embedded = F.embedding(torch.tensor(token_ids), self._embedding).to(self._dtype)
        steps = self._steps_over(sequences[0].cache)
        logits, picks = steps.run(embedded, sequences, rows, timeline)
        for layer in self.layers:
            if layer.moe is not None:
                layer.moe.note_decoded(picks[layer.moe.slot])
        if self.after_decoding is not None:
            self.after_decoding(picks)
        return logits

    def _steps_over(self, cache: PagedLatentCache) -> DecodeSteps:
        """Steps are bound to the memory of one cache; an engine has but one."""
        if self._decode_steps is None or self._decode_steps.cache is not cache:
            self._decode_steps = DecodeSteps(
                self.config, self._compute, self._experts.decoding, cache, self._device, self._dtype
            )
        return self._decode_steps

    def _compute(self, batch: DecodeBatch, timeline: Timeline | None) -> Tensor:
        """Enqueue a step: logits (rows, vocab) fp32 of the batch's tokens."""
        hidden = batch.hidden
        cos, sin = self._rotary(batch.positions)
        x = self.layers[0].attention_input(hidden)
        next_norms = [layer.input_norm for layer in self.layers[1:]] + [self._final_norm]
        for layer, next_norm in zip(self.layers, next_norms, strict=True):
            hidden, x = layer.decode(hidden, x, cos, sin, batch, next_norm, timeline)
        logits = self._head(x)
        if timeline is not None:
            timeline.mark("head")
        return logits

    @property
    def experts_read(self) -> int:
        """How many routed experts all calls so far read, layer by layer."""
        return sum(layer.moe.experts_read for layer in self.layers if layer.moe is not None)

    @property
    def host_experts_read(self) -> int:
        """Of those, how many did not live on the device."""
        return sum(layer.moe.host_experts_read for layer in self.layers if layer.moe is not None)

    def watch_routing(self, on_decode: Callable[[int, Tensor], None] | None) -> None:
        """Have every later step of decoding tell which experts it picks; None ends that.

        on_decode: called in each MoE layer, in order, with the layer's slot and the picks (tokens,
        top_k) int32 on the host; after the step, when it has succeeded.
        """
        for layer in self.layers:
            if layer.moe is not None:
                layer.moe.on_decode = on_decode

    def routing_fingerprint(self) -> str:
        """What tells this model's routing from another's: `checkpoint.routing_fingerprint`."""
        blocks = [layer.moe for layer in self.layers if layer.moe is not None]
        values = (block.router.identifying_values() for block in blocks)
        return routing_fingerprint(self.config, values)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (tokens, hidden) after the last layer. Returns (tokens, vocab) fp32 logits."""
        logits = self._head(rms_norm(hidden, self._final_norm, self.config.rms_norm_eps))
        if self.timeline is not None:
            self.timeline.mark("head")
        return logits

    def _head(self, x: Tensor) -> Tensor:
        """The exact fp32 product of the normed activations and the bf16 head.

        Rounding logits of 20 to bf16 would move each by up to 0.06, more than whole layers do.
        """
        if isinstance(self._lm_head, Int8Linear) or not x.is_cpu:
            return exact_product(x, self._lm_head)
        x = x.float()
        vocab_size, hidden_size = self._lm_head.shape
        rows = max(_LOGIT_BLOCK_BYTES // (4 * hidden_size), 1)
        # One buffer for every block: taken anew, each came from fresh memory, behind the results of
        # the one before, and the process grew for a moment by the whole head in fp32, 4.7 GB.
        wide = x.new_empty(rows, hidden_size)
        logits = x.new_empty(x.shape[0], vocab_size)
        for first in range(0, vocab_size, rows):
            block = self._lm_head[first : first + rows]
            widened = wide[: block.shape[0]].copy_(block)
            logits[:, first : first + rows] = F.linear(x, widened)
        return logits
