"""Made-up routing with known properties, for tests of placements and for the bench of replays."""

from __future__ import annotations

import numpy as np

from hybridk2.routing_trace import RoutingTrace, TraceHeader


def skewed_trace(
    tokens: int,
    *,
    layers: int,
    experts: int,
    top_k: int,
    seed: int,
    model_seed: int = 0,
    skew: float = 1.0,
    same_layers: bool = False,
) -> RoutingTrace:
    """Routing by fixed preferences of each layer plus the token's own noise.

    Preferences come from model_seed: two traces with one are two workloads of one model. skew:
    spread of the preferences, which differs by layer unless same_layers. Draws of one noise serve
    all layers, rolled, so that a million tokens take seconds.
    """
    header = TraceHeader(f"made up {model_seed}", layers, experts, top_k, "made up")
    preferences = np.random.default_rng(model_seed)
    noise = np.random.default_rng(seed)
    ids = np.empty((layers, tokens, top_k), header.dtype)
    spreads = np.full(layers, skew) if same_layers else preferences.uniform(0, 2 * skew, layers)
    liked = preferences.normal(size=(layers, experts)) * spreads[:, None]
    for begin in range(0, tokens, 4096):
        size = min(4096, tokens - begin)
        gumbel = noise.gumbel(size=(size, experts)).astype(np.float32)
        for layer in range(layers):
            scores = np.roll(gumbel, layer * 7, axis=1) + liked[layer].astype(np.float32)
            ids[layer, begin : begin + size] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    return RoutingTrace.of_one_request(header, ids)
