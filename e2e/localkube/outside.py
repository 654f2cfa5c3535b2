"""What containerd, the kubelet, runc and buildah write at places that no option moves into our folders.

Such a place goes when nothing but ours is in it, and no other Kubernetes node runs beside. In one that others use too,
only what can be told by its content goes.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from localkube import daemons, mounts, paths

# Place -> what may lie in it and be ours, as patterns of paths below it.
PLACES = {
    "var/lib/kubelet": ("device-plugins/*",),
    "var/lib/cni": (),
    "var/lib/containers": ("cache/blob-info-cache-v1.*",),
    "var/log/containers": (),
    "var/log/pods": (),
    "usr/libexec/kubernetes": (),
    "etc/cni": ("net.d/cni.lock",),
    "run/containerd": (),
}


def clear(machine: Path = Path("/")) -> None:
    """Idempotent. Only after our daemons have ended."""
    if daemons.kubernetes_beside():
        return
    _remove_ours(machine)
    for name, patterns in PLACES.items():
        place = machine / name
        if not place.is_symlink() and place.is_dir() and only_ours(place, patterns) and not mounts.below(place):
            shutil.rmtree(place)


def only_ours(place: Path, patterns: tuple[str, ...]) -> bool:
    """Whether every file below `place` matches one of the patterns. Empty folders are nobody's."""
    files = (path.relative_to(place) for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    return all(any(fnmatch(str(file), pattern) for pattern in patterns) for file in files)


def _remove_ours(machine: Path) -> None:
    """Of files that other clusters have beside ours: those whose content names our folders, and sockets of the dead."""
    for link in (machine / "var/log/containers").glob("*.log"):
        if link.is_symlink() and link.readlink().is_relative_to(paths.STATE):
            link.unlink()
    for result in (machine / "var/lib/cni/results").glob("*"):
        if result.is_file() and f"{paths.RUN}/" in result.read_text(errors="replace"):
            result.unlink()
    bound = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
    for socket in (machine / "run/containerd/s").glob("*"):
        if socket.is_socket() and str(socket) not in bound:
            socket.unlink()
