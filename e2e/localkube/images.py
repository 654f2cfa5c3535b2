"""The images of this project: what each is made from, and the tag that follows from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from localkube import paths
from localkube.say import Failure

REPOSITORY = "docker.io/slmops"
IGNORED = frozenset({"__pycache__", "tests", ".pytest_cache", ".mypy_cache", ".ruff_cache"})


@dataclass(frozen=True)
class Image:
    """`inputs` are the paths below the repo that the Dockerfile copies; they are also its build context."""

    name: str
    inputs: tuple[str, ...]
    base: str = "base"

    @property
    def dockerfile(self) -> Path:
        return paths.REPO / "images" / self.name / "Dockerfile"


_API = ("operator/slmops/__init__.py", "operator/slmops/api")

IMAGES = {
    image.name: image
    for image in [
        Image("pause", ("images/pause",), base=""),
        Image("base", ("images/base",), base=""),
        Image("operator", ("images/operator", "operator", "pyproject.toml", "requirements/operator.txt")),
        Image("trainer", ("images/trainer", "images/artifacts", *_API, "requirements/trainer.txt")),
        Image("server", ("images/server", "images/artifacts", *_API, "requirements/server.txt")),
        Image("router", ("images/router",)),
        Image("registry", ("images/registry",)),
        Image("prometheus", ("images/prometheus",)),
    ]
}


def named(name: str) -> Image:
    if name not in IMAGES:
        raise Failure(f"there is no image {name!r}", hint=f"one of: {', '.join(IMAGES)}")
    return IMAGES[name]


def reference(name: str) -> str:
    return f"{repository(name)}:dev-{content_hash(named(name), paths.REPO)}"


def repository(name: str) -> str:
    return f"{REPOSITORY}/{name}"


def content_hash(image: Image, repo: Path) -> str:
    """Twelve hex digits over everything that goes into the image, its base included."""
    digest = hashlib.sha256()
    if image.base:
        digest.update(content_hash(IMAGES[image.base], repo).encode())
    for path in files(image.inputs, repo):
        runnable = b"x" if path.stat().st_mode & 0o100 else b"-"
        content = hashlib.sha256(path.read_bytes()).hexdigest().encode()
        digest.update(b"\0".join([str(path.relative_to(repo)).encode(), runnable, content, b""]))
    return digest.hexdigest()[:12]


def files(inputs: Iterable[str], repo: Path) -> Iterator[Path]:
    """Input files in a fixed order; an input that is not there adds none."""
    for entry in inputs:
        start = repo / entry
        candidates = [start] if start.is_file() else sorted(start.rglob("*"))
        for path in candidates:
            if path.is_file() and not IGNORED & set(path.relative_to(repo).parts) and path.suffix != ".pyc":
                yield path


def ignore_file(image: Image) -> str:
    """A .dockerignore that leaves exactly the inputs in the build context."""
    keep = [f"!{entry}" for entry in image.inputs]
    drop = [f"**/{name}" for name in sorted(IGNORED)]
    return "\n".join(["*", *keep, *drop, "**/*.pyc", ""])


def is_old(candidate: str, current: str) -> bool:
    """Whether `candidate` is another development tag of the same image as `current`."""
    pattern = re.escape(current.rpartition(":")[0]) + r":dev-[0-9a-f]{12}"
    return candidate != current and re.fullmatch(pattern, candidate) is not None
