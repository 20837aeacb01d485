"""Experts' panels read with torch: what GPU kernels compute from them, on any device, slowly.

Owns the inverse of packing for tensors, and the arithmetic of an expert around it, for devices
without kernels and as the reference for those with. csrc/kernels/kernels.h says how a panel lies;
nothing here knows who keeps panels or when they are computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_COLUMNS, _BLOCK_BYTES, _NIBBLE_BYTES = 64, 576, 512
_PANEL_ROWS = 16


def expert_bytes(hidden: int, intermediate: int) -> int:
    """Of one expert's panels. hidden, intermediate: multiples of 32."""
    return _strips_bytes(2 * intermediate, hidden) + _strips_bytes(hidden, intermediate)


def dequantise(
    panel: Tensor, *, hidden: int, intermediate: int, gate_up_out: Tensor, down_out: Tensor
) -> None:
    """One expert's panels as matrices, rounded to the type of the outputs; fp32 rounds nothing.

    panel: uint8 (expert_bytes,). gate_up_out: (2 * intermediate, hidden), gate's rows first.
    down_out: (hidden, intermediate).
    """
    gate_up_bytes = _strips_bytes(2 * intermediate, hidden)
    strips = _unpack(panel[:gate_up_bytes], hidden)
    gate_up_out.copy_(strips.transpose(0, 1).reshape(gate_up_out.shape))
    down_out.copy_(_unpack(panel[gate_up_bytes:], intermediate).reshape(down_out.shape))


def swiglu_expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) as the host's kernels round it: (rows, hidden) fp32.

    x: (rows, hidden), bf16 or fp32; the product before down is rounded to its type. gate_up, down:
    fp32, as `dequantise` gives them.
    """
    gate, up = F.linear(x.float(), gate_up).chunk(2, dim=-1)
    product = (F.silu(gate) * up).to(x.dtype)
    return F.linear(product.float(), down)


def resident_experts(
    x: Tensor, places: Tensor, weights: Tensor, panels: Tensor, *, intermediate: int
) -> Tensor:
    """The weighted sum of the experts that rows picked among panels: (tokens, hidden) fp32.

    x: (tokens, hidden), bf16 or fp32. places: (tokens, k) int32, which of the panels; -1: none.
    weights: (tokens, k) fp32. panels: uint8 (experts, expert_bytes). A token's terms are added in
    ascending order of places. Reads places back to the host.
    """
    hidden = x.shape[1]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    gate_up = total.new_empty(2 * intermediate, hidden)
    down = total.new_empty(hidden, intermediate)
    for place in places.unique().tolist():
        if place < 0:
            continue
        rows, picks = (places == place).nonzero(as_tuple=True)
        dequantise(
            panels[place],
            hidden=hidden,
            intermediate=intermediate,
            gate_up_out=gate_up,
            down_out=down,
        )
        share = swiglu_expert(x[rows], gate_up, down)
        total.index_add_(0, rows, share * weights[rows, picks].unsqueeze(1))
    return total


def _strips_bytes(rows: int, columns: int) -> int:
    blocks = -(-columns // _BLOCK_COLUMNS)
    return rows // _PANEL_ROWS * blocks * _BLOCK_BYTES


def _unpack(strips: Tensor, columns: int) -> Tensor:
    """Values of strips: (strips, 2 panels, 16 rows, columns) fp32, exact."""
    blocks = -(-columns // _BLOCK_COLUMNS)
    panels = strips.view(-1, blocks, 2, _BLOCK_BYTES)
    # Line 4g + q, 32-bit lane r: columns 32g + 8q + c of row r, at bit 4 (c // 2) + 16 (c % 2).
    lanes = panels[..., :_NIBBLE_BYTES].contiguous().view(torch.int32)
    lanes = lanes.view(-1, blocks, 2, 2, 4, _PANEL_ROWS, 1)
    column = torch.arange(8, dtype=torch.int32, device=strips.device)
    codes = (lanes >> (4 * (column // 2) + 16 * (column % 2)) & 15) - 8
    scales = panels[..., _NIBBLE_BYTES:].contiguous().view(torch.bfloat16)
    scales = scales.view(-1, blocks, 2, 2, 1, _PANEL_ROWS, 1)
    # (strip, block, panel, group, line of the group, row, column of the line)
    values = (codes * scales.float()).permute(0, 2, 5, 1, 3, 4, 6)
    return values.reshape(-1, 2, _PANEL_ROWS, blocks * _BLOCK_COLUMNS)[..., :columns]
