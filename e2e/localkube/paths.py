"""Every path, address and name of the local cluster.

What belongs to one clone lies in `<repo>/.local`. What only one cluster per machine can have (the
node's runtime state, the bridge, the cgroup) lies at fixed places, so that any clone finds and
clears what another one left behind.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TOOLS_MODULE = REPO / "e2e" / "localkube" / "tools"

# One per clone.
LOCAL = REPO / ".local"
KUBECONFIG = LOCAL / "kubeconfig"
BIN = LOCAL / "bin"
VENV = LOCAL / "venv"
LOG = LOCAL / "log"
VOLUMES = LOCAL / "volumes"
IMAGES_JSON = LOCAL / "images.json"

# One per machine.
RUN = Path("/run/slmops-localkube")
LOCK = Path("/run/slmops-localkube.lock")
APT_LOCK = Path("/run/slmops-localkube-apt.lock")
RECORD = RUN / "cluster.json"
CONTAINERD_SOCKET = RUN / "containerd.sock"
CONTAINERD_STATE = RUN / "containerd"
STATE = Path("/var/lib/slmops-localkube")
KUBELET_ROOT = STATE / "kubelet"
POD_LOGS = STATE / "pod-logs"
CNI_STATE = STATE / "cni"
CGROUP = "slmops-local"

# One per user, kept by `down`. Resolved: daemons run elsewhere, and /proc/mounts knows no links.
CACHE = (Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slmops").resolve()
CONTAINERD_ROOT = CACHE / "containerd"
BUILDAH_ROOT = CACHE / "buildah"
BUILDAH_RUN = Path("/run/slmops-localkube-buildah")
WORK = CACHE / "work"
BUILD_LOCK = CACHE / "build.lock"

NODE = "slmops-local"
BRIDGE = "slmops0"
POD_CIDR = "10.244.0.0/24"
NODE_IP = "10.244.0.1"
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
DNS_SERVICE_IP = "10.96.0.10"
API_PORT = 6443
DNS_PORT = 10053
CHAIN = "SLMOPS-LOCAL"


@dataclass(frozen=True)
class Layout:
    """Where one control plane keeps its files: `root` for the user, `state` for its daemons."""

    root: Path
    state: Path
    etcd_data: Path
    sockets: Path

    @property
    def kubeconfig(self) -> Path:
        return self.root / "kubeconfig"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def config(self) -> Path:
        return self.state / "config"

    @property
    def pids(self) -> Path:
        return self.state / "run"


CLUSTER = Layout(LOCAL, RUN, STATE / "etcd", RUN / "etcd")


def bare(root: Path) -> Layout:
    """An API server without a node, in a folder of its own."""
    digest = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    # A socket's path may have no more than 107 characters, the root's may be long.
    return Layout(root, root, root / "etcd", Path(tempfile.gettempdir()) / f"slmops-{os.getuid()}-{digest}")
