"""What transformers makes of a layer's inputs, and how much bf16 moves it.

Runs the published layer four times: from end to end in fp32 and in bf16, and part by part on the
fp32 run's inputs rounded to bf16, in fp32 and in bf16. The first and the third give the expected
values of the two modes, the others what rounding to bf16 does to them. Knows nothing of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from hybridk2.verification.comparison import Mode, difference, equal_picks
from hybridk2.verification.probe import Probe
from hybridk2.verification.published import (
    ExpertJob,
    PublishedLayer,
    PublishedWeights,
    RotaryTables,
    Routing,
    published_config,
    rotary_tables,
    routed_experts,
)


@dataclass(frozen=True)
class PartInputs:
    """Inputs of each part, all (tokens, hidden)."""

    hidden: Tensor  # of the layer, and of its first norm
    attention: Tensor  # normed
    middle: Tensor  # the residual stream after attention, input of the second norm
    feed_forward: Tensor  # normed

    def to(self, dtype: torch.dtype) -> PartInputs:
        return PartInputs(*(getattr(self, field.name).to(dtype) for field in fields(self)))


@dataclass(frozen=True)
class PartOutputs:
    """Outputs of each part, (tokens, hidden) but for the routing. MoE layers have the last two."""

    attention_norm: Tensor
    attention: Tensor
    feed_forward_norm: Tensor
    dense_or_shared: Tensor
    routing: Routing | None
    routed: Tensor | None = None


@dataclass(frozen=True)
class ModeExpectation:
    """What one mode's parts should give for these inputs.

    selection_scores: (tokens, experts) fp64, what the router chooses by. logit_spread: what the
    rounding of its logits is relative to. Both None for a dense layer.
    """

    inputs: PartInputs
    outputs: PartOutputs
    selection_scores: Tensor | None
    logit_spread: float | None


@dataclass(frozen=True)
class LayerExpectation:
    """Everything the engine's layer is compared with.

    effects: by field of PartOutputs, the largest relative error of transformers' own bf16. output:
    (tokens, hidden) fp32 of the whole layer; output_effect likewise, over the tokens that keep
    their experts in bf16. score_effect: how far bf16 moves a selection score in the whole layer.
    """

    rotary: RotaryTables
    modes: dict[Mode, ModeExpectation]
    effects: dict[str, float]
    output: Tensor
    output_effect: float
    score_effect: float


def expect_layer(
    folder: Path, weights: PublishedWeights, layer: int, probe: Probe
) -> LayerExpectation:
    config = published_config(folder)
    rotary = rotary_tables(config, probe.positions)
    exact = PublishedLayer(config, weights, layer, torch.float32)
    rounding = PublishedLayer(config, weights, layer, torch.bfloat16)

    exact_inputs = _walk(exact, probe.hidden, rotary)
    rounding_inputs = _walk(rounding, probe.hidden, rotary)
    bf16_inputs = exact_inputs.to(torch.bfloat16)
    fp32_parts = _outputs(exact, exact_inputs, rotary)
    bf16_parts = _outputs(exact, bf16_inputs.to(torch.float32), rotary)
    # The router's part in the effect of bf16 is measured on the whole layer; here both runs of the
    # experts get the same picks.
    bf16_rounded = replace(_outputs(rounding, bf16_inputs, rotary), routing=bf16_parts.routing)
    rounding_parts = _outputs(rounding, rounding_inputs, rotary)

    runs = [
        (exact_inputs, fp32_parts),
        (bf16_inputs.to(torch.float32), bf16_parts),
        (bf16_inputs, bf16_rounded),
        (rounding_inputs, rounding_parts),
    ]
    fp32_parts, bf16_parts, bf16_rounded, rounding_parts = _with_experts(
        config, weights, layer, runs
    )

    output = _layer_output(exact_inputs, fp32_parts)
    rounded_output = _layer_output(rounding_inputs, rounding_parts)
    kept = torch.ones(len(output), dtype=torch.bool)
    score_effect = 0.0
    if fp32_parts.routing is not None and rounding_parts.routing is not None:
        scores = exact.selection_scores(exact_inputs.feed_forward)
        moved = rounding.selection_scores(rounding_inputs.feed_forward) - scores
        score_effect = float(moved.abs().max())
        kept, _ = equal_picks(
            rounding_parts.routing.expert_ids, fp32_parts.routing.expert_ids, scores, 0.0
        )
    return LayerExpectation(
        rotary,
        {
            "float32": _mode(exact, exact_inputs, fp32_parts),
            "bfloat16": _mode(exact, bf16_inputs, bf16_parts),
        },
        _effects(bf16_rounded, bf16_parts),
        output,
        difference(rounded_output[kept], output[kept]).relative if bool(kept.any()) else 0.0,
        score_effect,
    )


def _with_experts(
    config: DeepseekV3Config,
    weights: PublishedWeights,
    layer: int,
    runs: list[tuple[PartInputs, PartOutputs]],
) -> list[PartOutputs]:
    """The runs' outputs with the routed experts added, for dense layers as they are."""
    jobs = [
        ExpertJob(inputs.feed_forward, outputs.routing)
        for inputs, outputs in runs
        if outputs.routing is not None
    ]
    if not jobs:
        return [outputs for _, outputs in runs]
    sums = routed_experts(config, weights, layer, jobs)
    return [replace(outputs, routed=out) for (_, outputs), out in zip(runs, sums, strict=True)]


def _walk(layer: PublishedLayer, hidden: Tensor, rotary: RotaryTables) -> PartInputs:
    """From the layer's input to its feed-forward part, in the layer's dtype throughout."""
    hidden = hidden.to(layer.dtype)
    attention_input = layer.attention_input(hidden)
    middle = hidden + layer.attention(attention_input, rotary.cos, rotary.sin)
    return PartInputs(hidden, attention_input, middle, layer.feed_forward_input(middle))


def _outputs(layer: PublishedLayer, inputs: PartInputs, rotary: RotaryTables) -> PartOutputs:
    return PartOutputs(
        attention_norm=layer.attention_input(inputs.hidden),
        attention=layer.attention(inputs.attention, rotary.cos, rotary.sin),
        feed_forward_norm=layer.feed_forward_input(inputs.middle),
        dense_or_shared=layer.dense_or_shared(inputs.feed_forward),
        routing=layer.route(inputs.feed_forward) if layer.is_moe else None,
    )


def _layer_output(inputs: PartInputs, outputs: PartOutputs) -> Tensor:
    """As DeepseekV3MoE and DeepseekV3DecoderLayer add up."""
    feed_forward = outputs.dense_or_shared
    if outputs.routed is not None:
        feed_forward = outputs.routed + feed_forward
    return inputs.middle + feed_forward


def _mode(layer: PublishedLayer, inputs: PartInputs, outputs: PartOutputs) -> ModeExpectation:
    if not layer.is_moe:
        return ModeExpectation(inputs, outputs, None, None)
    x = inputs.feed_forward
    return ModeExpectation(inputs, outputs, layer.selection_scores(x), layer.logit_spread(x))


def _effects(rounded: PartOutputs, expected: PartOutputs) -> dict[str, float]:
    effects = {}
    for field in fields(PartOutputs):
        value = getattr(expected, field.name)
        if isinstance(value, Tensor):
            effects[field.name] = difference(getattr(rounded, field.name), value).relative
    return effects
