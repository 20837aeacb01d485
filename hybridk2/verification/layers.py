"""Chosen decoder layers, part by part, through the engine and through transformers.

Every part gets the same inputs on both sides, so that a fault is found where it is and not in all
that follows; then the whole layer runs from end to end. Expected values are transformers' in fp32,
what is allowed follows from transformers' in bf16 (see `comparison`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybridk2.checkpoint import Checkpoint
from hybridk2.config import K2Config
from hybridk2.verification.comparison import (
    DTYPES,
    MARGIN,
    Mode,
    PartReport,
    compare,
    compare_positions,
    compare_routing,
    equal_picks,
    fp32_share,
    logit_rounding,
    tolerance,
)
from hybridk2.verification.engine_side import EngineLayer, PickedExperts
from hybridk2.verification.expectation import LayerExpectation, expect_layer
from hybridk2.verification.probe import Probe, check_request, make_probe
from hybridk2.verification.published import PublishedWeights


@dataclass(frozen=True)
class LayerReport:
    """One layer in both modes.

    kind: "dense" or "MoE". isa: of the experts' kernels, None for a dense layer. experts_hit: how
    many routed experts the tokens picked. positions: of the tokens, in their order.
    """

    layer: int
    kind: str
    isa: str | None
    experts_hit: int
    positions: tuple[int, ...]
    seconds: float
    parts: tuple[PartReport, ...]

    @property
    def passed(self) -> bool:
        return all(part.passed for part in self.parts)


def verify_layers(
    checkpoint: Checkpoint,
    layers: Sequence[int],
    *,
    tokens: int = 12,
    seed: int = 0,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[LayerReport]:
    """Compare these layers in fp32 and in bf16. on_layer: told before each.

    Raises RequestError for a layer or a number of tokens that the model does not have.
    """
    check_request(checkpoint.config, layers, tokens)
    weights = PublishedWeights(checkpoint.folder)
    try:
        probe = make_probe(weights, checkpoint.config, tokens, seed)
        reports = []
        for layer in layers:
            on_layer(layer)
            with torch.inference_mode():
                reports.append(_verify_layer(checkpoint, weights, layer, probe))
        return reports
    finally:
        weights.close()


def _verify_layer(
    checkpoint: Checkpoint, weights: PublishedWeights, layer: int, probe: Probe
) -> LayerReport:
    start = time.monotonic()
    expected = expect_layer(checkpoint.folder, weights, layer, probe)
    isa, hit = None, 0
    if checkpoint.config.is_moe(layer):
        kind = "MoE"
        with PickedExperts(checkpoint, layer) as experts:
            parts = _compare_layer(checkpoint, layer, probe, expected, experts)
            isa, hit = experts.isa, experts.num_held
    else:
        kind = "dense"
        parts = _compare_layer(checkpoint, layer, probe, expected, None)
    positions = tuple(probe.positions.tolist())
    seconds = time.monotonic() - start
    return LayerReport(layer, kind, isa, hit, positions, seconds, tuple(parts))


def _compare_layer(
    checkpoint: Checkpoint,
    layer: int,
    probe: Probe,
    expected: LayerExpectation,
    experts: PickedExperts | None,
) -> list[PartReport]:
    layer_weights = checkpoint.layer(layer)
    parts = []
    for mode, dtype in DTYPES.items():
        engine = EngineLayer(checkpoint, layer_weights, layer, experts, dtype)
        comparison = _Comparison(checkpoint.config, mode, probe, expected, engine)
        parts += comparison.shared_parts()
        if experts is not None:
            parts += comparison.routed_parts()
        parts.append(comparison.layer_output(experts))
    return parts


class _Comparison:
    """The engine's layer against the expectation, in one mode."""

    def __init__(
        self,
        config: K2Config,
        mode: Mode,
        probe: Probe,
        expected: LayerExpectation,
        engine: EngineLayer,
    ) -> None:
        self._config = config
        self._mode = mode
        self._probe = probe
        self._layer = expected
        self._expected = expected.modes[mode]
        self._engine = engine
        frequencies = len(expected.rotary.inverse_frequencies)
        self._cos = expected.rotary.cos[0, :, :frequencies]
        self._sin = expected.rotary.sin[0, :, :frequencies]

    def shared_parts(self) -> list[PartReport]:
        """What every kind of layer has. Attention gets transformers' cos and sin."""
        inputs, module = self._expected.inputs, self._engine.module
        attended = {
            form: self._engine.attention(inputs.attention, self._cos, self._sin, absorbed=absorbed)
            for form, absorbed in (("expanded", False), ("absorbed", True))
        }
        config = self._config
        heads = config.num_attention_heads * config.v_head_dim
        widest = max(config.hidden_size, heads, config.q_lora_rank, config.kv_lora_rank)
        feed_forward = "shared expert" if module.moe else "dense MLP"
        width = config.moe_intermediate_size * config.n_shared_experts
        width = width if module.moe else config.intermediate_size
        return [
            compare_positions(
                self._mode,
                self._engine.positions(self._probe.positions),
                (self._cos, self._sin),
                self._probe.positions,
                self._layer.rotary.inverse_frequencies,
            ),
            self._part(
                "input norm",
                "attention_norm",
                module.attention_input(inputs.hidden),
                config.hidden_size,
            ),
            *(
                self._part(f"attention ({form})", "attention", found, widest)
                for form, found in attended.items()
            ),
            self._part(
                "post-attention norm",
                "feed_forward_norm",
                module.feed_forward_input(inputs.middle),
                config.hidden_size,
            ),
            self._part(
                feed_forward,
                "dense_or_shared",
                self._engine.dense_or_shared(inputs.feed_forward),
                max(config.hidden_size, width),
            ),
        ]

    def routed_parts(self) -> list[PartReport]:
        """Router, then routed experts with transformers' picks and weights."""
        inputs, expected = self._expected.inputs, self._expected
        routing, moe = expected.outputs.routing, self._engine.module.moe
        assert moe is not None
        assert routing is not None
        assert expected.selection_scores is not None
        found = self._engine.routed_experts(
            inputs.feed_forward, routing.expert_ids, routing.weights
        )
        products = max(self._config.hidden_size, self._config.moe_intermediate_size)
        return [
            *compare_routing(
                self._mode,
                moe.router(inputs.feed_forward),
                (routing.expert_ids, routing.weights),
                expected.selection_scores,
                self._logit_tolerance(),
            ),
            self._part("routed experts", "routed", found, products),
        ]

    def layer_output(self, experts: PickedExperts | None) -> PartReport:
        """The whole layer, over the tokens that went to the same experts on both sides.

        A token may only go elsewhere when its experts' scores are closer than rounding moves them.
        """
        config = self._config
        hidden = self._expected.inputs.hidden
        found = self._engine.forward(hidden, self._cos, self._sin)
        expected = self._layer.output
        heads = config.num_attention_heads * config.v_head_dim
        widths = [config.hidden_size, heads, config.q_lora_rank, config.kv_lora_rank]
        widths.append(config.intermediate_size if experts is None else config.moe_intermediate_size)
        allowed = tolerance(self._mode, self._layer.output_effect, max(widths))
        if experts is None:
            return compare("layer output", self._mode, found, expected, allowed)
        exact = self._layer.modes["float32"]
        assert exact.outputs.routing is not None
        assert exact.selection_scores is not None
        score_tolerance = MARGIN * self._layer.score_effect
        if self._mode == "float32":
            score_tolerance *= fp32_share(max(widths))
            score_tolerance += self._logit_tolerance() / 4
        same, tied = equal_picks(
            experts.last_expert_ids,
            exact.outputs.routing.expert_ids,
            exact.selection_scores,
            score_tolerance,
        )
        if not bool((same | tied).all()) or not bool(same.any()):
            token = int((same | tied).int().argmin())
            return PartReport(
                "layer output",
                self._mode,
                passed=False,
                max_absolute_error=math.inf,
                max_relative_error=math.inf,
                tolerance=allowed,
                worst_token=token,
                note=f"token {token} went to other experts than transformers sends it to",
            )
        rows = torch.where(same)[0]
        note = f"{int(tied.sum())} tokens left out: ties within rounding" if tied.any() else ""
        report = compare("layer output", self._mode, found[rows], expected[rows], allowed, note)
        return replace(report, worst_token=int(rows[report.worst_token]))

    def _part(self, name: str, field: str, found: Tensor, products: int) -> PartReport:
        allowed = tolerance(self._mode, self._layer.effects[field], products)
        return compare(name, self._mode, found, getattr(self._expected.outputs, field), allowed)

    def _logit_tolerance(self) -> float:
        assert self._expected.logit_spread is not None
        return logit_rounding(self._expected.logit_spread, self._config.hidden_size)
