"""What this container may use: CPUs and memory from cgroup v1 or v2, else from the machine."""

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # v1 writes a huge page-rounded number for "no limit"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def cpu_limit(root: Path = ROOT) -> float:
    """CPUs this process may use: the smaller of the CFS quota and the affinity mask (0.5 is half a CPU)."""
    cpus = float(len(os.sched_getaffinity(0)))
    if (text := _read(root / "cpu.max")) is not None:  # v2: "max 100000" or "150000 100000"
        quota, _, period = text.partition(" ")
        return cpus if quota == "max" else min(cpus, int(quota) / int(period or 100000))
    for name in ("cpu", "cpu,cpuacct"):  # v1: -1 is no limit
        quota_text, period_text = _read(root / name / "cpu.cfs_quota_us"), _read(root / name / "cpu.cfs_period_us")
        if quota_text and period_text and int(quota_text) > 0:
            return min(cpus, int(quota_text) / int(period_text))
    return cpus


def threads(root: Path = ROOT) -> int:
    """Whole CPUs, at least one."""
    return max(1, int(cpu_limit(root)))


def memory_limit(root: Path = ROOT) -> int:
    """Bytes this container may use: the cgroup's limit, else the machine's memory."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        text = _read(path)
        if text and text != "max" and int(text) < UNLIMITED:
            return min(machine, int(text))
    return machine
