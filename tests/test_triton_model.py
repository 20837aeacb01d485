"""A whole model with the card's kernels against the same one computed with torch on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridk2.checkpoint import Checkpoint
from hybridk2.device import CpuDevice, Device, select_device
from hybridk2.experts.host import HostExperts
from hybridk2.experts.loading import load_experts
from hybridk2.kv_cache import LatentFormat, PagedLatentCache
from hybridk2.model.attention import PagedMix
from hybridk2.model.k2 import DecoderLayer, K2Model
from hybridk2.model.loading import fp8_latents, load_model, paged_mix_for
from hybridk2.model.triton import int8
from tests.triton_kernels import INTERPRETED

TOKENS = 70  # a page and a part of one
DECODED = 3
# What torch computes of norms, sums, rotations, the SwiGLU and the router where there are no
# kernels for it.
ELEMENTWISE = {"rms_norm", "mul", "add", "add_", "sub", "stack", "cat", "silu_"} | {
    *("sigmoid", "topk", "gather", "where")
}


class KernelDevice(CpuDevice):
    """The host as a device whose kernels are the card's."""

    has_kernels = True
    multiprocessors = 4


CARD: Device = KernelDevice() if INTERPRETED else select_device("cuda")


class Workbench:
    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        config = self.config = self.checkpoint.config
        self.experts = HostExperts.of_model(
            config,
            threads=1,
        )
        load_experts(self.checkpoint, self.experts, lambda progress: None)
        # A seed of which no token is so near a tie of the router that bf16 noise decides it.
        generator = torch.Generator().manual_seed(2)
        size = (2, TOKENS + DECODED)
        self.ids = torch.randint(config.vocab_size, size, generator=generator).tolist()

    def model(
        self,
        dtype: torch.dtype,
        paged_mix: PagedMix | None = None,
        *,
        device: Device = CARD,
        int8: bool = False,
    ) -> K2Model:
        return load_model(
            self.checkpoint, self.experts, device, dtype, paged_mix=paged_mix, int8=int8
        )

    def logits(
        self,
        model: K2Model,
        dtype: torch.dtype,
        latent_format: LatentFormat | None = None,
        device: Device = CARD,
    ) -> Tensor:
        """(2 sequences, after a prompt in two chunks and after each decoded token, vocab)."""
        cache = PagedLatentCache(self.config, 1024, 64, device, dtype, latent_format)
        sequences, after = [], []
        with torch.inference_mode():
            for ids in self.ids:
                sequence = cache.open([], repeatable=True)
                for begin, end in ((0, 64), (64, TOKENS)):
                    sequence.reserve(end - begin)
                    tokens, positions = torch.tensor(ids[begin:end]), torch.arange(begin, end)
                    hidden = model.forward(tokens, positions, sequence)
                sequences.append(sequence)
                after.append(model.logits(hidden[-1:]).cpu())
            steps = [torch.cat(after)]
            for step in range(TOKENS, TOKENS + DECODED):
                steps.append(self._decode(model, sequences, [ids[step] for ids in self.ids]))
        return torch.stack(steps, dim=1)

    def _decode(self, model: K2Model, sequences: Sequence, tokens: list[int]) -> Tensor:
        for sequence in sequences:
            sequence.reserve(1)
        logits = model.decode(tokens, sequences, rows_are_independent=False).clone()
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.advance([token])
        return logits


@pytest.fixture(scope="module")
def workbench(small_checkpoint: Path) -> Iterator[Workbench]:
    made = Workbench(small_checkpoint)
    yield made
    made.experts.close()
    made.checkpoint.close()


@pytest.fixture(scope="module")
def rounding(workbench: Workbench) -> tuple[Tensor, float]:
    """The bf16 model's logits, and how far bf16 alone moves any: kernels round at as many places,
    to the same dtype, so they may be off by as much again."""
    host = CpuDevice()
    exact, rounded = (
        workbench.logits(workbench.model(dtype, device=host), dtype, device=host)
        for dtype in (torch.float32, torch.bfloat16)
    )
    moved = float((rounded - exact).abs().max())
    assert 0 < moved < 0.2 * float(exact.abs().max()), "bf16 alone makes this test useless"
    return rounded, 2 * moved


def test_attention_by_kernels_gives_the_models_logits(
    workbench: Workbench, rounding: tuple[Tensor, float]
) -> None:
    wanted, allowed = rounding
    mix = paged_mix_for(workbench.config, CARD)
    assert mix is not None
    calls: list[int] = []

    def counted(*inputs: Tensor) -> Tensor:
        calls.append(len(inputs[0]))
        return mix(*inputs)

    found = workbench.logits(workbench.model(torch.bfloat16, counted), torch.bfloat16)
    rows = min(rows for rows in CARD.decode_rows if rows >= len(workbench.ids))
    assert calls == [rows] * DECODED * workbench.config.num_hidden_layers
    assert float((found - wanted).abs().max()) <= allowed


class Operators(TorchDispatchMode):
    """Which of torch's operators ran, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [CARD, CpuDevice()], ids=["kernels", "host"])
def test_between_a_layers_products_kernels_leave_nothing_to_torch(
    workbench: Workbench, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = Operators()
    decode = DecoderLayer.decode

    def watched(*inputs: Any) -> tuple[Tensor, Tensor]:
        with operators:
            return decode(*inputs)

    monkeypatch.setattr(DecoderLayer, "decode", watched)
    mix = paged_mix_for(workbench.config, device)
    workbench.logits(
        workbench.model(torch.bfloat16, mix, device=device), torch.bfloat16, device=device
    )
    if device.has_kernels:
        assert not operators.names & ELEMENTWISE
    else:
        assert operators.names >= ELEMENTWISE, "torch has other names for them now"


def test_fp8_latents_pass_the_cache_the_kernel_and_flash_attention(workbench: Workbench) -> None:
    """Against the same model over a bf16 cache of latents that were rounded to fp8 and back."""
    config = workbench.config
    fp8 = fp8_latents(config)
    rounded = LatentFormat(
        torch.bfloat16, config.latent_dim, lambda latents: fp8.decode(fp8.encode(latents))
    )
    model = workbench.model(torch.bfloat16, paged_mix_for(config, CARD))
    found = workbench.logits(model, torch.bfloat16, fp8)
    # The kernel computes with exactly what is stored, in the same order.
    assert torch.equal(found, workbench.logits(model, torch.bfloat16, rounded))
    assert not torch.equal(found, workbench.logits(model, torch.bfloat16))


def test_int8_weights_compute_what_their_dequantised_values_do(
    workbench: Workbench, rounding: tuple[Tensor, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few rows no product is rounded, of many each weight is rounded once: bf16's own noise."""
    _, allowed = rounding
    found = workbench.logits(workbench.model(torch.bfloat16, int8=True), torch.bfloat16)

    def rounded(weight: Tensor) -> Tensor:
        return int8.dequantise(int8.quantise(weight))

    monkeypatch.setattr("hybridk2.model.layers.quantise", rounded)
    wanted = workbench.logits(workbench.model(torch.bfloat16, int8=True), torch.bfloat16)
    assert float((found - wanted).abs().max()) <= allowed
    plain = workbench.logits(workbench.model(torch.bfloat16), torch.bfloat16)
    assert not torch.equal(wanted, plain)


def test_a_device_without_kernels_gets_none(workbench: Workbench) -> None:
    assert paged_mix_for(workbench.config, CpuDevice()) is None


def test_a_format_has_the_bytes_that_plans_count(workbench: Workbench) -> None:
    from hybridk2.planner import ModelSizes

    sizes = ModelSizes.from_config(workbench.config)
    layers = workbench.config.num_hidden_layers
    assert fp8_latents(workbench.config).width * layers == sizes.latent_bytes("fp8")


def test_kernels_are_loaded_for_a_device_that_has_them_alone() -> None:
    """Users without a card do not have Triton: nothing that the CPU needs may import it."""
    import subprocess
    import sys

    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import hybridk2.engine, hybridk2.model.loading, hybridk2.model.triton.int8\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
