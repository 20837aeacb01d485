"""What a machine is: measured figures kept on disk, graphics cards by name, what Linux says of it.

Knows neither models nor how the figures are measured.
"""

from hybridk2.hardware.cards import CARDS, GpuProfile, gpu_named, gpu_of_memory
from hybridk2.hardware.profile import MachineProfile, load_profile, profile_path, save_profile

__all__ = [
    "CARDS",
    "GpuProfile",
    "MachineProfile",
    "gpu_named",
    "gpu_of_memory",
    "load_profile",
    "profile_path",
    "save_profile",
]
