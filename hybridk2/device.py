"""Where the dense part of the model computes, and how tensors cross to the host.

The model is written against `Device`; the routed experts always live on the host. The only file
that may say torch.cuda. A GPU is a second implementation of the same four members.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hybridk2.config import DeviceName
from hybridk2.errors import ConfigError


class Device(Protocol):
    """A place for weights, caches and dense arithmetic."""

    name: str
    torch_device: torch.device

    def place(self, tensor: Tensor) -> Tensor:
        """The same values on this device; no copy when they are there already."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """The same values, contiguous in host memory, ready to be read by the host's workers."""


class CpuDevice:
    """The host itself: tensors cross without a copy."""

    name = "cpu"
    torch_device = torch.device("cpu")

    def place(self, tensor: Tensor) -> Tensor:
        return tensor

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous()


def select_device(name: DeviceName) -> Device:
    """The device of that name. Raises ConfigError when this version cannot compute there."""
    if name == "cuda":
        raise ConfigError(
            "device cuda: this version computes on the CPU only. Use --device cpu (or leave it out)"
        )
    return CpuDevice()
