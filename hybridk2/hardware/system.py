"""What Linux says of this machine, and what of it slows or stops the engine, with what mends it.

Reads /proc and /sys only. Knows no measurement: those are of other modules.
"""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_GIGABYTE = 1e9
# cgroup v1 writes a number near 2^63 for "no limit".
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class SystemFacts:
    """None where the system does not say.

    cores_limit: CPUs that the cgroup's quota allows. memory_limit_bytes: of the cgroup.
    governors: CPU frequency policies in use. memlock_bytes: that a process may pin.
    nodes: CPUs of each NUMA node that has any.
    """

    processor: str
    ram_bytes: int
    available_ram_bytes: int
    nodes: tuple[tuple[int, ...], ...]
    smt_active: bool | None
    governors: tuple[str, ...]
    transparent_huge_pages: str | None
    free_gigabyte_pages: int
    numa_balancing: bool
    cores_limit: float | None
    memory_limit_bytes: int | None
    memlock_bytes: int | None
    nvidia_gpus: int

    @property
    def usable_ram_bytes(self) -> int:
        """What one process may use at most."""
        return min(self.ram_bytes, self.memory_limit_bytes or self.ram_bytes)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report. command: what mends it, empty where nothing is wrong."""

    subject: str
    state: Literal["ok", "note", "wrong"]
    found: str
    command: str = ""


def inspect_system(root: Path = Path("/")) -> SystemFacts:
    """Read what there is. root: another folder with proc and sys in it, for tests."""
    sys, proc = root / "sys", root / "proc"
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(proc / "meminfo"), re.M))
    model = re.search(r"^model name\s*:\s*(.+)$", _text(proc / "cpuinfo"), re.M)
    policies = (sys / "devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    chosen = re.search(r"\[(\w+)\]", _text(sys / "kernel/mm/transparent_hugepage/enabled"))
    smt = _text(sys / "devices/system/cpu/smt/active")
    groups = _cgroup_folders(root)
    quotas = [quota for folder in groups if (quota := _cpu_quota(folder)) is not None]
    limits = [limit for folder in groups if (limit := _memory_limit(folder)) is not None]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    nodes = (_cpu_list(_text(path / "cpulist")) for path in _node_folders(sys))
    pages = sys / "kernel/mm/hugepages/hugepages-1048576kB/free_hugepages"
    cards = proc / "driver/nvidia/gpus"
    return SystemFacts(
        processor=model.group(1).strip() if model else "unknown processor",
        ram_bytes=1024 * int(memory.get("MemTotal", 0)),
        available_ram_bytes=1024 * int(memory.get("MemAvailable", 0)),
        nodes=tuple(cpus for cpus in nodes if cpus),
        smt_active=None if not smt else smt == "1",
        governors=tuple(sorted({_text(path) for path in policies} - {""})),
        transparent_huge_pages=chosen.group(1) if chosen else None,
        free_gigabyte_pages=int(_text(pages) or 0),
        numa_balancing=_text(proc / "sys/kernel/numa_balancing") == "1",
        cores_limit=min(quotas, default=None),
        memory_limit_bytes=min(limits, default=None),
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        nvidia_gpus=len(list(cards.iterdir())) if cards.is_dir() else 0,
    )


def findings(
    facts: SystemFacts, usable_cores: int, card: str | None = None, obstacle: str = ""
) -> list[Finding]:
    """What matters to the engine. usable_cores: physical ones that this process may run on. card:
    the one that was measured; obstacle: why none could be."""
    return [
        _cores(facts, usable_cores),
        _governor(facts),
        _huge_pages(facts),
        _gigabyte_pages(facts),
        _numa(facts),
        _memory(facts),
        _memlock(facts),
        _graphics(facts, card, obstacle),
    ]


def _cores(facts: SystemFacts, usable_cores: int) -> Finding:
    smt = {True: ", SMT on: one thread per core is used", False: ", SMT off", None: ""}
    found = f"{usable_cores} physical cores usable{smt[facts.smt_active]}"
    if facts.cores_limit is not None and facts.cores_limit < usable_cores:
        return Finding(
            "cores",
            "wrong",
            f"{found}, but the cgroup's quota stops them after {facts.cores_limit:g} cores' time; "
            "threads then stand still while others wait for them",
            f"start the container with --cpus={usable_cores} or none, or give hybridk2 "
            f"--threads {max(int(facts.cores_limit), 1)}",
        )
    return Finding("cores", "ok", found)


def _governor(facts: SystemFacts) -> Finding:
    found = ", ".join(facts.governors) or "the system says nothing of one"
    if set(facts.governors) <= {"performance"}:
        return Finding("governor", "ok", found)
    return Finding(
        "governor",
        "wrong",
        f"{found}: clocks fall between two layers",
        "sudo cpupower frequency-set -g performance",
    )


def _huge_pages(facts: SystemFacts) -> Finding:
    found = facts.transparent_huge_pages
    if found in ("always", "madvise"):
        return Finding("2 MB pages", "ok", found)
    return Finding(
        "2 MB pages",
        "wrong",
        f"{found or 'not known to this kernel'}: weights lie in 4 KB pages, which costs bandwidth",
        "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    )


def _gigabyte_pages(facts: SystemFacts) -> Finding:
    free = facts.free_gigabyte_pages
    if free:
        return Finding("1 GB pages", "ok", f"{free} reserved and free; experts will lie in them")
    return Finding("1 GB pages", "ok", "none reserved; 2 MB pages serve")


def _numa(facts: SystemFacts) -> Finding:
    count = max(len(facts.nodes), 1)
    found = f"{count} node{'s' if count > 1 else ''}"
    if count > 1 and facts.numa_balancing:
        return Finding(
            "NUMA",
            "wrong",
            f"{found}; the kernel's balancing moves pages that are where they belong",
            "sudo sysctl kernel.numa_balancing=0",
        )
    return Finding("NUMA", "ok", found)


def _memory(facts: SystemFacts) -> Finding:
    found = (
        f"{facts.ram_bytes / _GIGABYTE:.1f} GB, "
        f"{facts.available_ram_bytes / _GIGABYTE:.1f} GB available"
    )
    limit = facts.memory_limit_bytes
    if limit is not None and limit < facts.ram_bytes:
        return Finding(
            "memory",
            "note",
            f"{found}, of which the cgroup allows {limit / _GIGABYTE:.1f} GB",
            "start the container with a larger --memory, or none",
        )
    return Finding("memory", "ok", found)


def _memlock(facts: SystemFacts) -> Finding:
    limit = facts.memlock_bytes
    if limit is None:
        return Finding("memlock", "ok", "unlimited")
    found = f"{limit / 1024:.0f} KB may be pinned"
    if not facts.nvidia_gpus:
        return Finding("memlock", "ok", f"{found}; only a GPU would need more")
    return Finding(
        "memlock",
        "note",
        f"{found}; copies to the GPU need pinned memory",
        "echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/hybridk2.conf, "
        "then log in again",
    )


def _graphics(facts: SystemFacts, card: str | None, obstacle: str) -> Finding:
    if not facts.nvidia_gpus:
        return Finding("GPU", "ok", "none found: nothing of a bus or a handoff to measure")
    if card is None:
        return Finding("GPU", "wrong", f"{facts.nvidia_gpus} found, none measured: {obstacle}")
    others = f" of {facts.nvidia_gpus}, the only one that is used" if facts.nvidia_gpus > 1 else ""
    return Finding("GPU", "ok", f"{card}{others}")


def _text(path: Path) -> str:
    """A small file's text without its line end; empty where there is none or it is not ours."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _node_folders(sys: Path) -> list[Path]:
    folders = (sys / "devices/system/node").glob("node[0-9]*")
    return sorted(folders, key=lambda path: int(path.name.removeprefix("node")))


def _cpu_list(text: str) -> tuple[int, ...]:
    """Such as "0-3,8" as numbers."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def _cgroup_folders(root: Path) -> list[Path]:
    """The folders whose limits hold for this process: its groups and all around them."""
    base = root / "sys/fs/cgroup"
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        top = base / controllers if controllers else base
        folder = top / path.strip("/")
        folders.append(folder)
        while folder != top:
            folder = folder.parent
            folders.append(folder)
    return folders


def _cpu_quota(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota = _text(folder / "cpu.cfs_quota_us")
        period = _text(folder / "cpu.cfs_period_us")
    if not quota.isdigit() or not period.isdigit():  # "max", "-1", or no such file
        return None
    return int(quota) / int(period)


def _memory_limit(folder: Path) -> int | None:
    text = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None
