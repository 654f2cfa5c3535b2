"""The Dockerfiles: built from what .dockerignore lets through, run by any user but root."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from localkube import images

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = {path.parent.name: path.read_text() for path in (ROOT / "images").glob("*/Dockerfile")}
COPIES = [
    (name, source, target)
    for name, text in DOCKERFILES.items()
    if name not in ("base", "pause")  # their context is made by localkube
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
    for *sources, target in [line.split()]
    for source in sources
]


def test_a_line_may_copy_more_than_one_file() -> None:
    assert ("registry", "images/registry/keeper.py", "/etc/registry/") in COPIES


@pytest.mark.parametrize("name", sorted(set(DOCKERFILES) - {"base"}))
def test_no_image_runs_as_root(name: str) -> None:
    user = re.findall(r"^USER (\d+):\d+$", DOCKERFILES[name], re.MULTILINE)
    assert user
    assert user[-1] != "0"


@pytest.mark.parametrize(("name", "source", "target"), COPIES)
def test_what_comes_from_the_clone_is_readable_whatever_its_umask(name: str, source: str, target: str) -> None:
    if target.startswith("/tmp/"):
        return  # read while it is built, by root
    opened = re.findall(r"chmod (?:-R )?a\+r[xX] (\S+)", DOCKERFILES[name])
    assert any(target == folder or target.startswith(f"{folder}/") for folder in opened), f"{source} -> {target}"


@pytest.mark.parametrize(("name", "source", "target"), COPIES)
def test_every_copied_file_is_in_the_context(name: str, source: str, target: str) -> None:
    kept = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert (ROOT / source).exists()
    assert any(source == entry or source.startswith(f"{entry}/") for entry in kept)


@pytest.mark.parametrize(("name", "source", "target"), COPIES)
def test_every_copied_file_counts_in_the_images_tag(name: str, source: str, target: str) -> None:
    inputs = images.IMAGES[name].inputs
    assert any(source == entry or source.startswith(f"{entry}/") for entry in inputs)
