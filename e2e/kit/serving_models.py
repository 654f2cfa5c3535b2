"""The benchmark's model in every form that a server reads, and what the servers run on.

All is made once and kept below .local: the weights by the trainer image on the local node, from one seed. Forms: `onnx`
(onnxruntime-genai's builder), `ir` (OpenVINO's, by optimum-intel). Both int4, symmetric, in blocks of the same size.
`gguf` is llama.cpp's Q4_0, of 4 bits in blocks of 32 whatever is asked for.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kit import pods
from kit.chart import local_images
from kit.kubectl import LOCAL, ROOT, Kubectl, Object
from localkube import packages, shell

SHAPE = {
    "vocab": 32000, "hidden": 896, "layers": 24, "heads": 14, "kv-heads": 2, "inter": 4864, "context": 1024,
    "std": 0.02,
}  # fmt: skip
NAMESPACE = "slmops-bench"
KERNELS = ROOT / "images/server/kernels"
IMAGE_PYTHON = "3.13"  # the trainer image's


def python() -> Path:
    """The interpreter of a virtual environment with the server's packages and those of its peers."""
    folder = kept("bench", "bench.txt", _make_venv)
    return folder / "bin" / "python"


def kernels() -> Path:
    """The folder with the operators that slmops-server loads, which its image has too. Raises Failure."""
    return _once("kernels", sorted(path for path in KERNELS.iterdir() if path.is_file()), _compile)


def make(form: str, block: int) -> Path:
    """The folder of the model in that form, with int4 blocks of that size. KubectlError or TimedOut when it fails."""
    return {"onnx": _onnx, "ir": _ir, "gguf": _gguf}[form](block)


def _onnx(block: int) -> Path:
    folder = LOCAL / ("bench-model" if block == 128 else f"bench-model-{block}")
    if not (folder / "genai_config.json").exists():
        _run("make-onnx", [*_seeded(), "/out", "--precision", "int4", "--block", str(block)], folder)
    return folder


def _source() -> Path:
    """The weights as Hugging Face has them, 1.6 GB, which the other forms are made of."""
    folder = LOCAL / "bench-source"
    if not (folder / "config.json").exists():
        _run("make-source", [*_seeded(), "--source", "/out"], folder)
    return folder


def _ir(block: int) -> Path:
    folder = LOCAL / f"bench-ir-{block}"
    if not (folder / "openvino_model.xml").exists():
        modules = kept("export", "export.txt", _make_packages)
        command = ["python", "-m", "slmops_trainer.export_ir", "/source", "/out", "--block-size", str(block)]
        reads = {"/source": _source(), "/packages": modules}
        _run("make-ir", command, folder, reads, {"PYTHONPATH": "/packages:/opt/slmops"})
    return folder


def _gguf(_: int) -> Path:
    """Written on this machine: it needs no torch."""
    folder = LOCAL / "bench-gguf"
    if not (folder / "model.gguf").exists():
        command = [str(python()), "-m", "slmops_trainer.export_gguf", str(_source()), str(folder)]
        subprocess.run(command, check=True, cwd=ROOT / "images/trainer")
    return folder


def _seeded() -> list[str]:
    """The command that makes the model, without where and in which form."""
    script = (ROOT / "tests/server/make_tiny_model.py").read_text(encoding="utf-8")
    return ["python", "-c", script, *(text for name, value in SHAPE.items() for text in (f"--{name}", str(value)))]


def _run(
    name: str,
    command: Sequence[str],
    out: Path,
    reads: dict[str, Path] | None = None,
    env: dict[str, str] | None = None,
) -> None:
    """A command in the trainer image that fills /out, which becomes `out` when it has succeeded."""
    shutil.rmtree(out, ignore_errors=True)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    part.chmod(0o777)  # the pod is another user
    kube = Kubectl(NAMESPACE)
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    kube.delete("pod", name)
    mounts = {"/out": _host(part), **{path: _host(folder) for path, folder in (reads or {}).items()}}
    spec = pods.spec(local_images()["trainer"], list(command), env=env, mounts=mounts, imagePullPolicy="Never")
    kube.apply(pods.pod(name, spec))
    pods.finish(kube, name, 1200)
    kube.delete("pod", name, wait=False)
    part.rename(out)


def _host(folder: Path) -> Object:
    return {"hostPath": {"path": str(folder.resolve()), "type": "Directory"}}


def kept(name: str, requirements: str, make_it: Callable[[Path, Path], None]) -> Path:
    """A folder made once for each state of a requirements file."""
    file = ROOT / "requirements" / requirements
    return _once(name, [file], lambda folder: make_it(folder, file))


def _once(name: str, files: Sequence[Path], make_it: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    folder = LOCAL / f"{name}-{digest.hexdigest()[:12]}"
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_it(folder)
        done.touch()
    return folder


def _compile(folder: Path) -> None:
    packages.ensure({"gcc": "gcc", "libc6-dev": "/usr/include/stdio.h"})
    folder.mkdir(parents=True)
    shell.run(sys.executable, KERNELS / "build.py", folder / "slmops_kernels.so")


def _make_venv(folder: Path, requirements: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    _pip(str(folder / "bin" / "python"), requirements)


def _make_packages(folder: Path, requirements: Path) -> None:
    """For the image's Python, not for this one, whose version pip would check all the same."""
    foreign = ["--python-version", IMAGE_PYTHON, "--only-binary=:all:", "--ignore-requires-python"]
    _pip(sys.executable, requirements, "--target", str(folder), *foreign)


def _pip(interpreter: str, requirements: Path, *more: str) -> None:
    pip = [interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes", "--no-deps"]
    subprocess.run([*pip, *more, "-r", str(requirements)], check=True)
