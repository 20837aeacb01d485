"""FP8 latents: how a token's latent and rotated key lie in bytes, and how they get there.

Plain torch operations, on any device; nothing is read back, so a captured graph may contain them.
mla.py reads the layout, planner/sizes.py counts its bytes.

One token in one layer, K2's `rank` of 512 and rotated key of 64 values in brackets:

  [0, rank)              e4m3 codes of the normed latent                        (512 bytes)
  [rank, + 4 * groups)   fp32 scales, one for every GROUP codes                 (16)
  [.., + 2 * rope)       the rotated key in bf16, as it is                      (128)

Scales are powers of two. An e4m3 code has four significant bits, so code * scale is a bf16 number
without rounding: what attention computes with is exactly what is stored. It costs nothing: codes
are floating-point numbers, whose relative error a power of two leaves alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128  # codes that share a scale
LARGEST_CODE = 448.0  # of e4m3, exponent bias 7, without infinities

_SCALE_BYTES = 4
_BF16_BYTES = 2
# The range of exponents for which both a scale and its reciprocal are normal fp32 numbers.
_LARGEST_EXPONENT = 126


def groups_of(rank: int) -> int:
    """Scales of a latent of that many values."""
    return -(-rank // GROUP)


def token_bytes(rank: int, rope: int) -> int:
    """Bytes of one token in one layer: 656 for K2."""
    return rank + groups_of(rank) * _SCALE_BYTES + rope * _BF16_BYTES


def check_dimensions(rank: int, rope: int) -> None:
    """An odd latent would put scales and keys where no fp32 or bf16 can be read."""
    assert rank > 0, f"{rank=}"
    assert rank % 4 == 0, f"{rank=} is not a multiple of 4: its scales are not aligned"
    assert rope > 0, f"{rope=}"
    assert rope % 2 == 0, f"{rope=} is odd: the next token's scales are not aligned"


def quantise_latents(latents: Tensor, *, rank: int) -> Tensor:
    """Latents as the FP8 cache keeps them.

    latents: (..., rank + rope) bf16 or fp32: the normed latent, then the rotated key. Returns (...,
    token_bytes) uint8. A code is off by at most 2^-4 of its value, and by 2^-10 of the scale where
    that is more (the subnormal codes). A value that is no finite number makes its whole group NaN.
    """
    rope = latents.shape[-1] - rank
    check_dimensions(rank, rope)
    groups = groups_of(rank)
    latent, key = latents.split((rank, rope), dim=-1)
    padded = torch.nn.functional.pad(latent.float(), (0, groups * GROUP - rank))
    grouped = padded.unflatten(-1, (groups, GROUP))
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    # largest / 448 = m * 2^e with 0.5 <= m < 1: 2^e is enough, and half of it where m is 0.5.
    part, exponent = torch.frexp(largest / LARGEST_CODE)
    exponent = (exponent - (part == 0.5).int()).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    codes = (grouped * _power_of_two(-exponent)).to(torch.float8_e4m3fn)
    scales = _power_of_two(exponent) + 0 * largest  # NaN where the largest is NaN or infinite
    return torch.cat(
        (
            codes.view(torch.uint8).flatten(-2)[..., :rank],
            scales.squeeze(-1).contiguous().view(torch.uint8),
            key.bfloat16().contiguous().view(torch.uint8),
        ),
        dim=-1,
    )


def dequantise_latents(stored: Tensor, *, rank: int) -> Tensor:
    """What quantise_latents kept: (..., token_bytes) uint8 -> (..., rank + rope) bf16, exactly."""
    groups = groups_of(rank)
    scale_bytes = groups * _SCALE_BYTES
    codes, scales, key = stored.split(
        (rank, scale_bytes, stored.shape[-1] - rank - scale_bytes), dim=-1
    )
    wide = scales.contiguous().view(torch.float32).repeat_interleave(GROUP, dim=-1)[..., :rank]
    latent = codes.contiguous().view(torch.float8_e4m3fn).float() * wide
    return torch.cat((latent.bfloat16(), key.contiguous().view(torch.bfloat16)), dim=-1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32 from its bits: no library's pow decides whether it is exact."""
    return ((exponent.int() + 127) << 23).view(torch.float32)
