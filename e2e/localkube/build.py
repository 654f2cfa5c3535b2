"""From a Dockerfile to an image on the node: build with buildah, hand over to containerd, pin, record."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localkube import images, mounts, packages, paths, rootfs, shell, store, tools
from localkube.files import write_json
from localkube.images import Image
from localkube.say import Failure, heartbeat, step

HOST_CA = Path("/etc/ssl/certs/ca-certificates.crt")
# Programs that do not look where Debian keeps its bundle get it as a build argument, if declared.
CA_ARGUMENTS = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def ensure(*names: str) -> None:
    """Build what is not built yet and load what the node does not have yet."""
    tools.require_root()
    packages.ensure(packages.NODE)
    chosen = names or tuple(n for n, i in images.IMAGES.items() if i.dockerfile.exists())
    with _building():
        node = store.answers()
        before = set(_recorded().values())  # what is installed may still ask for these
        current = []  # as they were when built: the sources may be edited meanwhile
        for name in chosen:
            reference = images.reference(name)
            current.append(reference)
            if node and store.has(reference):
                step(f"{name}: {reference} is on the node")
            else:
                _ensure_built(images.named(name))
                if node:
                    _load(reference)
                else:
                    step(f"{name}: built; the node is down, so it was not loaded")
            if node:
                _record(name, reference)
        if node:
            _drop_old(current, before)


def record_present() -> None:
    """Say of the images that the node kept from an earlier run that they are there."""
    for name in images.IMAGES:
        reference = images.reference(name)
        if store.has(reference):
            _record(name, reference)


def stop() -> None:
    """Wait for a build to end, then take its running state off the machine; what is built stays."""
    if not paths.CACHE.exists():
        return
    with shell.locked(paths.BUILD_LOCK):
        for place in mounts.below(paths.CACHE):
            shell.attempt("umount", place)
        for folder in [paths.WORK, paths.BUILDAH_RUN]:
            mounts.remove(folder)


def purge() -> None:
    """Remove all that is built."""
    with shell.locked(paths.BUILD_LOCK):
        mounts.remove(paths.CACHE)


def load(target: str) -> None:
    """Load one of our images by name, or any image of the build store by its full reference."""
    if target in images.IMAGES:
        ensure(target)
        return
    if not store.answers():
        raise Failure("the node is down", hint="run `up` first")
    with _building():
        if not _has(target):
            raise Failure(f"{target} is not in the build store", hint=f"build it there: {' '.join(_buildah('bud'))} …")
        _load(target)


def _ensure_built(image: Image) -> None:
    reference = images.reference(image.name)
    if _has(reference):
        return
    if not image.dockerfile.exists():
        raise Failure(f"{image.dockerfile} is missing")
    if image.base:
        _ensure_built(images.named(image.base))
    step(f"{image.name}: building {reference}")
    context = rootfs.context(image.name) or paths.REPO
    log = paths.LOG / f"build-{image.name}.log"
    arguments = ["--build-arg", f"BASE_IMAGE={images.reference(image.base)}"] if image.base else []
    if context == paths.REPO:
        ignore = paths.WORK / f"{image.name}.dockerignore"
        ignore.write_text(images.ignore_file(image))
        arguments += ["--ignorefile", str(ignore)]
    if image.base:
        arguments += _run_options(image.dockerfile.read_text())
    shell.run(
        *_buildah("bud"), "--isolation", "chroot", "--layers", "--pull-never", "--format", "oci",
        "--file", image.dockerfile, "--tag", reference, *arguments, context,
        env=_environment(), log=log, doing=f"building {image.name}",
        hint="mend what the log says, then run again: finished steps are kept",
    )  # fmt: skip
    _remove_from_build_store([r for r in _built() if images.is_old(r, reference)])
    step(f"{image.name}: built")


def _run_options(dockerfile: str) -> list[str]:
    mounts, words = [], []
    if HOST_CA.exists():
        # For RUN steps only: neither the image's configuration nor its layers keep it.
        mounts.append(f"{HOST_CA}:{HOST_CA}:ro")
        wanted = [name for name in CA_ARGUMENTS if f"ARG {name}\n" in dockerfile]
        words = [word for name in wanted for word in ("--build-arg", f"{name}={HOST_CA}")]
    sources = rootfs.host_sources()
    if sources is not None:
        mounts.append(f"{sources}:{rootfs.SOURCES}:ro")
    return words + [word for mount in mounts for word in ("--volume", mount)]


def _load(reference: str) -> None:
    """Copy only what the node lacks: a changed line of code moves one small layer."""
    known = store.blobs()
    try:
        _transfer(reference, known)
    except Failure:
        _transfer(reference, set())
    store.pin(reference)
    step(f"loaded {reference}")


def _transfer(reference: str, known: set[str]) -> None:
    layout = Path(tempfile.mkdtemp(prefix="load-", dir=paths.WORK))
    try:
        shared = layout / "blobs" / "sha256"
        shared.mkdir(parents=True)
        for digest in known:
            os.link(store.BLOBS / digest, shared / digest)
        source = f"containers-storage:[overlay@{paths.BUILDAH_ROOT}+{paths.BUILDAH_RUN}]{reference}"
        # Uncompressed layers keep their digests, so those the node has are not even written.
        copy = ["skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"]
        with heartbeat(f"loading {reference}"):
            shell.run(*copy, source, f"oci:{layout}:image", env=_environment())
            store.load(layout, reference, known)
    finally:
        shutil.rmtree(layout)


def _recorded() -> dict[str, str]:
    known: dict[str, str] = json.loads(paths.IMAGES_JSON.read_text()) if paths.IMAGES_JSON.exists() else {}
    return known


def _record(name: str, reference: str) -> None:
    write_json(paths.IMAGES_JSON, dict(sorted({**_recorded(), name: reference}.items())))


def _drop_old(current: list[str], before: set[str]) -> None:
    """Earlier development tags go, unless a container still runs from one or they were current until now."""
    old = {i for i in store.images() for c in current if images.is_old(i, c)}
    store.remove_images(sorted(old - before - store.in_use()))


@contextmanager
def _building() -> Iterator[None]:
    """One build at a time on a machine; what a killed one left is cleared first."""
    paths.LOG.mkdir(parents=True, exist_ok=True)
    with shell.locked(paths.BUILD_LOCK, inherited=True):
        mounts.remove(paths.WORK)
        (paths.WORK / "tmp").mkdir(parents=True)
        _clear_store()
        try:
            yield
        finally:
            mounts.remove(paths.WORK)


def _clear_store() -> None:
    """No working container of an earlier run; an empty store instead of one that a crash has broken."""
    if not paths.BUILDAH_ROOT.exists():
        return
    listed = shell.attempt(*_buildah("containers"), "--quiet", env=_environment())
    cleared = shell.attempt(*_buildah("rm"), "--all", env=_environment()) if listed.stdout.strip() else listed
    if listed.returncode or cleared.returncode:
        step("the build store does not open; starting with an empty one")
        mounts.remove(paths.BUILDAH_ROOT)


def _built() -> list[str]:
    listed = shell.run(*_buildah("images"), "--format", "{{.Name}}:{{.Tag}}", env=_environment())
    return [line for line in listed.splitlines() if "<none>" not in line]


def _has(reference: str) -> bool:
    return shell.attempt(*_buildah("inspect"), "--type", "image", reference, env=_environment()).returncode == 0


def _remove_from_build_store(references: list[str]) -> None:
    for reference in references:
        shell.attempt(*_buildah("rmi"), reference, env=_environment())


def _buildah(command: str) -> list[str]:
    return [
        "buildah", "--root", str(paths.BUILDAH_ROOT), "--runroot", str(paths.BUILDAH_RUN),
        "--storage-driver", "overlay", command,
    ]  # fmt: skip


def _containers_conf() -> Path:
    """Keeps buildah from making /etc/cni."""
    file = paths.WORK / "containers.conf"
    file.write_text(f'[network]\nnetwork_config_dir = "{paths.WORK / "net"}"\n')
    return file


def _environment() -> dict[str, str]:
    return {
        "TMPDIR": str(paths.WORK / "tmp"),
        "BUILDAH_ISOLATION": "chroot",
        "CONTAINERS_CONF": str(_containers_conf()),
    }
