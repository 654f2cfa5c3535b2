"""An API server without a node, for integration tests. As many as there are folders."""

from __future__ import annotations

import shutil
from pathlib import Path

from localkube import control, daemons, paths, shell, tools
from localkube.control import Endpoint
from localkube.say import Failure, step


def up(root: Path, owner: int | None = None) -> Path:
    """Start in `root`, from nothing; return the kubeconfig's path.

    With `owner`, the id of a process, `root` is `owned(parent, owner)`: `sweep` stops it once that process is gone.
    """
    tools.ensure(tools.API_SERVER_ONLY)
    layout = paths.bare(root)
    if root.is_dir() and any(root.iterdir()) and not (root / "lock").exists():
        raise Failure(f"{root} is not empty", hint="name a new folder: what is in it is removed in the end")
    with shell.locked(root / "lock"):
        _stop(root)
        if owner is not None:
            (root / "owner").write_text(daemons.start_time(owner))
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
    """Stop what `up` started there, if it did, and remove the folder."""
    if (root / "lock").exists():
        with shell.locked(root / "lock"):
            _stop(root)
            shutil.rmtree(root, ignore_errors=True)


def owned(parent: Path, owner: int) -> Path:
    """The folder of the API server of process `owner`: test runs beside each other have one each."""
    return parent / f"apiserver-{owner}"


def sweep(parent: Path) -> None:
    """Stop the API servers below `parent` whose owners are gone without having done so."""
    for root in parent.glob("apiserver-*"):
        pid = root.name.rpartition("-")[2]
        if pid.isdigit() and not _owner_lives(root, int(pid)):
            step(f"stopping the API server of process {pid}, which is gone")
            down(root)


def _owner_lives(root: Path, pid: int) -> bool:
    started, record = daemons.start_time(pid), root / "owner"
    # Between the folder and the record there is a moment.
    return bool(started) and (not record.exists() or record.read_text() in ("", started))


def _stop(root: Path) -> None:
    layout = paths.bare(root)
    running = daemons.recorded(layout.pids)
    daemons.stop([d for name, d in running.items() if name != "etcd"], grace=2)
    daemons.stop(running.values(), grace=2)
    for folder in [layout.pids, layout.pki, layout.etcd_data, layout.sockets]:
        shutil.rmtree(folder, ignore_errors=True)
    layout.kubeconfig.unlink(missing_ok=True)
