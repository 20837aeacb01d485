"""All that only a GPU can show, in one run of less than ten minutes.

    python bench/gpu_session.py --check

Needs a card, torch with CUDA and Triton, and a host with 100 GB; no network. Builds the extension
where it is missing. Every mechanism and kernel is checked against the reference; then one table:
handoffs, attention, resident experts, copies, overlap, and decoding and prefill of a model of K2's
shape at its full depth of 61 layers. That model's dense weights are all there; its routed experts
are those of a few layers, aliased across all layers at shifted offsets, so that the bytes read per
token are the real ones on a host that holds a fraction of the 571 GB.

What could not be seen here is listed at the end. The last line is JSON. Exit status: 0 done, 1 with
--check when a target is missed or a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

RESIDENT_PANELS = 64  # 1.6 GB of the card
RING_SLOTS = 16
CONTEXTS = (4096, 32_768, 131_072, 262_144)
DECODE_CONTEXTS = (8192, 32_768)
PROMPTS = (512, 4096)
CACHE_TOKENS = 40_960


def main() -> None:
    arguments = parse_arguments()
    began = time.perf_counter()
    build_extension()
    from hybridk2.config import KIMI_K2_THINKING
    from hybridk2.device import select_device
    from hybridk2.errors import ConfigError

    try:
        device = select_device("cuda")
    except ConfigError as error:
        print(f"no GPU session here: {error}")
        sys.exit(2)
    from gpu.table import Table

    table = Table()
    print(f"on {device.name}, {device.multiprocessors} multiprocessors", flush=True)
    run(table, KIMI_K2_THINKING, device, arguments.real_layers)
    list_unseen(table, device)
    seconds = time.perf_counter() - began
    print(f"{len(table.rows)} rows, {len(table.failed)} failed, {seconds:.0f} s")
    for row in table.failed:
        print(f"FAIL: {row.what}: {row.value:.4g} {row.unit} ({row.target})")
    report = {"bench": "gpu_session", "device": device.name, "seconds": seconds}
    print(json.dumps(report | table.as_dict()))
    if arguments.check and table.failed:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--real-layers",
        type=int,
        default=4,
        help="layers of routed experts that are really there, 9.5 GB each (default: 4)",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args()


def build_extension() -> None:
    """In place, from the sources here, where there is none yet."""
    if importlib.util.find_spec("hybridk2._native") is None:
        print("building the extension", flush=True)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, check=True)


def run(table: Any, config: Any, device: Any, real_layers: int) -> None:
    """Every part of the session, each on its own: one that fails does not end the others."""
    from gpu.kernels import (
        copy_bytes_per_second,
        measure_attention,
        measure_int8,
        measure_resident_experts,
    )

    from hybridk2.model.loading import paged_mix_for

    copy_speed = copy_bytes_per_second(device)
    table.figure("a copy within the card, read and written", copy_speed / 1e9, "GB/s")
    mix = paged_mix_for(config, device)
    attention = partial(
        measure_attention, table, device, config, mix, copy_speed, contexts=CONTEXTS
    )
    table.attempt("attention", attention)
    table.attempt("int8", partial(measure_int8, table, device, config, copy_speed))
    with ExitStack() as resources:
        began = time.perf_counter()
        host = Host(config, device, real_layers, resources)
        speed = host.experts.read_bytes_per_second()
        table.figure("host: read loop over the experts' memory", speed / 1e9, "GB/s")
        print(f"  (experts: {time.perf_counter() - began:.1f} s)", flush=True)
        resident = partial(measure_resident_experts, table, device, config, host.packed, copy_speed)
        table.attempt("resident experts", resident)
        measure_with_host(table, config, device, host, mix)


class Host:
    """The experts that are really there, some of them on the card too, and what reaches them."""

    def __init__(self, config: Any, device: Any, real_layers: int, resources: ExitStack) -> None:
        import torch
        from gpu.shaped_model import random_experts

        from hybridk2.experts.host import CardPinning, card_stream
        from hybridk2.experts.stream import ExpertStream, PinnedLayers

        self.real_layers = real_layers
        self._config, self._device = config, device
        self.experts = random_experts(config, real_layers)
        resources.callback(self.experts.close)
        layers = [range(config.n_routed_experts)] * real_layers
        pinned = PinnedLayers(self.experts, layers, CardPinning())
        resources.callback(pinned.close)
        self.stream = ExpertStream(self.experts, device, RING_SLOTS, pinned.cuts)
        resources.callback(self.stream.wait)
        self._card_stream = card_stream(device.torch_device.index)
        panels = self.stream.panels(0, range(min(RESIDENT_PANELS, config.n_routed_experts)))
        self.packed = torch.stack([panel.clone() for _, panel in panels])

    def prompts(self, dequantise: Any) -> Any:
        """Prompts' experts in two places at once, by costs measured now."""
        from hybridk2.experts.expert_costs import measure_expert_costs
        from hybridk2.experts.prefill import ExpertProducts, PrefillExperts
        from hybridk2.experts.router import ThreadRouter

        config, device, experts = self._config, self._device, self.experts
        products = ExpertProducts(experts.hidden, experts.intermediate, device, dequantise)
        some = [(0, expert) for expert in range(min(128, config.n_routed_experts))]
        costs = measure_expert_costs(experts, some, self.stream, products, device)
        host = ThreadRouter(experts, device)
        return PrefillExperts(host, device, self.stream, products, costs, config.n_routed_experts)

    def open_router(self, kind: type, **choices: Any) -> Any:
        import torch

        return kind(
            self.experts,
            self._device,
            self._card_stream,
            top_k=self._config.num_experts_per_tok,
            dtype=torch.bfloat16,
            **choices,
        )


def measure_with_host(table: Any, config: Any, device: Any, host: Host, mix: Any) -> None:
    from gpu.crossing import check_lost_server, measure_bus, measure_handoffs
    from gpu.whole_model import (
        WholeModel,
        check_equal,
        measure_decode,
        measure_overlap,
        measure_prefill,
    )

    from hybridk2.experts.handoff import HostFunctionRouter, MailboxRouter
    from hybridk2.experts.router import ThreadRouter
    from hybridk2.model.triton import int4

    kinds: list[type] = [HostFunctionRouter, MailboxRouter]
    handoffs = partial(measure_handoffs, table, device, config, host.open_router, kinds)
    table.attempt("handoffs", handoffs)
    for kind in kinds:
        lost = partial(check_lost_server, table, device, host.experts, host.open_router, kind)
        table.attempt(f"a lost server, {kind.name}", lost)
    ids = range(min(128, config.n_routed_experts))
    table.attempt("the bus", partial(measure_bus, table, device, host.stream, host.experts, ids))

    began = time.perf_counter()
    whole = WholeModel.build(config, device, host.experts, host.real_layers, mix, CACHE_TOKENS)
    print(f"  (the model: {time.perf_counter() - began:.1f} s)", flush=True)
    with ExitStack() as routers:
        opened = [host.open_router(kind, submissions=config.num_moe_layers) for kind in kinds]
        for router in opened:
            routers.callback(router.close)
        waiting = ThreadRouter(host.experts, device)
        table.attempt("equal logits", partial(check_equal, table, whole, waiting, opened))
        mailbox = opened[-1]
        overlap = partial(
            measure_overlap, table, whole, mailbox, host.packed, int4.resident_experts
        )
        table.attempt("overlap", overlap)
        for router in opened:
            decode = partial(measure_decode, table, whole, router, DECODE_CONTEXTS)
            table.attempt(f"decode by {router.name}", decode)

        def prefill() -> None:
            measure_prefill(table, whole, host.prompts(int4.dequantise), PROMPTS)

        table.attempt("prefill", prefill)


def list_unseen(table: Any, device: Any) -> None:
    """What one card on one host cannot show."""
    import torch

    capability = torch.cuda.get_device_capability(0)
    for name, needed in (
        ("A100 (sm_80)", (8, 0)),
        ("RTX 4090 (sm_89)", (8, 9)),
        ("H100, H200 (sm_90)", (9, 0)),
        ("RTX 5090, PRO 6000 (sm_120)", (12, 0)),
    ):
        if capability != needed:
            table.not_seen(f"{name}: kernels compile for it and were not run on it")
    table.not_seen("the published weights: these are random ones of the same shape")
    table.not_seen("all 571 GB of experts in one host's memory")
    table.not_seen("a card beside two NUMA nodes")
    print("unseen:")
    for what in table.unseen:
        print(f"  {what}")


if __name__ == "__main__":
    main()
