"""Installing and removing the chart, with the images built here or with the user's."""

import json
import os
import subprocess
import sys
from pathlib import Path

from kit.kubectl import LOCAL, ROOT, Kubectl, KubectlError

RELEASE = "slmops"
NAMESPACE = "slmops-system"
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}


def namespace(name: str) -> dict[str, object]:
    """A Namespace that admits restricted pods only."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}


def _helm(kube: Kubectl, *args: str, timeout: float = 300.0) -> str:
    own = LOCAL / "bin" / "helm"
    program = str(own) if own.exists() else "helm"
    done = subprocess.run([program, *args], env=kube.env, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise KubectlError(f"helm {args[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def install(kube: Kubectl, *values: str, images: dict[str, str] | None = None) -> str:
    """`helm upgrade --install --wait` into slmops-system. `images`: full references by name, else the chart's own.

    The file that VALUES names, if any, comes on top of the chart's values and below the others.
    Returns helm's output; raises KubectlError with its message.
    """
    kube.apply(namespace(NAMESPACE))
    sets = [f"images.{name}={ref}" for name, ref in (images or {}).items() if name != "base"]
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


def values_flags() -> list[str]:
    """helm's flags for the file of values that VALUES names. Raises KubectlError when it is not there."""
    file = os.environ.get("VALUES", "")
    if file and not Path(file).is_file():
        raise KubectlError(f"VALUES names {file}, and there is no such file")
    return ["--values", file] if file else []


def uninstall(kube: Kubectl) -> str:
    """`helm uninstall --wait`. Raises KubectlError."""
    return _helm(kube, "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "120s")


def local_images() -> dict[str, str]:
    """The references of the images that were built here. Raises FileNotFoundError before `make images`."""
    images: dict[str, str] = json.loads((LOCAL / "images.json").read_text())
    return {name: images[name] for name in ("operator", "trainer", "server", "router", "registry", "prometheus")}


def main() -> int:
    """`python -m kit.chart install|uninstall`; CLUSTER=current takes the user's kube context and published images."""
    current = os.environ.get("CLUSTER") == "current"
    kube = Kubectl(NAMESPACE, current=current)
    try:
        if sys.argv[1:] == ["uninstall"]:
            print(uninstall(kube), end="")
        else:
            install(kube, images=None if current else local_images())
            print(f"SLMOps runs in namespace {NAMESPACE}")
    except (KubectlError, FileNotFoundError) as error:
        print(f"Failed: {error}\nSee: {Path(kube.program).name} -n {NAMESPACE} get pods,events", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
