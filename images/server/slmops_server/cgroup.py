"""What this process may use: CPUs and memory from cgroup v1 or v2, else from the machine.

A container sees its own group as the root. Without a namespace of its own (a systemd unit, docker's --cgroupns=host)
the group is further down, and what any group above it is limited to holds as well.
"""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60  # v1 writes a huge page-rounded number for "no limit"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _levels(mount: Path, own: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of those above it; controller is "" for v2."""
    groups = [line.split(":", 2) for line in (_read(own) or "").splitlines()]
    path = next((path for _, names, path in groups if controller in names.split(",")), "/").strip("/")
    here = mount if ".." in path.split("/") else mount / path  # outside of what is mounted
    yield here
    yield from (above for above in here.parents if above.is_relative_to(mount))


def cpu_limit(root: Path = ROOT, own: Path = OWN) -> float:
    """CPUs this process may use: the smaller of the CFS quota and the affinity mask (0.5 is half a CPU)."""
    limits = [float(len(os.sched_getaffinity(0)))]
    for level in _levels(root, own, ""):  # v2: "max 100000" or "150000 100000"
        quota, _, period = (_read(level / "cpu.max") or "max").partition(" ")
        if quota != "max":
            limits.append(int(quota) / int(period or 100000))
    for name in ("cpu", "cpu,cpuacct"):  # v1: -1 is no limit
        for level in _levels(root / name, own, "cpu"):
            quota, period = (_read(level / f"cpu.cfs_{what}_us") or "0" for what in ("quota", "period"))
            if int(quota) > 0 and int(period) > 0:
                limits.append(int(quota) / int(period))
    return min(limits)


def threads(root: Path = ROOT) -> int:
    """Whole CPUs, at least one."""
    return max(1, int(cpu_limit(root)))


def memory_limit(root: Path = ROOT, own: Path = OWN) -> int:
    """Bytes this process may use: the cgroup's limit, else the machine's memory."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    files = [level / "memory.max" for level in _levels(root, own, "")]
    files += [level / "memory.limit_in_bytes" for level in _levels(root / "memory", own, "memory")]
    for file in files:
        text = _read(file)
        if text and text != "max" and int(text) < UNLIMITED:
            limits.append(int(text))
    return min(limits)
