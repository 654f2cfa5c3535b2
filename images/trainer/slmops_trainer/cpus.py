"""How many threads to use: the cgroup's CPU limit, which neither torch nor OpenBLAS looks at.

OpenBLAS (the pthread build) gets one thread on up to four CPUs. Its threads wait for each other by spinning: with
another process on the same two cores, a training step of a 10 M model took 3 (fp32) to 5 (bf16) times as long with two
OpenBLAS threads as with one, and the OpenMP build was no better. PyTorch's own threads sleep (OMP_WAIT_POLICY) and are
not affected.
"""

import math
import os
from pathlib import Path

FEW = 4


def limit(root: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs this process may use, at least 1: the smaller of its affinity and its cgroup's quota, rounded up."""
    allowed = len(os.sched_getaffinity(0))
    quota = _v2(root) or _v1(root)
    return max(1, min(allowed, math.ceil(quota)) if quota else allowed)


def apply() -> int:
    """Tell the libraries, before they are loaded. A user's own value stays, and OMP_NUM_THREADS speaks for all."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    count = int(given) if given.isdecimal() and int(given) else limit()
    wanted = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count if count > FEW else 1,
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, str(value))
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
