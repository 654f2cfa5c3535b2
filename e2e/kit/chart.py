"""Installing and removing the chart, with the images built here or with the user's."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.alone import BusyError, alone
from kit.kubectl import CURRENT, LOCAL, ROOT, Kubectl, KubectlError, shell
from localkube.say import heartbeat

RELEASE = "slmops"
NAMESPACE = "slmops-system"
IMAGES = ("operator", "trainer", "server", "router", "registry", "prometheus")
UNNAMED = (
    "Nothing says which images to install: those that the chart names are published nowhere. Build and push yours "
    "(README.md, On your own cluster), name them in a file (docs/install.md, The demo on your own cluster), and give "
    "it: CLUSTER=current VALUES=images.yaml"
)
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}


class NoImagesError(KubectlError):
    """Which images to install is not known; the message says what to do."""


def namespace(name: str) -> dict[str, object]:
    """A Namespace that admits restricted pods only."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}


def fresh_namespace(kube: Kubectl) -> None:
    """Make kubectl's namespace, empty: it admits restricted pods only, and they may pull what the operator's may.

    Its pull Secrets are copied, and given to the default account, for objects' pods name none.
    """
    empty(kube)
    kube.delete("namespace", kube.namespace)
    kube.apply(namespace(kube.namespace))
    system = kube.within(NAMESPACE)
    operator = system.get("deployment", f"{RELEASE}-operator")
    named = operator["spec"]["template"]["spec"].get("imagePullSecrets") if operator else None
    if named:
        found = [secret for each in named if (secret := system.get("secret", each["name"]))]
        copies = [{**secret, "metadata": {"name": secret["metadata"]["name"]}} for secret in found]
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
        kube.apply(*copies, {**account, "imagePullSecrets": named})


def empty(kube: Kubectl) -> None:
    """End what runs in kubectl's namespace, if it can be done within a minute or two.

    A namespace that is deleted while pods in it have three minutes to end is looked at again after half of that time,
    though they end in seconds.
    """
    for kinds in ("slm", "deployments,jobs,pods"):
        with contextlib.suppress(KubectlError):  # the namespace goes either way
            kube.run("delete", kinds, "--all", "--ignore-not-found", "--timeout=60s", timeout=80)


def _helm(kube: Kubectl, *args: str, timeout: float = 300.0) -> str:
    own = LOCAL / "bin" / "helm"
    program = str(own) if own.exists() else "helm"
    try:
        with heartbeat(f"helm {args[0]}"):
            done = subprocess.run(
                [program, *args], env=kube.env, capture_output=True, text=True, timeout=timeout, check=False
            )
    except subprocess.TimeoutExpired:
        raise KubectlError(f"helm {args[0]}: no answer within {timeout:.0f} s") from None
    except FileNotFoundError:
        raise KubectlError("There is no helm on the PATH. Install it: https://helm.sh") from None
    if done.returncode:
        raise KubectlError(f"helm {args[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def install(kube: Kubectl, *values: str, images: dict[str, str] | None = None) -> str:
    """`helm upgrade --install --wait` into slmops-system. `images`: full references by name, else those of VALUES.

    The file that VALUES names, if any, comes on top of the chart's values and below the others.
    Returns helm's output; raises KubectlError with its message, NoImagesError where nothing names the images.
    """
    if images is None and not values_flags():  # the chart's own are published nowhere
        raise NoImagesError(UNNAMED)
    if "deletionTimestamp" in (kube.get("namespace", NAMESPACE) or {"metadata": {}})["metadata"]:
        kube.delete("namespace", NAMESPACE)  # somebody did already; nothing can be made in it before it is gone
    kube.apply(namespace(NAMESPACE))
    settle(kube)
    sets = [f"images.{name}={ref}" for name, ref in (images or {}).items() if name in IMAGES]
    sets += ["prometheus.bundled.enabled=true", *values]
    flags = [part for item in sets for part in ("--set", item)] + values_flags()
    return _helm(
        kube,
        "upgrade",
        "--install",
        RELEASE,
        str(ROOT / "charts/slmops"),
        "--namespace",
        NAMESPACE,
        "--wait",
        "--timeout",
        "240s",
        *flags,
    )


@contextmanager
def lent(kube: Kubectl, *values: str, images: dict[str, str] | None = None) -> Iterator[None]:
    """install() with `values` for a block; on the user's cluster they are taken back, however it ends.

    The local node's release keeps them: its next user installs anew. Raises what install() raises.
    """
    try:
        install(kube, *values, images=images)
        yield
    finally:
        if CURRENT:
            install(kube, images=images)


def values_flags() -> list[str]:
    """helm's flags for the file of values that VALUES names. Raises KubectlError when it is not there."""
    file = os.environ.get("VALUES", "")
    if file and not Path(file).is_file():
        raise KubectlError(f"VALUES names {file}, and there is no such file")
    return ["--values", file] if file else []


def state(kube: Kubectl) -> str:
    """deployed, failed, pending-install, ...; empty where there is no release. Raises KubectlError."""
    try:
        text = _helm(kube, "status", RELEASE, "--namespace", NAMESPACE, "-o", "json")
    except KubectlError as error:
        if "not found" in str(error):
            return ""
        raise
    return str(json.loads(text)["info"]["status"])


def settle(kube: Kubectl) -> None:
    """End what an interrupted helm left: helm refuses to touch a release that is in the middle of something."""
    found = state(kube)
    if found in ("pending-install", "uninstalling"):
        uninstall(kube)
    elif found.startswith("pending-"):
        _helm(kube, "rollback", RELEASE, "--namespace", NAMESPACE)


def uninstall(kube: Kubectl) -> str:
    """`helm uninstall --wait`. Raises KubectlError."""
    return _helm(kube, "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "120s")


def local_images() -> dict[str, str]:
    """The references of the images that were built here, by name. Raises NoImagesError before `make images`."""
    file = LOCAL / "images.json"
    if not file.exists():
        raise NoImagesError("No images are built yet: make up images")
    images: dict[str, str] = json.loads(file.read_text())
    return images


def settings(kube: Kubectl) -> dict[str, str]:
    """The SLMOPS_* variables of the operator that runs, and its image as `image`; empty where there is none."""
    found = kube.within(NAMESPACE).get("deployment", f"{RELEASE}-operator")
    if found is None:
        return {}
    container = found["spec"]["template"]["spec"]["containers"][0]
    return {"image": container["image"], **{item["name"]: item.get("value", "") for item in container.get("env") or []}}


def running_images(kube: Kubectl) -> dict[str, str]:
    """References of the operator's, trainer's, server's and router's images. Raises KubectlError where none runs."""
    found = settings(kube)
    if not found:
        raise KubectlError(f"No SLMOps operator runs in namespace {NAMESPACE}: make install")
    return {"operator": found["image"]} | {
        name: found[f"SLMOPS_{name.upper()}_IMAGE"] for name in ("trainer", "server", "router")
    }


def main() -> int:
    """`python -m kit.chart install|uninstall`; CLUSTER=current takes the user's kube context.

    There a release that runs is left alone unless VALUES is given: it has the user's images and values. While a demo
    or tests of this clone run, nothing is done.
    """
    kube, removing = Kubectl(NAMESPACE), sys.argv[1:] == ["uninstall"]
    try:
        with alone("make uninstall" if removing else "make install"):
            if removing:
                print(uninstall(kube) if state(kube) else f"SLMOps is not installed in namespace {NAMESPACE}\n", end="")
            elif CURRENT and not values_flags() and state(kube) == "deployed":
                print(f"SLMOps is installed in namespace {NAMESPACE} already; it stays as it is")
            else:
                install(kube, images=None if CURRENT else local_images())
                print(f"SLMOps runs in namespace {NAMESPACE}")
    except (BusyError, NoImagesError, OSError) as problem:
        print(f"Failed: {problem}", file=sys.stderr)
        return 1
    except KubectlError as error:
        print(f"Failed: {error}\nSee:\n  {shell()}kubectl -n {NAMESPACE} get pods,events", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
