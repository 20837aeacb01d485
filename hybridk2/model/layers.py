"""The parts that every layer shares: RMSNorm, rotary positions with YaRN, the SwiGLU block.

Formulas follow DeepSeek-V3's published model code, which Kimi K2 uses unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridk2.checkpoint import MlpWeights
from hybridk2.config import K2Config
from hybridk2.device import Device
from hybridk2.model.triton.int8 import Int8Linear, dequantise, quantise
from hybridk2.model.triton.int8 import linear as int8_linear

# torch's matrix products on the host keep a compiled kernel for every number of rows they meet, 0.5
# MB each: with prompts of any length the embedded model grew by 800 MB. Rows are filled up to
# multiples.
_ROWS = 32

# Sequences that are decoded side by side share matrix products of this many rows, unused ones zero.
# A row of such a product has the same bits whatever its neighbours are and wherever it stands;
# products over another number of rows round differently. On 2 Zen 5 cores in bf16, 8 rows took 5 to
# 20% longer than one on K2's matrices, as the weights are read once; 32 rows took twice as long.
DECODE_ROWS = 8


# A matrix as products take it: of the activations' dtype, or INT8 where that was asked for.
Weight = Tensor | Int8Linear


def place_matrix(weight: Tensor, device: Device, dtype: torch.dtype, int8: bool) -> Weight:
    """A matrix on the device, in the form that `linear` will read."""
    placed = device.place(weight.to(dtype))
    return quantise(placed) if int8 else placed


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x W^T. x: (tokens, columns), weight: (rows, columns), of one dtype; sums are fp32."""
    if isinstance(weight, Int8Linear):
        return int8_linear(x, weight)
    tokens = x.shape[0]
    if tokens in (1, DECODE_ROWS) or tokens % _ROWS == 0 or not x.is_cpu:
        return F.linear(x, weight)
    return F.linear(F.pad(x, (0, 0, 0, -tokens % _ROWS)), weight)[:tokens]


def exact_product(x: Tensor, weight: Weight) -> Tensor:
    """x W^T without rounding: (tokens, rows) fp32. x: (tokens, columns) bf16.

    By kernels, on a card; torch's own product that gives fp32 of bf16 has no form for the host.
    """
    from hybridk2.model.triton import few_rows  # loads Triton

    if x.shape[0] <= few_rows.MAX_ROWS:
        codes, scales = (
            (weight.codes, weight.scales) if isinstance(weight, Int8Linear) else (weight, None)
        )
        return few_rows.product(x, codes, scales, torch.float32)
    matrix = dequantise(weight) if isinstance(weight, Int8Linear) else weight
    if x.is_cpu:
        return F.linear(x.float(), matrix.float())
    return torch.mm(x, matrix.T, out_dtype=torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension.

    Normed in fp32 and rounded to x's dtype before the weight is applied, as the model was trained.
    """
    return F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight


def add_rms_norm(
    hidden: Tensor,
    branch: Tensor,
    routed: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    has_kernels: bool,
) -> tuple[Tensor, Tensor]:
    """The residual sum hidden + (branch + routed), and its norm, in one launch where there are
    kernels. branch may be overwritten.

    hidden, branch: (rows, hidden). routed: the same in fp32, rounded before it is added; None for
    none.
    """
    if has_kernels:
        from hybridk2.model.triton import elementwise  # loads Triton

        return elementwise.add_rms_norm(hidden, branch, routed, weight, eps)
    if routed is not None:
        branch = branch.add_(routed.to(branch.dtype))
    hidden = hidden + branch
    return hidden, rms_norm(hidden, weight, eps)


def yarn_inverse_frequencies(config: K2Config) -> Tensor:
    """Rotary frequencies under YaRN: (qk_rope_head_dim / 2,) fp32, radians per position.

    Dimensions that turn more than beta_fast times within the original context keep their frequency,
    those that turn less than beta_slow times are slowed by `factor`, and a ramp joins the two
    (YaRN, arXiv 2309.00071, section 3.2). The table is the same at every length.
    """
    scaling = config.rope_scaling
    dimension = config.qk_rope_head_dim

    def index_of(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dimension * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high: float = min(math.ceil(index_of(scaling.beta_slow)), dimension - 1)
    if low == high:
        high += 0.001
    # fp64 until the end: at position 262,143 one fp32 ulp of a frequency is a visible angle.
    index = torch.arange(dimension // 2, dtype=torch.float64)
    frequency = config.rope_theta ** (-2 * index / dimension)
    slowed = ((index - low) / (high - low)).clamp(0, 1)
    return (frequency * (1 - slowed) + frequency / scaling.factor * slowed).float()


class RotaryTable:
    """cos and sin for any positions, in fp32 whatever the activation dtype."""

    def __init__(self, config: K2Config, device: Device) -> None:
        self._inverse_frequencies = device.place(yarn_inverse_frequencies(config))
        self._multiplier = config.rope_scaling.cos_sin_multiplier

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: (tokens,) integers. Returns cos and sin, each (tokens, rope_dim / 2) fp32."""
        angles = positions.float()[:, None] * self._inverse_frequencies
        return angles.cos() * self._multiplier, angles.sin() * self._multiplier


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1) of x's last dimension by the angle of frequency i.

    x: (tokens, ..., rope_dim). cos, sin: (tokens, rope_dim / 2) fp32. Computed in fp32, returned in
    x's dtype and in the order of x.
    """
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[1],)
    cos, sin = cos.view(shape), sin.view(shape)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Mlp:
    """The matrices of a SwiGLU, placed."""

    gate: Weight
    up: Weight
    down: Weight


def place_mlp(weights: MlpWeights, device: Device, dtype: torch.dtype, int8: bool = False) -> Mlp:
    def place(weight: Tensor) -> Weight:
        return place_matrix(weight, device, dtype, int8)

    return Mlp(gate=place(weights.gate), up=place(weights.up), down=place(weights.down))


def swiglu(x: Tensor, weights: Mlp | MlpWeights, *, has_kernels: bool = False) -> Tensor:
    """down(silu(gate x) * (up x)): the dense layer and the shared expert. x: (tokens, hidden).

    has_kernels: what is between the products takes one launch.
    """
    gate = linear(x, weights.gate)
    if has_kernels:
        from hybridk2.model.triton import elementwise  # loads Triton

        return linear(elementwise.silu_product(gate, linear(x, weights.up)), weights.down)
    if gate.is_cpu and gate.shape[0] <= DECODE_ROWS:
        # Row by row: torch shares out more than 32,768 values among its threads and computes what
        # is left over at the end of a share by another formula, so a row's place would show.
        for row in gate:
            F.silu(row, inplace=True)
    else:
        F.silu(gate, inplace=True)
    return linear(gate * linear(x, weights.up), weights.down)
