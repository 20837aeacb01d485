"""The card's kernels: are they right, and how much of the card's own copy speed do they reach?

Right: against the same arithmetic in torch, in fp32 or fp64, on the card itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.table import Table, median_seconds, seconds_in_a_row
from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.experts import panels
from hybridk2.kv_cache import PAGE_TOKENS, LatentFormat
from hybridk2.model.attention import PagedMix
from hybridk2.model.layers import DECODE_ROWS
from hybridk2.model.loading import fp8_latents

ATTENTION_SHARE = 0.7  # of the measured copy, at 32K
CHECKED_CONTEXT = 32_768
# bf16 rounds the softmax's weights and the result: 2^-8 of sums of |values|, here of order 1.
ATTENTION_ERROR = 2**-7
EXPERT_ERROR = 2**-7  # relative: the product before down is rounded to bf16 on both sides
_COPIES = 20  # in a row


def copy_bytes_per_second(device: Device, num_bytes: int = 1 << 30) -> float:
    """Bytes read and written by a copy within the card, one after another, the better of such as
    are recorded and such as are not: on the H100 that was seen, 2.4 and 2.9 TB/s."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)

    def copy(_: int = 0) -> None:
        target.copy_(source)

    def launched() -> None:
        for _ in range(_COPIES):
            copy()

    seconds = seconds_in_a_row(device, copy), median_seconds(device, launched) / _COPIES
    return 2 * num_bytes / min(seconds)


@dataclass(frozen=True)
class AttentionInputs:
    """Rows, each after so many tokens. tables: of disjoint pages, so that the latents of one are in
    no cache any more when the turn of another has gone round."""

    q: Tensor
    pages: Tensor
    tables: list[Tensor]
    lengths: Tensor

    def latents(self, latent_format: LatentFormat | None) -> Tensor:
        """Of the first table: (rows, tokens, dim), as they were stored."""
        read = self.pages[self.tables[0].long()].flatten(1, 2)
        return read if latent_format is None else latent_format.decode(read)


def attention_inputs(
    config: K2Config,
    device: Device,
    rows: int,
    context: int,
    latent_format: LatentFormat | None,
    num_tokens: int,
) -> AttentionInputs:
    """num_tokens: of all pages, in random order, divided among as many tables as they make."""
    at = device.torch_device
    torch.manual_seed(context)
    shape = (num_tokens // PAGE_TOKENS, PAGE_TOKENS, config.latent_dim)
    latents = torch.randn(shape, dtype=torch.bfloat16, device=at)
    q = torch.randn(rows, config.num_attention_heads, config.latent_dim, device=at) / 8
    order = torch.randperm(shape[0], device=at).int()
    return AttentionInputs(
        q.bfloat16(),
        latents if latent_format is None else latent_format.encode(latents),
        list(order.view(-1, rows, context // PAGE_TOKENS)),
        torch.full((rows,), context, dtype=torch.int32, device=at),
    )


def exact_attention(config: K2Config, q: Tensor, latents: Tensor) -> Tensor:
    """(rows, heads, rank) in fp32 matrices: softmax over all keys at once."""
    mixed = []
    for queries, keys in zip(q.float(), latents, strict=True):
        weights = (queries @ keys.float().T * config.softmax_scale).softmax(-1)
        mixed.append(weights @ keys[:, : config.kv_lora_rank].float())
    return torch.stack(mixed)


def copy_seconds(device: Device, given: AttentionInputs) -> float:
    """Of a copy that moves as many bytes as a turn of attention reads, half of them read and half
    written, from one half of its pages to the other: in turns as well, and recorded as well. The
    latents are lost."""
    turns = list(given.pages.view(torch.uint8).flatten().view(len(given.tables), 2, -1))

    def copy(number: int) -> None:
        source, target = turns[number % len(turns)]
        target.copy_(source)

    return seconds_in_a_row(device, copy)


def measure_attention(
    table: Table,
    device: Device,
    config: K2Config,
    mix: PagedMix,
    copy_speed: float,
    contexts: tuple[int, ...],
) -> None:
    """One row at every context, and as many as a step may have at the one that is checked.

    Beside the share of the speed that a large copy has stands that of a copy of as many bytes: its
    beginning and end take their time as well.
    """
    rows_at = [(1, context) for context in contexts] + [(DECODE_ROWS, CHECKED_CONTEXT)]
    for name, latent_format in (("bf16", None), ("fp8", fp8_latents(config))):
        for rows, context in rows_at:
            num_tokens = max(*contexts, rows * context)
            given = attention_inputs(config, device, rows, context, latent_format, num_tokens)

            def attend(number: int, given: AttentionInputs = given) -> Tensor:
                pages_of = given.tables[number % len(given.tables)]
                return mix(given.q, given.pages, pages_of, given.lengths)

            wanted = exact_attention(config, given.q, given.latents(latent_format))
            error = float((attend(0) - wanted).abs().max())
            where = f"attention, {name} latents, {rows} x {context:,} tokens"
            table.at_most(f"{where}: error", error, "", ATTENTION_ERROR)
            read_bytes = given.pages.nbytes // len(given.tables)
            seconds = seconds_in_a_row(device, attend)
            share = read_bytes / seconds / copy_speed
            if name == "bf16" and (rows, context) == (1, CHECKED_CONTEXT):
                table.at_least(f"{where}: share of a copy's speed", share, "", ATTENTION_SHARE)
            else:
                table.figure(f"{where}: share of a copy's speed", share, "")
            share = copy_seconds(device, given) / seconds
            table.figure(f"{where}: share of a copy of as many bytes", share, "")


def measure_resident_experts(
    table: Table, device: Device, config: K2Config, packed: Tensor, copy_speed: float
) -> None:
    """packed: (experts, expert_bytes) uint8 on the device."""
    from hybridk2.model.triton import int4

    at, top_k = device.torch_device, config.num_experts_per_tok
    width = config.moe_intermediate_size
    for tokens in (1, 8):
        torch.manual_seed(tokens)
        x = torch.randn(tokens, config.hidden_size, device=at).bfloat16()
        scores = torch.rand(tokens, len(packed), device=at)
        places = scores.topk(top_k, dim=-1).indices.int()
        weights = torch.rand(tokens, top_k, device=at)
        call = (x, places, weights, packed)
        found = int4.resident_experts(*call, intermediate=width)
        wanted = panels.resident_experts(*call, intermediate=width)
        error = float((found - wanted).norm() / wanted.norm())
        where = f"resident experts, {tokens} tokens"
        table.at_most(f"{where}: relative error", error, "", EXPERT_ERROR)

        def run(_: int, call: tuple[Tensor, ...] = call) -> Tensor:
            return int4.resident_experts(*call, intermediate=width)

        read_bytes = len(places.unique()) * packed.shape[1]
        speed = read_bytes / seconds_in_a_row(device, run)
        table.figure(f"{where}: share of a copy's speed", speed / copy_speed, "")


def measure_int8(table: Table, device: Device, config: K2Config, copy_speed: float) -> None:
    from hybridk2.model.triton import int8

    at = device.torch_device
    weight = torch.randn(config.intermediate_size, config.hidden_size, device=at).bfloat16()
    quantised = int8.quantise(weight)
    x = torch.randn(1, config.hidden_size, device=at).bfloat16()
    wanted = x.float() @ int8.dequantise(quantised).float().T
    error = float((int8.linear(x, quantised).float() - wanted).norm() / wanted.norm())
    table.at_most("int8 product, 1 row: relative error", error, "", 2**-7)
    read_bytes = quantised.codes.nbytes + quantised.scales.nbytes
    speed = read_bytes / seconds_in_a_row(device, lambda _: int8.linear(x, quantised))
    table.figure("int8 product, 1 row: share of a copy's speed", speed / copy_speed, "")
