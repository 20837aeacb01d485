"""Random experts as a checkpoint holds them, and their arithmetic in fp64 torch.

Written from the format alone (facts of the checkpoint, not of the panels), so that the kernels have
something independent to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridk2.checkpoint import QuantizedLinear
from hybridk2.experts.host import HostExperts, available_isas

EPS_FP32 = 2.0**-23

# Run on any CPU when asked for by name, and are never chosen: portable twins of instructions.
EMULATED_ISAS = ["amx_emulated"]


# Small, and no multiple of a tile; `loaded` uses them.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 224, 96, 6, 2


def runnable_isas() -> list[str]:
    return [*available_isas(), *EMULATED_ISAS]


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> QuantizedLinear:
    """All 16 nibble values, scales that keep sums of K2's length near 1."""
    packed = torch.randint(
        -(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int64
    )
    scale = (torch.rand(rows, columns // 32, generator=generator) + 0.5) / (4 * columns**0.5)
    return QuantizedLinear(packed.to(torch.int32), scale.bfloat16())


def dequantise(matrix: QuantizedLinear) -> Tensor:
    """(nibble - 8) * scale in fp64, lowest nibble first."""
    words = matrix.packed.long()
    nibbles = torch.stack([words >> (4 * k) & 15 for k in range(8)], dim=-1).flatten(1)
    return (nibbles - 8).double() * matrix.scale.double().repeat_interleave(32, dim=1)


@dataclass(frozen=True)
class Reference:
    """Results in fp64, and how far an fp32 computation may be from them, element by element."""

    result: Tensor
    tolerance: Tensor


class RandomLayer:
    """One layer of random experts."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.experts = [
            (
                random_matrix(intermediate, hidden, generator),
                random_matrix(intermediate, hidden, generator),
                random_matrix(hidden, intermediate, generator),
            )
            for _ in range(num_experts)
        ]
        self._dense: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def dense(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        if expert not in self._dense:
            gate, up, down = self.experts[expert]
            self._dense[expert] = dequantise(gate), dequantise(up), dequantise(down)
        return self._dense[expert]

    def load_into(self, experts: HostExperts, slot: int = 0) -> None:
        for number, matrices in enumerate(self.experts):
            experts.load_expert(slot, number, *matrices)

    def reference(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Reference:
        """The weighted sum of the experts, with a first-order bound on fp32 (and bf16) rounding.

        A sum of k products in fp32, in any order, is off by at most (k + 2) eps sum|a b| (k
        roundings of sums, one of each product, one of the scale). silu is 1-Lipschitz up to a
        factor 1.1 and its own evaluation adds 8 eps of its value. With bf16 activations the product
        silu(gate) * up is rounded to bf16 here too: only where the error reaches across a rounding
        boundary can the two differ, by the distance of the neighbours.
        """
        result = torch.zeros(x.shape[0], self.hidden, dtype=torch.float64)
        tolerance = torch.zeros_like(result)
        for expert in expert_ids.unique().tolist():
            if expert < 0:
                continue
            rows, places = (expert_ids == expert).nonzero(as_tuple=True)
            share, bound = self._expert(expert, x[rows])
            weight = weights[rows, places].double().unsqueeze(1)
            result.index_add_(0, rows, weight * share)
            tolerance.index_add_(
                0, rows, weight.abs() * (bound + (expert_ids.shape[1] + 2) * EPS_FP32 * share.abs())
            )
        return Reference(result, tolerance)

    def _expert(self, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, down = self.dense(expert)
        exact = x.double()
        factor = (self.hidden + 2) * EPS_FP32
        g, g_error = exact @ gate.T, factor * (exact.abs() @ gate.abs().T)
        u, u_error = exact @ up.T, factor * (exact.abs() @ up.abs().T)
        silu = torch.nn.functional.silu(g)
        product = silu * u
        error = (1.1 * g_error + 8 * EPS_FP32 * silu.abs()) * (u.abs() + u_error)
        error = error + silu.abs() * u_error + EPS_FP32 * product.abs()
        middle = product
        if x.dtype == torch.bfloat16:
            # Rounded alike, unless a rounding boundary lies within the error: then one ulp apart.
            middle, low, high = (
                v.bfloat16().double() for v in (product, product - error, product + error)
            )
            error = torch.maximum((high - middle).abs(), (low - middle).abs())
        result = middle @ down.T
        down_error = (self.intermediate + 2) * EPS_FP32 * (middle.abs() @ down.abs().T)
        return result, down_error + error @ down.abs().T


def random_routing(
    tokens: int, num_experts: int, top_k: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(tokens, top_k) different experts per token and their weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
    return ids.int(), torch.rand(tokens, top_k, generator=generator) + 0.1


def random_activations(tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compute(experts: HostExperts, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    return experts.wait(experts.submit(0, x, expert_ids, weights))


def assert_within(actual: Tensor, reference: Reference) -> None:
    """Every element within its own tolerance; a failure names the worst one."""
    excess = (actual.double() - reference.result).abs() - reference.tolerance
    worst = int(excess.nan_to_num(float("inf")).argmax())
    row, column = divmod(worst, actual.shape[1])
    assert excess.flatten()[worst] <= 0, (
        f"token {row}, column {column}: expected {reference.result[row, column]:.9g} within "
        f"{reference.tolerance[row, column]:.3g}, found {actual[row, column]:.9g}"
    )


def loaded(layer: RandomLayer, **options: object) -> HostExperts:
    """The layer's experts, ready to compute. options: those of HostExperts."""
    experts = HostExperts(1, EXPERTS, HIDDEN, INTERMEDIATE, **options)  # type: ignore[arg-type]
    layer.load_into(experts)
    return experts
