"""The pinned requirements: whole, with hashes, and without a torch that would bring CUDA into CPU images."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "requirements"
SETS = sorted(path.stem for path in FOLDER.glob("*.in"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(name: str) -> set[str]:
    found = set()
    for line in (FOLDER / f"{name}.in").read_text().splitlines():
        if line.startswith("-r "):
            found |= wanted(line.removeprefix("-r ").removesuffix(".in"))
        elif line and not line.startswith("#"):
            found.add(normal(re.split(r"[^A-Za-z0-9._-]", line)[0]))
    return found


def pinned(name: str) -> set[str]:
    return {normal(n) for n in re.findall(r"^([A-Za-z0-9._-]+)==", (FOLDER / f"{name}.txt").read_text(), re.MULTILINE)}


@pytest.mark.parametrize("name", SETS)
def test_everything_asked_for_is_pinned_with_a_hash(name: str) -> None:
    assert wanted(name) <= pinned(name), "run `make lock`"
    for entry in re.split(r"\n(?=[A-Za-z0-9])", (FOLDER / f"{name}.txt").read_text().strip()):
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


@pytest.mark.parametrize("name", SETS)
def test_torch_comes_with_the_base_image(name: str) -> None:
    assert "torch" not in pinned(name)
    assert not [package for package in pinned(name) if package.startswith("nvidia-")]


def test_make_lock_renews_every_set() -> None:
    text = (FOLDER.parent / "Makefile").read_text()
    recipe = text[text.index("\nlock:") :].split("\n\n")[0]
    assert all(name in recipe for name in SETS)


def test_the_servers_package_asks_for_what_its_image_has() -> None:
    project = tomllib.loads((FOLDER.parent / "images/server/pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = {*project["dependencies"], *(one for extra in extras.values() for one in extra)}
    lines = (FOLDER / "server.in").read_text().splitlines()
    client = lines.index(next(line for line in lines if "artifact store's client, which" in line))
    assert {line for line in lines[:client] if not line.startswith("#")} == asked
    module, _, function = project["scripts"]["slmops-server"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
