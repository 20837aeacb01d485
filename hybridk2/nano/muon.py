"""Muon for matrices, AdamW for the rest: the kind of optimiser that K2 itself was trained with.

Muon (Jordan et al., 2024) steps along the orthogonalised momentum. Matrices of one shape are
orthogonalised together in one batch, experts included, so a step costs few launches.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of the reference implementation: fast, not exact.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, about. matrices: (batch, rows, columns)."""
    x = matrices.bfloat16()
    turned = x.shape[-2] > x.shape[-1]
    if turned:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if turned else x


class Muon:
    """Steps for parameters of two or three dimensions; three are batches of matrices."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rate: float,
        momentum: float = 0.95,
        weight_decay: float = 0.03,
    ) -> None:
        self.rate = rate
        self._momentum, self._weight_decay = momentum, weight_decay
        self._groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            self._groups[tuple(parameter.shape)].append(parameter)
        self._velocity = {
            shape: [torch.zeros_like(parameter) for parameter in group]
            for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        for shape, group in self._groups.items():
            gradients = [parameter.grad for parameter in group if parameter.grad is not None]
            velocity = self._velocity[shape]
            torch._foreach_lerp_(velocity, gradients, 1 - self._momentum)
            looked_ahead = torch._foreach_lerp(gradients, velocity, self._momentum)
            matrices = torch.stack(looked_ahead).view(-1, *shape[-2:])
            updates = orthogonalize(matrices).float().view(len(group), *shape).unbind()
            size = self.rate * max(1.0, shape[-2] / shape[-1]) ** 0.5
            torch._foreach_mul_(group, 1 - self.rate * self._weight_decay)
            torch._foreach_add_(group, list(updates), alpha=-size)
            for parameter in group:
                parameter.grad = None
