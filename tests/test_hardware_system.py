"""What Linux says is read from its files; what is wrong comes with the command that mends it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hybridk2.hardware import Finding, SystemFacts, findings, inspect_system

GIGABYTE = 10**9

GOOD = SystemFacts(
    processor="a processor",
    ram_bytes=768 * GIGABYTE,
    available_ram_bytes=760 * GIGABYTE,
    nodes=((0, 1, 2, 3), (4, 5, 6, 7)),
    smt_active=True,
    governors=("performance",),
    transparent_huge_pages="madvise",
    free_gigabyte_pages=0,
    numa_balancing=False,
    cores_limit=None,
    memory_limit_bytes=None,
    memlock_bytes=None,
    nvidia_gpus=0,
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


TWO_NODES = {
    "proc/cpuinfo": "processor : 0\nmodel name\t: AMD EPYC 9355\n",
    "proc/meminfo": "MemTotal:  1000000 kB\nMemAvailable:   900000 kB",
    "proc/sys/kernel/numa_balancing": "1",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: a card",
    "proc/self/cgroup": "0::/outer/inner",
    "sys/devices/system/node/node0/cpulist": "0-1,4",
    "sys/devices/system/node/node1/cpulist": "2-3",
    "sys/devices/system/node/node2/cpulist": "",
    "sys/devices/system/cpu/smt/active": "1",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance",
    "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
    "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages": "3",
    "sys/fs/cgroup/outer/cpu.max": "150000 100000",
    "sys/fs/cgroup/outer/inner/cpu.max": "max 100000",
    "sys/fs/cgroup/outer/inner/memory.max": "512000000",
}


def test_everything_is_read_from_its_file(tmp_path: Path) -> None:
    facts = inspect_system(write(tmp_path, TWO_NODES))
    assert facts.processor == "AMD EPYC 9355"
    assert (facts.ram_bytes, facts.available_ram_bytes) == (1_024_000_000, 921_600_000)
    assert facts.nodes == ((0, 1, 4), (2, 3))
    assert facts.smt_active is True
    assert facts.governors == ("performance", "powersave")
    assert facts.transparent_huge_pages == "never"
    assert facts.free_gigabyte_pages == 3
    assert facts.numa_balancing
    assert facts.nvidia_gpus == 1
    # The limit of a group around ours holds as well.
    assert facts.cores_limit == 1.5
    assert facts.memory_limit_bytes == facts.usable_ram_bytes == 512_000_000


def test_limits_of_the_first_cgroups_are_read_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/job\n1:cpu:/job",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    facts = inspect_system(write(tmp_path, files))
    assert facts.memory_limit_bytes == 1000
    assert facts.cores_limit == 0.5


def test_a_system_that_says_nothing_is_described_as_that(tmp_path: Path) -> None:
    facts = inspect_system(tmp_path)
    assert facts.processor == "unknown processor"
    assert facts.nodes == facts.governors == ()
    assert facts.smt_active is facts.transparent_huge_pages is facts.cores_limit is None


def test_this_machine_has_a_processor_and_memory() -> None:
    facts = inspect_system()
    assert facts.usable_ram_bytes > 10**8
    assert any(facts.nodes) or not Path("/sys/devices/system/node").exists()


def subject(facts: SystemFacts, name: str) -> Finding:
    (found,) = (finding for finding in findings(facts, 4) if finding.subject == name)
    return found


def test_nothing_is_wrong_with_a_good_machine() -> None:
    assert {finding.state for finding in findings(GOOD, 4)} == {"ok"}
    assert not any(finding.command for finding in findings(GOOD, 4))


@pytest.mark.parametrize(
    ("change", "name", "state", "command"),
    [
        ({"transparent_huge_pages": "never"}, "2 MB pages", "wrong", "transparent_hugepage"),
        ({"transparent_huge_pages": None}, "2 MB pages", "wrong", "transparent_hugepage"),
        ({"governors": ("performance", "schedutil")}, "governor", "wrong", "cpupower"),
        ({"numa_balancing": True}, "NUMA", "wrong", "sysctl kernel.numa_balancing=0"),
        ({"cores_limit": 2.5}, "cores", "wrong", "--threads 2"),
        ({"memory_limit_bytes": GIGABYTE}, "memory", "note", "--memory"),
        ({"memlock_bytes": 65536, "nvidia_gpus": 1}, "memlock", "note", "limits.d"),
    ],
)
def test_what_is_wrong_comes_with_the_command_that_mends_it(
    change: dict[str, object], name: str, state: str, command: str
) -> None:
    found = subject(replace(GOOD, **change), name)  # type: ignore[arg-type]
    assert found.state == state
    assert command in found.command


def test_a_quota_of_all_cores_and_balancing_on_one_node_are_fine() -> None:
    assert subject(replace(GOOD, cores_limit=4.0), "cores").state == "ok"
    one = replace(GOOD, nodes=((0, 1),), numa_balancing=True)
    assert subject(one, "NUMA").state == "ok"
    assert subject(replace(GOOD, memlock_bytes=65536), "memlock").state == "ok"
