"""What tells one model's routing from another's: for traces and placements, which fit one model.

Owns the formula. Whether the routers lie on disk or in a loaded model, the caller knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor

from hybridk2.config import K2Config


def routing_fingerprint(config: K2Config, routers: Iterable[tuple[Tensor, Tensor]]) -> str:
    """SHA-256, in hexadecimal, of a model's MoE dimensions, every router's bias, and its weights of
    the first expert.

    routers: layer by layer the bias (experts,) and the first row (hidden,): no two models share
    them, and unlike the whole matrix they are hashed in no time.
    """
    shape = (config.num_moe_layers, config.n_routed_experts, config.num_experts_per_tok)
    digest = hashlib.sha256(repr(shape).encode())
    for values in routers:
        for tensor in values:
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()
