"""The production model, C++ experts included, computes what the published model computes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridk2.checkpoint import Checkpoint, MlpWeights, RouterWeights
from hybridk2.config import K2Config
from hybridk2.device import CpuDevice
from hybridk2.experts.host import HostExperts, available_isas
from hybridk2.experts.loading import load_experts
from hybridk2.kv_cache import PagedLatentCache
from hybridk2.model.k2 import K2Model
from hybridk2.model.layers import DECODE_ROWS, swiglu, yarn_inverse_frequencies
from hybridk2.model.loading import load_model
from hybridk2.model.moe import TopKRouter
from tests.reference import Reference
from tests.test_config import K2_THINKING

VECTORS = ("pos0_eps_cfg_1e-5", "pos5000_eps_cfg_1e-5", "posgap_eps_cfg_1e-5")
# Published with the vectors: one fp32 ulp of a frequency grows with the position.
FP32_TOLERANCE = dict(zip(VECTORS, (1e-4, 1e-3, 3e-2), strict=True))


@dataclass
class Loaded:
    model: K2Model
    dtype: torch.dtype

    def cache(self) -> PagedLatentCache:
        return PagedLatentCache(self.model.config, 1024, 128, CpuDevice(), self.dtype)

    def logits(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        absorbed: bool | None = None,
        split: Sequence[int] = (),
    ) -> Tensor:
        """(tokens, vocab) logits, computed in pieces that start at 0 and at each of `split`."""
        sequence = self.cache().open(ids, repeatable=False)
        rows = []
        starts = [0, *split]
        with torch.inference_mode():
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                sequence.reserve(end - start)
                hidden = self.model.forward(
                    torch.tensor(ids[start:end]),
                    torch.tensor(positions[start:end]),
                    sequence,
                    absorbed,
                )
                rows.append(self.model.logits(hidden))
        sequence.close()
        return torch.cat(rows)


class Loader:
    """Builds each (dtype, ISA) once from one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[tuple[torch.dtype, str], Loaded] = {}
        self._experts: list[HostExperts] = []

    def __call__(self, dtype: torch.dtype, isa: str) -> Loaded:
        if (dtype, isa) not in self._loaded:
            with Checkpoint.open(self.folder) as checkpoint:
                config = checkpoint.config
                experts = HostExperts.of_model(
                    config,
                    isa=isa,
                    threads=2,
                )
                self._experts.append(experts)
                load_experts(checkpoint, experts, lambda progress: None)
                model = load_model(checkpoint, experts, CpuDevice(), dtype)
            self._loaded[dtype, isa] = Loaded(model, dtype)
        return self._loaded[dtype, isa]

    def close(self) -> None:
        for experts in self._experts:
            experts.close()


@pytest.fixture(scope="module")
def tiny(shared_dir: Path) -> Iterator[Loader]:
    loader = Loader(shared_dir / "k2/vectors/tiny")
    yield loader
    loader.close()


@pytest.fixture(scope="module")
def expected(shared_dir: Path) -> dict:
    return json.loads((shared_dir / "k2/vectors/tiny/expected.json").read_text())


@pytest.fixture(scope="module")
def small(small_checkpoint: Path) -> Iterator[Loader]:
    loader = Loader(small_checkpoint)
    yield loader
    loader.close()


def positions_of(name: str, expected: dict) -> list[int]:
    count = len(expected["ids"])
    if name.startswith("posgap"):
        return expected["posgap_positions"]
    start = 5000 if name.startswith("pos5000") else 0
    return list(range(start, start + count))


class RoundedReference(Reference):
    """The reference with every value that bf16 inference rounds moved by up to half an ulp.

    The router and the logits stay exact, as both are fp32 in production.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def _round(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=self._generator, dtype=x.dtype) * 2 - 1
        return x * (1 + noise * 2**-9)

    def linear(self, x: Tensor, name: str) -> Tensor:
        exact = super().linear(x, name)
        return exact if name.endswith(("mlp.gate.weight", "lm_head.weight")) else self._round(exact)

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return self._round(super().rms_norm(self._round(x), name, eps))


def assert_logits(found: Tensor, wanted: Tensor, tolerance: float, where: str) -> None:
    difference = (found - wanted).abs()
    worst = int(difference.max(-1).values.argmax())
    assert difference.max() <= tolerance, (
        f"{where}: token {worst} is off by {difference.max():.2e}, allowed {tolerance:.0e}"
    )
    wrong = (found.argmax(-1) != wanted.argmax(-1)).nonzero().flatten().tolist()
    assert not wrong, f"{where}: the likeliest token differs at {wrong}"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("name", VECTORS)
def test_fp32_logits_equal_the_published_vectors(
    tiny: Loader, expected: dict, name: str, absorbed: bool, isa: str
) -> None:
    found = tiny(torch.float32, isa).logits(
        expected["ids"], positions_of(name, expected), absorbed=absorbed
    )
    wanted = torch.tensor(expected[name]["logits"])
    assert_logits(found, wanted, FP32_TOLERANCE[name], f"{name}, {isa}, {absorbed=}")
    assert found.argmax(-1).tolist() == expected[name]["argmax"]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", VECTORS)
def test_decode_one_by_one_equals_prefill(
    tiny: Loader, expected: dict, name: str, isa: str
) -> None:
    ids, positions = expected["ids"], positions_of(name, expected)
    loaded = tiny(torch.float32, isa)
    prefill = loaded.logits(ids, positions, absorbed=False)
    decode = loaded.logits(ids, positions, absorbed=True, split=range(1, len(ids)))
    # Same arithmetic in another order: fp32 noise only, far below what the vectors allow.
    assert_logits(decode, prefill, 1e-4, f"{name}, {isa}")


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", VECTORS)
def test_bf16_logits_are_within_bf16_rounding(
    tiny: Loader, expected: dict, name: str, isa: str
) -> None:
    """The tolerance is what bf16 rounding does to the fp64 reference, token by token."""
    ids, positions = expected["ids"], positions_of(name, expected)
    found = tiny(torch.bfloat16, isa).logits(ids, positions)
    wanted = Reference(tiny.folder, torch.float64).forward(ids, positions).logits
    tolerance = torch.zeros(len(ids), dtype=torch.float64)
    for seed in range(16):
        rounded = RoundedReference(tiny.folder, seed).forward(ids, positions).logits
        tolerance = torch.maximum(tolerance, 2 * (rounded - wanted).abs().amax(-1))
    # A pick at a near tie makes a token's tolerance useless; most tokens must be without one.
    assert int((tolerance < 0.4).sum()) >= len(ids) / 2, tolerance.tolist()
    difference = (found - wanted).abs().amax(-1)
    beyond = (difference > tolerance).nonzero().flatten().tolist()
    assert not beyond, f"tokens {beyond}: {difference[beyond]}, allowed {tolerance[beyond]}"


def test_router_picks_and_layer_outputs_equal_the_published_vectors(
    tiny: Loader, expected: dict
) -> None:
    """Through the production layers one at a time, so that a failure names the layer."""
    block = expected["pos0_eps_cfg_1e-5"]
    ids = expected["ids"]
    loaded = tiny(torch.float32, available_isas()[0])
    model = loaded.model
    with torch.inference_mode():
        sequence = loaded.cache().open(ids, repeatable=False)
        sequence.reserve(len(ids))
        hidden = model._embedding[torch.tensor(ids)].float()
        cos, sin = model._rotary(torch.arange(len(ids)))
        for index, layer in enumerate(model.layers):
            if layer.moe is not None:
                middle = hidden + layer.attention.forward(
                    layer.attention_input(hidden), cos, sin, sequence
                )
                picks, weights = layer.moe.router(layer.feed_forward_input(middle))
                for token, wanted in enumerate(block[f"router{index}_sorted_idx_weight"]):
                    found = sorted(zip(picks[token].tolist(), weights[token].tolist(), strict=True))
                    assert [pick for pick, _ in found] == [pick for pick, _ in wanted]
                    assert [w for _, w in found] == pytest.approx([w for _, w in wanted], abs=1e-4)
            hidden = layer.forward(hidden, cos, sin, sequence)
            for token, row in (("tok0", hidden[0]), ("last", hidden[-1])):
                wanted = block[f"layer{index}_out_{token}_first8"]
                assert row[:8].tolist() == pytest.approx(wanted, abs=1e-4), f"layer {index} {token}"
        sequence.close()


def test_a_long_prompt_in_chunks_equals_the_reference(small: Loader) -> None:
    """Many key blocks, page edges and both forms of attention, against fp64."""
    generator = torch.Generator().manual_seed(3)
    config = small(torch.float32, available_isas()[0]).model.config
    ids = torch.randint(config.vocab_size, (333,), generator=generator).tolist()
    positions = list(range(len(ids)))
    wanted = Reference(small.folder, torch.float64).forward(ids, positions).logits.float()
    loaded = small(torch.float32, available_isas()[-1])
    tolerance = 2e-4 * float(wanted.abs().max())
    for absorbed in (None, False, True):
        found = loaded.logits(ids, positions, absorbed=absorbed, split=[128, 129, 200, 332])
        assert_logits(found, wanted, tolerance, f"{absorbed=}")


@pytest.mark.parametrize("threads", [1, 5, 7])
def test_a_row_of_a_wide_layer_does_not_depend_on_its_place(threads: int) -> None:
    """K2's dense layers are so wide that torch shares their activations among threads; what is left
    over at the end of a share is where rows in other places came out differently."""
    width, columns = 18_432, 64
    share = -(-DECODE_ROWS * width // threads)
    at_the_ends = torch.tensor(
        [
            (end - back) % width
            for end in range(share, DECODE_ROWS * width, share)
            for back in range(1, 17)
        ]
        or [0]
    )
    down = torch.zeros(len(at_the_ends), width)
    down[torch.arange(len(at_the_ends)), at_the_ends] = 1.0  # passes those activations through
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(30):
            gate = torch.randn(width, columns, generator=generator)
            x = torch.randn(DECODE_ROWS, columns, generator=generator)
            order = torch.randperm(DECODE_ROWS, generator=generator)
            layer = MlpWeights(gate=gate, up=gate, down=down)
            assert torch.equal(swiglu(x[order], layer), swiglu(x, layer)[order])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "factor", "beta_fast"),
    [("K2-Thinking", 64.0, 1.0), ("K2-Instruct", 32.0, 1.0), ("K2.5/2.6", 64.0, 32.0)],
)
def test_rotary_frequencies_equal_the_published_tables(
    shared_dir: Path, name: str, factor: float, beta_fast: float
) -> None:
    table = json.loads((shared_dir / "k2/vectors/rope.json").read_text())[name]
    scaling = {**K2_THINKING["rope_scaling"], "factor": factor, "beta_fast": beta_fast}  # type: ignore[dict-item]
    config = K2Config.from_dict({**K2_THINKING, "rope_scaling": scaling})
    found = yarn_inverse_frequencies(config)
    # Two fp32 ulps: the tables were computed in fp32 throughout, ours in fp64 and rounded once.
    torch.testing.assert_close(found, torch.tensor(table["inv_freq"]), rtol=2.4e-7, atol=0)


def small_router() -> TopKRouter:
    config = K2Config.from_dict({**K2_THINKING, "n_routed_experts": 4, "num_experts_per_tok": 2})
    weight = torch.eye(4, config.hidden_size, dtype=torch.bfloat16)
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    return TopKRouter(config, RouterWeights(weight=weight, bias=bias), CpuDevice())


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    x = torch.zeros(1, 7168)
    x[0, :4] = torch.tensor([3.0, 1.0, 0.0, -3.0])
    ids, weights = small_router()(x)
    assert set(ids[0].tolist()) == {3, 0}
    scores = {0: torch.tensor(3.0).sigmoid(), 3: torch.tensor(-3.0).sigmoid()}
    total = sum(scores.values())
    for expert, weight in zip(ids[0].tolist(), weights[0].tolist(), strict=True):
        assert weight == pytest.approx(float(scores[expert] / total) * 2.827, rel=1e-6)


def test_a_nan_picks_experts_in_range_and_harms_its_own_token_only() -> None:
    x = torch.randn(3, 7168, generator=torch.Generator().manual_seed(0))
    clean_ids, clean_weights = small_router()(x)
    x[1, 7] = float("nan")
    ids, weights = small_router()(x)
    assert bool(((ids >= 0) & (ids < 4)).all())
    assert bool(weights[1].isnan().all())
    for token in (0, 2):
        assert torch.equal(ids[token], clean_ids[token])
        assert torch.equal(weights[token], clean_weights[token])


def test_scores_that_all_underflow_still_give_finite_weights() -> None:
    x = torch.full((1, 7168), -1e4)
    _, weights = small_router()(x)
    assert bool(weights.isfinite().all())
