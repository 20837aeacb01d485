"""Experts in panels, packed in torch from the text of csrc/kernels/kernels.h and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridk2.checkpoint import QuantizedLinear


def pack_expert(gate: QuantizedLinear, up: QuantizedLinear, down: QuantizedLinear) -> Tensor:
    """(expert_bytes,) uint8 of one NUMA node: strips of gate and up, then strips of down."""
    gate_panels, up_panels, down_panels = (panels(matrix) for matrix in (gate, up, down))
    gate_up = torch.stack((gate_panels, up_panels), dim=2)  # (strips, blocks, 2, bytes)
    strips = down_panels.unflatten(0, (-1, 2)).transpose(1, 2)
    return torch.cat((gate_up.flatten(), strips.flatten()))


def panels(matrix: QuantizedLinear) -> Tensor:
    """(rows / 16, blocks, 576) uint8: 8 lines of 16 words, then two groups of 16 scales."""
    nibbles = torch.stack([matrix.packed >> (4 * k) & 15 for k in range(8)], dim=-1).flatten(1)
    columns = nibbles.shape[1]
    nibbles = F.pad(nibbles, (0, -columns % 64), value=8).long()
    scale = F.pad(matrix.scale, (0, nibbles.shape[1] // 32 - columns // 32))
    # (16-row groups, rows, blocks, lines, columns of a line)
    parts = nibbles.view(-1, 16, nibbles.shape[1] // 64, 8, 8)
    words = sum(parts[..., c] << (4 * (c // 2) + 16 * (c % 2)) for c in range(8))
    assert isinstance(words, Tensor)
    words = torch.where(words < 2**31, words, words - 2**32).int().permute(0, 2, 3, 1)
    groups = scale.view(-1, 16, scale.shape[1] // 2, 2).permute(0, 2, 3, 1)
    in_bytes = (part.contiguous().view(torch.uint8).flatten(2) for part in (words, groups))
    return torch.cat(tuple(in_bytes), dim=2)
