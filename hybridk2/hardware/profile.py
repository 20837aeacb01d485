"""The machine profile: what was measured here once, for the planner and the tuner to read.

Owns the fields, the JSON file and its checks. A file that does not have exactly these fields, with
finite positive numbers, is refused by name: a plan from half a profile would be a guess.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hybridk2.durable_file import flush_folder, replace_file
from hybridk2.errors import ConfigError
from hybridk2.hardware.cards import GpuProfile

FORMAT = "hybridk2 machine"
VERSION = 2


@dataclass(frozen=True)
class MachineProfile:
    """One machine's figures. Speeds are of all usable cores together.

    ram_bytes: what a process may use at most. process_bytes: what one that runs the engine takes
    beside weights and cache: interpreter, libraries, threads and what they allocate. isa: the
    kernels that were measured.
    host_read_roof_bytes_per_second: of a plain loop over INT4 weights in host memory.
    host_read_bytes_per_second: of the experts' kernels with one token, alone.
    Decoding on the CPU, one token, weights of K2's true dimensions, time per operator left out:
    moe_bytes_per_second: a block of experts, routed and shared and router; attention_, dense_ and
    head_bytes_per_second: attention's matrices, a dense SwiGLU, lm_head as bf16.
    latent_bytes_per_second: cached bf16 latents that attention looks at.
    layer_overhead_seconds: what a layer of negligible weights takes.
    host_flops: of the experts' kernels with 64 tokens each. dense_flops: of bf16 products of 512
    rows. measured: False for a machine that was only described, whose cores and nodes are 0.
    """

    name: str
    isa: str
    cores: int
    nodes: int
    ram_bytes: int
    process_bytes: int
    host_read_roof_bytes_per_second: float
    host_read_bytes_per_second: float
    moe_bytes_per_second: float
    attention_bytes_per_second: float
    dense_bytes_per_second: float
    head_bytes_per_second: float
    latent_bytes_per_second: float
    layer_overhead_seconds: float
    host_flops: float
    dense_flops: float
    measured: bool
    gpu: GpuProfile | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in the file."""
        return asdict(self)


# What parts reach of the bandwidth of a block of experts, and bf16 operations for each of its
# bytes: bench/plan.py on 2 Zen 5 cores.
_SHARE_OF_ATTENTION, _SHARE_OF_DENSE, _SHARE_OF_HEAD, _SHARE_OF_LATENTS = 0.8, 1.0, 0.7, 0.05
_FLOPS_PER_BYTE = 20
_LAYER_OVERHEAD_SECONDS = 7.5e-4
# With torch 2.13 for CPUs, 2 threads; the same to 1 MB from run to run.
_PROCESS_BYTES = 285_000_000


def described_machine(
    read_bytes_per_second: float, ram_bytes: int, flops: float | None = None
) -> MachineProfile:
    """A machine of which little is known: the other speeds in the proportions measured here.

    read_bytes_per_second: what the experts' kernels read. flops: of bf16 products on all cores.
    """
    read = read_bytes_per_second
    flops = flops or read * _FLOPS_PER_BYTE
    return MachineProfile(
        name=f"a machine that reads {read / 1e9:g} GB/s",
        isa="avx512_bf16",
        cores=0,
        nodes=0,
        ram_bytes=ram_bytes,
        process_bytes=_PROCESS_BYTES,
        host_read_roof_bytes_per_second=read,
        host_read_bytes_per_second=read,
        moe_bytes_per_second=read,
        attention_bytes_per_second=read * _SHARE_OF_ATTENTION,
        dense_bytes_per_second=read * _SHARE_OF_DENSE,
        head_bytes_per_second=read * _SHARE_OF_HEAD,
        latent_bytes_per_second=read * _SHARE_OF_LATENTS,
        layer_overhead_seconds=_LAYER_OVERHEAD_SECONDS,
        host_flops=flops,
        dense_flops=flops,
        measured=False,
    )


def profile_path(config_home: Path) -> Path:
    """Where the profile lies under $XDG_CONFIG_HOME."""
    return config_home.expanduser() / "hybridk2" / "machine.json"


def save_profile(path: Path, profile: MachineProfile) -> None:
    """Put the profile at `path`, whole or not at all. Raises ConfigError when the disk refuses."""
    document = {"format": FORMAT, "version": VERSION, "machine": profile.as_dict()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, (json.dumps(document, indent=2) + "\n").encode())
        flush_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def load_profile(path: Path) -> MachineProfile | None:
    """The profile at `path`, None if there is none. Raises ConfigError for a damaged one."""
    try:
        # O_NONBLOCK: a named pipe in the place of the file must not hang the program.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            document = json.loads(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "not valid JSON") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _damaged(path, "not a machine profile")
    if document.get("version") != VERSION:
        raise _damaged(path, f"version {document.get('version')!r}; this program reads {VERSION}")
    values = _checked(path, "machine", document.get("machine"), MachineProfile)
    if values["gpu"] is not None:
        values["gpu"] = GpuProfile(**_checked(path, "gpu", values["gpu"], GpuProfile))
    return MachineProfile(**values)


_IS_OF_TYPE = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int and value > 0,
    "float": lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0,
}


def _checked(path: Path, what: str, found: Any, kind: type) -> dict[str, Any]:
    """`found` as the fields of the dataclass `kind`, neither more nor fewer, each of its type."""
    expected = {field.name: str(field.type) for field in fields(kind)}
    if not isinstance(found, dict) or found.keys() != expected.keys():
        raise _damaged(path, f"{what}: expected the fields {', '.join(expected)}")
    for name, type_name in expected.items():
        holds = _IS_OF_TYPE.get(type_name)
        if holds is not None and not holds(found[name]):
            raise _damaged(path, f"{what}: {name}: expected a {type_name}, found {found[name]!r}")
    return dict(found)


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path}: {why}. `hybridk2 doctor` measures this machine again")
