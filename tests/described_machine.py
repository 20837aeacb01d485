"""A machine that nobody measured, for tests of plans."""

from __future__ import annotations

from hybridk2.hardware import MachineProfile

# A machine with enough memory, whose speeds are all different so that mixing them up shows.
WORKSTATION = MachineProfile(
    name="a workstation",
    isa="avx512_bf16",
    cores=16,
    nodes=1,
    ram_bytes=768 * 10**9,
    process_bytes=300_000_000,
    host_read_roof_bytes_per_second=210e9,
    host_read_bytes_per_second=200e9,
    moe_bytes_per_second=190e9,
    attention_bytes_per_second=150e9,
    dense_bytes_per_second=180e9,
    head_bytes_per_second=120e9,
    latent_bytes_per_second=50e9,
    layer_overhead_seconds=1e-4,
    host_flops=3e12,
    dense_flops=2e12,
    measured=False,
)
