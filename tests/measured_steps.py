"""Steps of an engine as a timeline would have recorded them, with times that are known exactly."""

from __future__ import annotations

from hybridk2.benchmark.figures import Benchmark, Frontier, PassFigures, Roofs, Sizes, Spread
from hybridk2.timeline import HostCall, Phase, Span, Step, StepKind

# A dense layer and two of experts, in milliseconds: 32 together, 24 of them in DENSE_PHASES.
_PHASES: tuple[tuple[Phase, int | None, float], ...] = (
    ("embedding", None, 1),
    ("attention", 0, 2),
    ("dense MLP", 0, 3),
    *(
        (phase, layer, milliseconds)
        for layer in (1, 2)
        for phase, milliseconds in (
            ("attention", 2),
            ("router", 1),
            ("handoff", 0.25),
            ("shared expert", 4),
            ("waiting", 1.5),
            ("adding", 0.25),
        )
    ),
    ("head", None, 5),
    ("sampling", None, 3),
)
STEP_MS, DENSE_MS, HOST_MS = 32.0, 24.0, 8.0
HIDDEN_SHARE = 0.75  # in each layer of the workers' 4 ms one passes while they are waited for

# At a step of one token after 99: 2 experts in 2 layers, so that they come to 1 GB/s, 2 GFLOP/s;
# dense weights and 100 latents to 1 GB/s.
SIZES = Sizes(
    expert_bytes=2_000_000,
    dense_bytes=23_000_000,
    latent_bytes=10_000,
    expert_flop=4_000_000,
    experts_per_token=2,
)


def step(
    kind: StepKind = "decode",
    tokens: int = 1,
    past_tokens: int = 99,
    *,
    began: float = 0.0,
    slower: float = 1.0,
) -> Step:
    """slower: a factor on all times. The workers begin 1 ms into the 4 ms of the shared expert, and
    end 1 ms into the 1.5 ms of waiting."""
    result = Step(kind, tokens, past_tokens, began)
    for phase, layer, milliseconds in _PHASES:
        ended = began + milliseconds * slower / 1e3
        result.spans.append(Span(phase, layer, began, ended))
        if phase == "waiting":
            assert layer is not None
            host_ended = began + slower / 1e3
            result.host_calls.append(HostCall(layer, 2, host_ended - 4 * slower / 1e3, host_ended))
        began = ended
    return result


def benchmark(model: str = "a model", contexts: tuple[int, ...] = (128, 2048)) -> Benchmark:
    """Made of such steps: at each context three runs of one token, and two chunks."""
    frontiers = []
    for context in contexts:
        slower = context / 128
        chunks = [step("prefill", 64, 64 * number, slower=slower) for number in range(2)]
        runs = [[step("decode", 1, context, slower=slower * factor)] for factor in (1, 1.1, 1.5)]
        frontiers.append(
            Frontier(
                context,
                PassFigures.of([chunks], Spread.of([2000.0, 1900.0]), SIZES),
                PassFigures.of(runs, Spread.of([31.25, 28.4, 20.8]), SIZES),
            )
        )
    return Benchmark(
        version="0.1.0",
        model=model,
        machine="a processor",
        isa="avx512_bf16",
        threads=2,
        nodes=1,
        dtype="bfloat16",
        weight_bytes=9_570_000,
        load_seconds=0.2,
        started_at="2026-01-01T00:00:00+00:00",
        roofs=Roofs(2e9, None),
        frontiers=tuple(frontiers),
    )
