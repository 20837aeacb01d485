"""What a machine is: measured figures kept on disk, graphics cards by name, what Linux says of it.

Knows neither models nor how the figures are measured.
"""

from hybridk2.hardware.cards import CARDS, GpuProfile, gpu_named, gpu_of_memory
from hybridk2.hardware.profile import (
    MachineProfile,
    described_machine,
    load_profile,
    profile_path,
    save_profile,
)
from hybridk2.hardware.system import Finding, SystemFacts, findings, inspect_system

__all__ = [
    "CARDS",
    "Finding",
    "GpuProfile",
    "MachineProfile",
    "SystemFacts",
    "described_machine",
    "findings",
    "gpu_named",
    "gpu_of_memory",
    "inspect_system",
    "load_profile",
    "profile_path",
    "save_profile",
]
