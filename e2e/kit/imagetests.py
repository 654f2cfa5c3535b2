"""Tests inside the image that they are about, as a pod on the local node.

python -m kit.imagetests trainer|server [pytest arguments]

The image holds no test tools: tests and pytest are put beside it by mounts, for the server's the trainer's exporters
too. Packages that the image has itself win over those that come with pytest.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit import pods
from kit.chart import local_images
from kit.kubectl import LOCAL, ROOT, Kubectl, KubectlError, Object, TimedOut, wait_for

NAMESPACE = "slmops-image-tests"
IMAGES = ("trainer", "server")
# A limit alone would be asked for as well, and a node of 8 GB has less to give.
RESOURCES = {"requests": {"memory": "1Gi"}, "limits": {"memory": "8Gi"}}
# Appended, not on PYTHONPATH, where it would come before the image's own packages.
RUN = "import sys; sys.path.append('/opt/pytest'); import pytest; sys.exit(pytest.main())"
OPTIONS = [
    "-q", "-c", "/dev/null", "--rootdir=/tests", "--import-mode=importlib", "-p", "no:cacheprovider",
    "-o", "markers=slow: takes longer than a few seconds", "--timeout=900",
]  # fmt: skip


def pytest_folder() -> Path:
    """A folder with pytest for the images' Python, made once per requirements file. Raises CalledProcessError."""
    requirements = ROOT / "requirements/pytest.txt"
    folder = LOCAL / f"image-pytest-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        quiet = ["-q", "--disable-pip-version-check", "--require-hashes", "--no-deps", "--only-binary=:all:"]
        where = ["--python-version", "3.13", "--target", str(part), "-r", str(requirements)]
        subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *where], check=True)
        part.rename(folder)
    return folder


@contextmanager
def readable_tests(name: str) -> Iterator[Path]:
    """A copy of tests/ that any user can read, whatever umask the clone was made under."""
    copy = LOCAL / f"image-tests-{name}"  # two of them may run at a time
    shutil.rmtree(copy, ignore_errors=True)
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", copy, ignore=compiled)
    if name == "server":
        shutil.copytree(ROOT / "images/trainer/slmops_trainer", copy / "server/slmops_trainer", ignore=compiled)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def pod(name: str, image: str, folders: dict[str, Path], arguments: list[str]) -> Object:
    """The pod that runs the tests. `folders`: of this machine, by mount path; they make it more than `restricted`."""
    made = pods.spec(
        image,
        ["python", "-c", RUN, *OPTIONS, *arguments],
        env={"PYTHONPATH": "/opt/slmops", "PYTHONDONTWRITEBYTECODE": "1"},
        mounts={
            **{path: {"hostPath": {"path": str(folder), "type": "Directory"}} for path, folder in folders.items()},
            "/slmops": {"emptyDir": {}},
        },
        imagePullPolicy="Never",
        resources=RESOURCES,
    )
    # Process 1 is then one that waits for orphans, which the tests of crashes make.
    return pods.pod(name, {**made, "shareProcessNamespace": True})


def run(name: str, arguments: list[str]) -> bool:
    """Whether the tests of image `name` pass; pytest's output is streamed. Raises KubectlError, TimedOut."""
    kube, made = Kubectl(NAMESPACE), f"{name}-tests"
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    kube.delete("pod", made)
    try:
        with readable_tests(name) as tests:
            return _succeeds(kube, made, tests, name, arguments)
    finally:  # also when interrupted: it would go on beside whatever comes next
        with contextlib.suppress(KubectlError, KeyboardInterrupt):  # a second Ctrl-C hurries
            kube.delete("pod", made, wait=False)


def _succeeds(kube: Kubectl, made: str, tests: Path, name: str, arguments: list[str]) -> bool:
    folders = {"/tests": tests, "/opt/pytest": pytest_folder()}
    kube.apply(pod(made, local_images()[name], folders, arguments or [f"/tests/{name}"]))
    wait_for("the test pod runs", lambda: pods.phase(kube, made) not in ("", "Pending"), timeout=120)
    subprocess.run([kube.program, "-n", NAMESPACE, "logs", "-f", made], env=kube.env, check=False)
    end = wait_for(
        "the test pod ends", lambda: (p := pods.phase(kube, made)) in ("Succeeded", "Failed") and p, timeout=60
    )
    return end == "Succeeded"


def main() -> int:
    """pytest's success as exit code."""
    if sys.argv[1:2] == [] or sys.argv[1] not in IMAGES:
        print(f"usage: python -m kit.imagetests {'|'.join(IMAGES)} [pytest arguments]", file=sys.stderr)
        return 2
    os.umask(0o022)  # the pod is another user than who made the folders
    try:
        return 0 if run(sys.argv[1], sys.argv[2:]) else 1
    except (KubectlError, TimedOut, FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"failed: the tests in the image {sys.argv[1]}: {error}\n  next: see `make status`", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the test pod is removed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
