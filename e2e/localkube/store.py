"""The node's image store: containerd, reached with its own `ctr`."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from localkube import paths, shell
from localkube.say import Failure

CTR = ("ctr", "--address", str(paths.CONTAINERD_SOCKET), "--namespace", "k8s.io")
BLOBS = paths.CONTAINERD_ROOT / "io.containerd.content.v1.content" / "blobs" / "sha256"
PINNED = "io.cri-containerd.pinned=pinned"


def answers() -> bool:
    if not paths.CONTAINERD_SOCKET.exists():
        return False
    return shell.attempt(*CTR, "images", "list", "--quiet", timeout=10).returncode == 0


def images() -> set[str]:
    return set(shell.run(*CTR, "images", "list", "--quiet").split())


def has(reference: str) -> bool:
    return bool(shell.run(*CTR, "images", "list", "--quiet", f"name=={reference}").strip())


def pin(reference: str) -> None:
    """Keep the kubelet from collecting an image that nobody could pull again."""
    shell.run(*CTR, "images", "label", reference, PINNED)


def in_use() -> set[str]:
    lines = shell.run(*CTR, "containers", "list").splitlines()[1:]
    return {line.split()[1] for line in lines if len(line.split()) > 1}


def remove_images(references: Iterable[str]) -> None:
    """Remove tags, and with them the names that containerd's CRI part gave the same images by digest."""
    gone = set(references)
    if not gone:
        return
    targets = {line.split()[0]: line.split()[2] for line in shell.run(*CTR, "images", "list").splitlines()[1:]}
    kept = {target for name, target in targets.items() if name not in gone and not name.startswith("sha256:")}
    orphans = {name for name, target in targets.items() if name.startswith("sha256:") and target not in kept}
    shell.run(*CTR, "images", "remove", *sorted(gone), *sorted(orphans))


def remove_containers() -> int:
    """Take every container out of the store; images stay."""
    for task in shell.run(*CTR, "tasks", "list", "--quiet").split():
        shell.attempt(*CTR, "tasks", "delete", "--force", task, timeout=20)
    containers = shell.run(*CTR, "containers", "list", "--quiet").split()
    if containers:
        shell.run(*CTR, "containers", "delete", *containers, timeout=60)
    return len(containers)


def blobs() -> set[str]:
    return {path.name for path in BLOBS.iterdir()} if BLOBS.is_dir() else set()


def load(layout: Path, reference: str, known: set[str]) -> None:
    """Import the one image of an OCI layout folder, without the blobs that containerd has already."""
    index = json.loads((layout / "index.json").read_text())
    for manifest in index["manifests"]:
        manifest["annotations"] = {"io.containerd.image.name": reference}
    new = [path for path in sorted((layout / "blobs" / "sha256").iterdir()) if path.name not in known]
    importer = subprocess.Popen(
        [*CTR, "images", "import", "--all-platforms", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        close_fds=False,
    )
    assert importer.stdin is not None
    try:
        with tarfile.open(fileobj=importer.stdin, mode="w|") as archive:
            _add(archive, "oci-layout", (layout / "oci-layout").read_bytes())
            for path in new:
                archive.add(path, f"blobs/sha256/{path.name}")
            _add(archive, "index.json", json.dumps(index).encode())
    except BrokenPipeError:
        pass
    _, errors = importer.communicate()
    if importer.returncode:
        raise Failure(f"containerd did not take {reference}: {errors.decode().strip()}")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
