"""The kernels between decoding's products against the operators of torch that they stand for.

Sums and products that only round are held to the same bits. Where a kernel may be off in the last
bits of fp32, before it rounds to the activations' dtype, it is held to an interval: rounding and
multiplying by a weight keep order, so what they make of both ends bounds what they may make.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridk2.model.layers import rms_norm, rotate
from tests.triton_kernels import DEVICE, INTERPRETED
from tests.triton_offline import CARDS, MOST_SHARED_BYTES, MOST_STACK_BYTES, compiled

elementwise = pytest.importorskip(
    "hybridk2.model.triton.elementwise", reason="Triton is not installed"
)

EPS_FP32 = 2.0**-23
EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float32]
BIG = 2**31  # elements: one more than a 32-bit offset reaches


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def assert_between(found: Tensor, one: Tensor, other: Tensor) -> None:
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    outside = ~((found >= low) & (found <= high))
    assert not outside.any(), f"{int(outside.sum())} values outside, first {outside.nonzero()[0]}"


def assert_normed(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """x / rms(x) * weight. A sum of n squares is off by (n + 1) eps / 2 of itself at most, its root
    by half as much; the mean's division, the reciprocal root and the product add 4 eps."""
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    off = (x.shape[-1] / 4 + 5) * EPS_FP32
    ends = (exact * (1 - off), exact * (1 + off))
    assert_between(found, *((end.to(x.dtype) * weight) for end in ends))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [7168, 1536, 37, 1])
def test_a_row_is_normed_in_fp32_and_rounded_before_its_weight(
    columns: int, rows: int, dtype: torch.dtype
) -> None:
    x, weight = random(rows, columns, dtype=dtype), random(columns, seed=1, dtype=dtype)
    found = elementwise.rms_norm(*on_device(x, weight), EPS).cpu()
    assert found.dtype == dtype
    assert_normed(found, x, weight)
    assert_normed(rms_norm(x, weight, EPS), x, weight)


def test_rows_to_be_normed_may_lie_apart() -> None:
    x, weight = random(3, 50), random(40, seed=1)
    found = elementwise.rms_norm(x.to(DEVICE)[:, :40], weight.to(DEVICE), EPS).cpu()
    assert_normed(found, x[:, :40], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [7168, 37])
@pytest.mark.parametrize("has_routed", [False, True])
def test_residual_sums_have_torchs_bits_and_are_normed(
    has_routed: bool, columns: int, rows: int, dtype: torch.dtype
) -> None:
    hidden, branch = (random(rows, columns, seed=seed, dtype=dtype) for seed in (0, 1))
    routed = random(rows, columns, seed=2, dtype=torch.float32) if has_routed else None
    weight = random(columns, seed=3, dtype=dtype)
    total, normed = elementwise.add_rms_norm(
        *on_device(hidden, branch),
        None if routed is None else routed.to(DEVICE),
        weight.to(DEVICE),
        EPS,
    )
    wanted = hidden + (branch if routed is None else branch + routed.to(dtype))
    assert torch.equal(total.cpu(), wanted)
    assert_normed(normed.cpu(), wanted, weight)


def test_a_rows_bits_do_not_depend_on_its_neighbours_and_nan_stays_its_own() -> None:
    hidden, branch = (random(4, 1536, seed=seed).to(DEVICE) for seed in (0, 1))
    routed, weight = random(4, 1536, seed=2).float().to(DEVICE), random(1536, seed=3).to(DEVICE)
    routed[2, 5] = torch.nan
    total, normed = elementwise.add_rms_norm(hidden, branch, routed, weight, EPS)
    assert total[2].isnan().sum() == 1
    assert normed[2].isnan().all()
    for row in (0, 1, 3):
        here = slice(row, row + 1)
        alone = elementwise.add_rms_norm(hidden[here], branch[here], routed[here], weight, EPS)
        assert torch.equal(alone[0], total[here])
        assert torch.equal(alone[1], normed[here])


class Token:
    """What attention's products give of some tokens, and where their latents go."""

    def __init__(self, rows: int, heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
        plain = 2 * rope
        self.compressed = random(rows, rank + rope, dtype=dtype)
        self.weight = random(rank, seed=1, dtype=dtype)
        self.q = random(rows, heads, plain + rope, seed=2, dtype=dtype)
        angles = 100 * random(rows, rope // 2, seed=3, dtype=torch.float32)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.rank, self.plain = rank, plain
        self.queries = random(rows, heads, rank + rope, seed=4, dtype=dtype)

    def compute(self, latents: Tensor, places: Tensor | None) -> Tensor:
        """Queries, whose absorbed part is there already; latents are written to."""
        queries = self.queries.to(DEVICE)
        elementwise.latents_and_queries(
            *on_device(self.compressed, self.weight, self.q, self.cos, self.sin),
            EPS,
            queries=queries,
            latents=latents,
            places=None if places is None else places.to(DEVICE),
        )
        return queries.cpu()

    def assert_latents(self, found: Tensor) -> None:
        assert_normed(found[:, : self.rank], self.compressed[:, : self.rank], self.weight)
        key = rotate(self.compressed[:, self.rank :], self.cos, self.sin)
        assert torch.equal(found[:, self.rank :], key)

    def assert_queries(self, found: Tensor) -> None:
        assert torch.equal(found[..., : self.rank], self.queries[..., : self.rank])
        rotated = rotate(self.q[..., self.plain :], self.cos, self.sin)
        assert torch.equal(found[..., self.rank :], rotated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(64, 512, 64), (3, 24, 6), (9, 1, 2)])
def test_latents_are_stored_in_their_places_and_queries_rotated(
    heads: int, rank: int, rope: int, rows: int, dtype: torch.dtype
) -> None:
    token = Token(rows, heads, rank, rope, dtype)
    latents = torch.full((20, rank + rope), torch.nan, dtype=dtype, device=DEVICE)
    places = torch.randperm(20, generator=torch.Generator().manual_seed(5))[:rows]
    token.assert_queries(token.compute(latents, places))
    token.assert_latents(latents.cpu()[places])
    assert latents.isnan().all(dim=1).sum() == 20 - rows, "a row of somebody else was written to"


def test_latents_that_are_still_to_be_encoded_are_stored_row_by_row() -> None:
    token = Token(3, 4, 32, 16, torch.bfloat16)
    latents = torch.empty(3, 48, dtype=torch.bfloat16, device=DEVICE)
    token.assert_queries(token.compute(latents, None))
    token.assert_latents(latents.cpu())


def test_padding_may_share_the_place_of_nobody() -> None:
    token = Token(3, 4, 32, 16, torch.bfloat16)
    token.compressed[1:] = 0
    latents = torch.empty(9, 48, dtype=torch.bfloat16, device=DEVICE)
    token.compute(latents, torch.tensor([2, 8, 8]))
    token.assert_latents(latents.cpu()[[2, 8, 8]])


def test_places_beyond_two_to_the_31_elements_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """4.3 GB of address space of which one row is ever touched; nor may the interpreter copy it."""
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    token = Token(1, 1, 512, 64, torch.bfloat16)
    latents = torch.empty(BIG // 576 + 8, 576, dtype=torch.bfloat16, device=DEVICE)
    place = latents.shape[0] - 1
    assert place * 576 > BIG
    token.compute(latents, torch.tensor([place]))
    token.assert_latents(latents[place:].cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2048), (8, 2048), (1, 18_432), (3, 37), (1, 1)])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_silu_is_rounded_before_the_product(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The exponential is off by (|x| + 2) eps, the sum and the division by 1 eps each."""
    gate, up = 4 * random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    gate[0, 0] = -200
    found = elementwise.silu_product(*on_device(gate, up)).cpu()
    assert found.dtype == dtype
    exact = torch.nn.functional.silu(gate.double())
    off = (gate.double().abs() + 4) * EPS_FP32
    # Below the smallest normal number it is 0 or nearly so.
    tiny = 2.0**-126
    ends = [end.to(dtype) * up for end in (exact * (1 - off) - tiny, exact * (1 + off) + tiny)]
    assert_between(found, *ends)
    assert_between(torch.nn.functional.silu(gate) * up, *ends)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_silu_of_what_is_no_finite_number_is_torchs() -> None:
    gate = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0]]).bfloat16()
    up = torch.ones_like(gate)
    found = elementwise.silu_product(*on_device(gate, up)).cpu()
    wanted = torch.nn.functional.silu(gate)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def launch_k2() -> None:
    """K2's norms, sums, latents in their places and not, and the shared expert's middle."""
    rows, dtype = 8, torch.bfloat16
    hidden, weight = torch.empty(rows, 7168, dtype=dtype), torch.empty(7168, dtype=dtype)
    elementwise.rms_norm(torch.empty(rows, 1536, dtype=dtype), weight[:1536], EPS)
    elementwise.add_rms_norm(hidden, hidden, None, weight, EPS)
    elementwise.add_rms_norm(hidden, hidden, hidden.float(), weight, EPS)
    for places in (torch.zeros(rows, dtype=torch.int64), None):
        elementwise.latents_and_queries(
            torch.empty(rows, 576, dtype=dtype),
            weight[:512],
            torch.empty(rows, 64, 192, dtype=dtype),
            torch.empty(rows, 32),
            torch.empty(rows, 32),
            EPS,
            queries=torch.empty(rows, 64, 576, dtype=dtype),
            latents=torch.empty(rows, 576, dtype=dtype),
            places=places,
        )
    middle = torch.empty(rows, 2048, dtype=dtype)
    elementwise.silu_product(middle, middle)


def test_the_kernels_compile_for_every_card_within_its_shared_memory() -> None:
    found = compiled(__name__, launch_k2.__name__)
    names = [*["_norm"] * 3, *["_latents_and_queries"] * 2, "_silu_product"]
    assert [(kernel.kernel, kernel.card) for kernel in found] == [
        (name, card) for name in names for card in CARDS
    ]
    for kernel in found:
        assert kernel.shared_bytes <= MOST_SHARED_BYTES, kernel
        assert kernel.stack_bytes <= MOST_STACK_BYTES, kernel
