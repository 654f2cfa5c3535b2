"""tests/trainer inside the trainer image, as a pod on the local node: `python -m kit.trainertests [pytest arguments]`.

The image holds no test tools: pytest (pure Python) is put beside it by a mount.
"""

import hashlib
import shutil
import subprocess
import sys

from kit import pods
from kit.chart import local_images
from kit.kubectl import LOCAL, ROOT, Kubectl, Object, wait_for

NAMESPACE = "slmops-trainer-tests"
EMPTY: Object = {"emptyDir": {}}


def pytest_folder() -> str:
    """A folder with pytest for the image's Python, made once per requirements file."""
    requirements = ROOT / "requirements/pytest.txt"
    folder = LOCAL / f"pytest-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                "--require-hashes",
                "--no-deps",
                "--python-version",
                "3.13",
                "--only-binary=:all:",
                "--target",
                str(part),
                "-r",
                str(requirements),
            ],
            check=True,
        )
        part.rename(folder)
    return str(folder)


def pod(image: str, arguments: list[str]) -> Object:
    """The pod that runs the tests."""
    options = ["-c", "/dev/null", "--rootdir=/tests", "--import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["-o", "markers=slow: takes longer than a few seconds", "--timeout=900"]
    made = pods.spec(
        image,
        ["python", "-m", "pytest", "-q", *options, *arguments],
        env={"PYTHONPATH": "/opt/slmops:/opt/pytest", "PYTHONDONTWRITEBYTECODE": "1"},
        mounts={"/tests": folder(str(ROOT / "tests")), "/opt/pytest": folder(pytest_folder()), "/slmops": EMPTY},
        resources={"limits": {"memory": "8Gi"}},
    )
    return pods.pod("trainer-tests", made)


def folder(path: str) -> Object:
    """A folder of this machine: what `restricted` forbids, and why these tests have a namespace of their own."""
    return {"hostPath": {"path": path, "type": "Directory"}}


def main() -> int:
    """pytest's success as exit code; its output is streamed."""
    kube = Kubectl(NAMESPACE)
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    kube.delete("pod", "trainer-tests")
    kube.apply(pod(local_images()["trainer"], sys.argv[1:] or ["/tests/trainer"]))

    def phase() -> str:
        return pods.phase(kube, "trainer-tests")

    wait_for("the test pod runs", lambda: phase() not in ("", "Pending"), timeout=120)
    subprocess.run([kube.program, "-n", NAMESPACE, "logs", "-f", "trainer-tests"], env=kube.env, check=False)
    end = wait_for("the test pod ends", lambda: (p := phase()) in ("Succeeded", "Failed") and p, timeout=60)
    kube.delete("pod", "trainer-tests", wait=False)
    return 0 if end == "Succeeded" else 1


if __name__ == "__main__":
    sys.exit(main())
