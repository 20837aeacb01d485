"""The figures behind the pictures of routing."""

from __future__ import annotations

import numpy as np

from hybridk2.routing_trace import RoutingTrace, TraceHeader
from hybridk2.tuner.routing_picture import DISTANCES, locality


def test_locality_is_that_of_each_request_whatever_ran_beside_it() -> None:
    """Two requests in turns, each with an expert of its own: all picks come again in the next token
    of the request, and none of them in the next token of the trace."""
    tokens = 40
    requests = (np.arange(tokens) % 2).astype(np.uint8)
    ids = requests[None, :, None] * 3
    header = TraceHeader("m", 1, 4, 1, "s")
    begins = requests == 0
    again, by_chance = locality(RoutingTrace(header, ids, 1, requests, begins))
    reached = [distance < tokens / 2 for distance in DISTANCES]
    np.testing.assert_array_equal(again[0, reached], 1.0)
    assert np.isnan(again[0, np.logical_not(reached)]).all()
    assert by_chance.tolist() == [0.5]
    blurred, _ = locality(RoutingTrace.of_one_request(header, ids))
    assert blurred[0, 0] == 0.0
