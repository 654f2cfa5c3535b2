"""The programs the cluster is made of: Go binaries, built once per machine."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from localkube import paths, shell
from localkube.say import Failure, step

KUBERNETES = "k8s.io/kubernetes/cmd"
GO_PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": f"{KUBERNETES}/kube-apiserver",
    "kubectl": f"{KUBERNETES}/kubectl",
    "kube-controller-manager": f"{KUBERNETES}/kube-controller-manager",
    "kube-scheduler": f"{KUBERNETES}/kube-scheduler",
    "kubelet": f"{KUBERNETES}/kubelet",
    "kube-proxy": f"{KUBERNETES}/kube-proxy",
    "coredns": "github.com/coredns/coredns",
    "helm": "helm.sh/helm/v4/cmd/helm",
}
API_SERVER_ONLY = ("etcd", "kube-apiserver", "kubectl")
ALL = tuple(GO_PACKAGES)
OLDEST_GO = (1, 21)  # from here on Go fetches the version that go.mod asks for


def path(name: str) -> Path:
    return cache() / name


def cache() -> Path:
    content = b"".join((paths.TOOLS_MODULE / name).read_bytes() for name in ("go.mod", "go.sum"))
    return paths.CACHE / f"k8s-{hashlib.sha256(content).hexdigest()[:12]}"


def kubernetes_version(go_mod: str) -> str:
    found = re.search(r"^\s*k8s\.io/kubernetes (v\S+)", go_mod, re.MULTILINE)
    if found is None:
        raise Failure(f"{paths.TOOLS_MODULE}/go.mod names no version of k8s.io/kubernetes")
    return found[1]


def go_version(text: str) -> tuple[int, int]:
    """From `go env GOVERSION`, for example go1.26.1; (0, 0) where there is none."""
    found = re.match(r"go(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def ensure(names: Iterable[str] = ALL) -> None:
    """Build what is missing. The first start on a machine takes minutes, the next ones nothing."""
    wanted = list(names)
    if any(not path(name).exists() for name in wanted):
        with shell.locked(paths.CACHE / "go-build.lock", inherited=True):
            missing = [name for name in wanted if not path(name).exists()]
            if missing:
                _build(missing)
    paths.BIN.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        link = paths.BIN / name
        if not link.is_symlink() or link.readlink() != path(name):
            link.unlink(missing_ok=True)
            link.symlink_to(path(name))


def _build(names: list[str]) -> None:
    version = go_version(shell.attempt("go", "env", "GOVERSION").stdout)
    if version < OLDEST_GO:
        what = f"Go {version[0]}.{version[1]} is too old" if any(version) else "Go is not installed"
        raise Failure(what, hint=f"install Go {OLDEST_GO[0]}.{OLDEST_GO[1]} or newer (https://go.dev/dl) and run again")
    step(f"building {', '.join(names)} from source (about 7 minutes on 2 cores, once per machine)")
    kubernetes = kubernetes_version((paths.TOOLS_MODULE / "go.mod").read_text())
    stamp = "k8s.io/component-base/version"
    major, minor = kubernetes.removeprefix("v").split(".")[:2]
    values = {"gitVersion": kubernetes, "gitMajor": major, "gitMinor": minor}
    linker = " ".join(["-s", "-w", *(f"-X {stamp}.{key}={value}" for key, value in values.items())])
    partial = paths.CACHE / "k8s-partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shell.run(
        "go", "build", "-v", "-trimpath", "-mod=readonly", "-ldflags", linker, "-o", f"{partial}/",
        *(GO_PACKAGES[name] for name in names),
        cwd=paths.TOOLS_MODULE,
        # An older Go fetches the one that go.mod asks for, also where it was told not to.
        env={"GOFLAGS": "-buildvcs=false", "GOWORK": "off", "GO111MODULE": "on", "GOTOOLCHAIN": "auto"},
        log=paths.LOG / "go-build.log",
        doing="go build",
        hint="check that the Go module proxy is reachable (go env GOPROXY), then run again",
    )  # fmt: skip
    cache().mkdir(parents=True, exist_ok=True)
    for name in names:
        # `go build` names a binary after its folder: etcd's is `server`.
        built = partial / ("server" if name == "etcd" else name)
        built.replace(path(name))
    shutil.rmtree(partial)
    step("built")


def require_root() -> None:
    if os.geteuid() != 0:
        raise Failure("a node needs root", hint="run as root, or use a cluster you already have")
