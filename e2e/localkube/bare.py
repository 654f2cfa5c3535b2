"""An API server without a node, for integration tests. As many as there are folders."""

from __future__ import annotations

import shutil
from pathlib import Path

from localkube import control, daemons, paths, shell, tools
from localkube.control import Endpoint
from localkube.say import step


def up(root: Path) -> Path:
    """Start in `root`, from nothing; return the kubeconfig's path."""
    tools.ensure(tools.API_SERVER_ONLY)
    layout = paths.bare(root)
    with shell.locked(root / "lock"):
        _stop(root)
        endpoint = Endpoint("127.0.0.1", control.free_port())
        authority = control.create_pki(layout, endpoint)
        etcd, etcd_url = control.start_etcd(layout)
        # No controller makes the default service accounts, nothing may route to a loopback address.
        options: dict[str, str | Path | int] = {
            "authorization-mode": "RBAC",
            "disable-admission-plugins": "ServiceAccount",
            "endpoint-reconciler-type": "none",
        }
        api = control.start_apiserver(layout, authority, endpoint, etcd_url, options)
        control.wait_ready(layout, endpoint, [etcd, api])
        step(f"API server ready at {endpoint.url}")
    return layout.kubeconfig


def down(root: Path) -> None:
    if root.is_dir():
        with shell.locked(root / "lock"):
            _stop(root)
        shutil.rmtree(root)


def _stop(root: Path) -> None:
    layout = paths.bare(root)
    running = daemons.recorded(layout.pids)
    daemons.stop([d for name, d in running.items() if name != "etcd"], grace=2)
    daemons.stop(running.values(), grace=2)
    for folder in [layout.pids, layout.pki, layout.etcd_data, layout.sockets]:
        shutil.rmtree(folder, ignore_errors=True)
    layout.kubeconfig.unlink(missing_ok=True)
