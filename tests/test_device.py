"""Choosing a device: what is in the way of a card is said, with what to do about it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridk2.device import CpuDevice, select_device
from hybridk2.errors import ConfigError


def refuse(message: str) -> Callable[[], None]:
    def init() -> None:
        raise RuntimeError(message)

    return init


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which nothing is in the way, to take things away from."""
    found = object()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "MemPool", SimpleNamespace)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    return monkeypatch


OBSTACLES: tuple[tuple[Any, str, Any, str], ...] = (
    (torch.backends.cuda, "is_built", lambda: False, "built without CUDA.*Install a CUDA build"),
    (torch.cuda, "init", refuse("Found no NVIDIA driver on your system. More"), "no NVIDIA driver"),
    (torch.cuda, "init", refuse("No CUDA GPUs are available"), "No CUDA GPUs.*nvidia-smi"),
    (torch.cuda, "get_device_capability", lambda index: (7, 5), "a card has.*7.5; 8.0 or newer"),
    (importlib.util, "find_spec", lambda name: None, "Triton is missing.*pip install triton"),
)


@pytest.mark.parametrize(("owner", "name", "instead", "message"), OBSTACLES)
def test_a_card_that_cannot_be_used_is_refused_with_the_reason(
    card: pytest.MonkeyPatch, owner: Any, name: str, instead: Any, message: str
) -> None:
    card.setattr(owner, name, instead)
    with pytest.raises(ConfigError, match=f"device cuda: .*{message}.*--device cpu"):
        select_device("cuda")


@pytest.mark.parametrize(("owner", "name", "instead", "message"), OBSTACLES)
def test_where_no_card_can_be_used_auto_takes_the_host_and_says_why(
    card: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
    instead: Any,
    message: str,
) -> None:
    card.setattr(owner, name, instead)
    with caplog.at_level("DEBUG", "hybridk2.device"):
        assert isinstance(select_device("auto"), CpuDevice)
    (record,) = caplog.records
    assert "no card is used" in record.getMessage()
    assert record.levelname == ("DEBUG" if name == "is_built" else "WARNING")


def test_a_card_that_can_be_used_is_taken_unless_the_host_is_asked_for(
    card: pytest.MonkeyPatch,
) -> None:
    for name in ("auto", "cuda"):
        device = select_device(name)  # type: ignore[arg-type]
        assert (device.name, device.torch_device.type) == ("cuda (a card)", "cuda")
        assert (device.multiprocessors, device.program_bytes) == (132, 232448)
        assert device.capability == (9, 0)
    assert select_device("cpu").name == "cpu"
