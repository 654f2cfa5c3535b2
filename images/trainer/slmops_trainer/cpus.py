"""How many threads to use: the cgroup's CPU limit, which neither torch nor OpenBLAS looks at."""

import math
import os
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def limit(root: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs this process may use, at least 1: the smaller of its affinity and its cgroup's quota, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    quota = _v2(root) or _v1(root)
    return max(1, min(allowed, math.ceil(quota)) if quota else allowed)


def apply() -> int:
    """Tell the libraries, before they are loaded. A user's own value stays, and OMP_NUM_THREADS speaks for all."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    count = int(given) if given.isdecimal() and int(given) else limit()
    for name in VARIABLES:
        os.environ.setdefault(name, str(count))
    return count


def _v2(root: Path) -> float | None:
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _v1(root: Path) -> float | None:
    for folder in (root / "cpu", root / "cpu,cpuacct"):
        try:
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            period = int((folder / "cpu.cfs_period_us").read_text())
        except (OSError, ValueError):
            continue
        return quota / period if quota > 0 else None
    return None
