"""Graphics cards by name, with the numbers of their makers' data sheets.

For machines that one is about to buy, and as long as nothing has been measured on a card. What a
card reaches of them is the planner's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hybridk2.errors import ConfigError

GIBIBYTE = 1 << 30
MEBIBYTE = 1 << 20

# What pinned copies to a x16 card reach; the data sheets' 32 and 64 GB/s are not reached by any.
_PCIE_4 = 25e9
_PCIE_5 = 50e9


@dataclass(frozen=True)
class GpuProfile:
    """A graphics card. measured: whether the figures come from it or from a data sheet.

    memory_bytes: what its driver reports. bytes_per_second: of its memory; where it was measured,
    of a copy, read and written. flops: bf16 with fp32 sums, dense. bus_bytes_per_second: of copies
    from pinned host memory. handoff_seconds: a layer's tokens to the host and its sum back; an
    assumption unless measured.
    """

    name: str
    memory_bytes: int
    bytes_per_second: float
    flops: float
    bus_bytes_per_second: float
    handoff_seconds: float = 45e-6
    measured: bool = False


def _card(name: str, mebibytes: int, gigabytes: float, teraflops: float, bus: float) -> GpuProfile:
    return GpuProfile(name, mebibytes * MEBIBYTE, gigabytes * 1e9, teraflops * 1e12, bus)


# Memory as nvidia-smi reports it, in MiB; bandwidth in GB/s; bf16 TFLOP/s without sparsity.
CARDS: tuple[GpuProfile, ...] = (
    _card("RTX 3090", 24576, 936, 71, _PCIE_4),
    _card("RTX 4090", 24564, 1008, 165, _PCIE_4),
    _card("RTX 5090", 32607, 1792, 209, _PCIE_5),
    _card("RTX A6000", 49140, 768, 155, _PCIE_4),
    _card("RTX 6000 Ada", 49140, 960, 364, _PCIE_4),
    _card("L40S", 46068, 864, 362, _PCIE_4),
    _card("RTX PRO 6000", 97887, 1792, 503, _PCIE_5),
    _card("A100 80GB", 81920, 2039, 312, _PCIE_4),
    _card("H100", 81559, 3350, 989, _PCIE_5),
    _card("H200", 143771, 4800, 989, _PCIE_5),
)


def gpu_named(name: str) -> GpuProfile:
    """The card of that name; case, blanks, "NVIDIA" and "GeForce" do not matter.

    Raises ConfigError with the names that are known.
    """
    wanted = _plain(name)
    for card in CARDS:
        if wanted in (_plain(card.name), _plain(card.name).removeprefix("rtx")):
            return card
    known = ", ".join(card.name for card in CARDS)
    raise ConfigError(
        f"GPU {name!r}: expected one of {known}. For another card give its memory instead"
    )


def gpu_of_memory(memory_bytes: int) -> GpuProfile:
    """A card of which nothing but the memory is known, with the speeds of an RTX 4090."""
    slow = gpu_named("RTX 4090")
    name = f"a card of {memory_bytes / GIBIBYTE:g} GiB with the speeds of an {slow.name}"
    return GpuProfile(
        name, memory_bytes, slow.bytes_per_second, slow.flops, slow.bus_bytes_per_second
    )


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
