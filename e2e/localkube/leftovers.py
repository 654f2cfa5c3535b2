"""Taking everything off the machine that a cluster left there, however it ended and wherever it was.

All of it can be told by names only this program uses: two folders, one cgroup, one bridge. So it
works on the remains of a killed run, of another clone, and of a clone that has been deleted.
`outside.py` has the exceptions.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

from localkube import daemons, mounts, network, outside, paths, tools
from localkube.say import Failure, step

MARKERS = (f"{paths.RUN}/", f"{paths.STATE}/")
PROGRAMS = frozenset(
    [*tools.ALL, "containerd", "containerd-shim-runc-v2", "containerd-shim", "containerd-shim-runc-v1"]
)
CGROUPS = Path("/sys/fs/cgroup")


def sweep() -> None:
    """Idempotent; on a clean machine it does nothing."""
    stop_daemons()
    for marker in MARKERS:
        daemons.kill(daemons.marked(marker, PROGRAMS))
    kill_pods()
    network.tear_down()
    remove_cgroups()
    for folder in [paths.STATE, paths.RUN]:
        mounts.remove(folder)
    outside.clear()


def stop_daemons() -> None:
    """The kubelet first, so that nothing restarts what is stopped next; what all need comes last."""
    running = daemons.recorded(paths.CLUSTER.pids)
    last = {"containerd", "etcd", "kube-apiserver"}
    daemons.stop(d for name, d in running.items() if name not in last)
    # What etcd holds is thrown away: nothing to wait for.
    daemons.stop((d for name, d in running.items() if name in last), grace=1)


def other_owner() -> Path | None:
    """The clone that the machine's cluster belongs to, if it is not this one."""
    try:
        repo = Path(json.loads(paths.RECORD.read_text())["repo"])
    except (OSError, ValueError, KeyError):
        return None
    return None if repo == paths.REPO else repo


def kill_pods() -> None:
    """Kill what is in our cgroup until nothing is left: containers, and shims' children with them."""
    for _ in range(50):
        pids = _cgroup_pids()
        if not pids:
            return
        daemons.kill(pids)
    raise Failure("processes of pods do not end", hint=f"look below {CGROUPS}/*/{paths.CGROUP}")


def remove_cgroups() -> None:
    deadline = time.monotonic() + 5
    for root in _cgroup_roots():
        for folder in sorted((Path(f) for f, _, _ in os.walk(root)), key=lambda p: -len(p.parts)):
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError as problem:
                    if time.monotonic() > deadline:
                        step(f"left the cgroup {folder}: {problem}")
                        break
                    time.sleep(0.05)


def create_cgroups() -> None:
    if (CGROUPS / "cgroup.controllers").exists():
        group = CGROUPS / paths.CGROUP
        group.mkdir(exist_ok=True)
        wanted = (CGROUPS / "cgroup.controllers").read_text().split()
        for level in [CGROUPS, group]:
            _enable(wanted, level)
        return
    for hierarchy in CGROUPS.iterdir():
        if hierarchy.is_dir() and not hierarchy.is_symlink() and (hierarchy / "cgroup.procs").exists():
            group = hierarchy / paths.CGROUP
            group.mkdir(exist_ok=True)
            for setting in ["cpuset.cpus", "cpuset.mems"]:
                if (hierarchy / setting).exists():
                    (group / setting).write_text((hierarchy / setting).read_text())


def _enable(wanted: list[str], level: Path) -> None:
    control = level / "cgroup.subtree_control"
    there = control.read_text().split()
    missing = " ".join(f"+{name}" for name in wanted if name not in there)
    if not missing:
        return
    try:
        control.write_text(missing)
    except OSError as problem:
        if problem.errno != errno.EBUSY:
            raise
        procs, leaf = level / "cgroup.procs", level / "init"
        raise Failure(
            f"{control} does not take {missing}: processes run in {level} itself, as in a container without systemd",
            hint=f"move them: mkdir -p {leaf}; xargs -rn1 < {procs} > {leaf}/cgroup.procs; then run again",
        ) from None


def _cgroup_roots() -> list[Path]:
    candidates = [CGROUPS / paths.CGROUP, *CGROUPS.glob(f"*/{paths.CGROUP}")]
    return [c for c in candidates if c.is_dir()]


def _cgroup_pids() -> set[int]:
    found: set[int] = set()
    for root in _cgroup_roots():
        for group, _, _ in os.walk(root):  # `rglob` fails on a group that goes while it is read
            try:
                found.update(int(line) for line in Path(group, "cgroup.procs").read_text().split())
            except OSError:
                continue
    return found - {0}
