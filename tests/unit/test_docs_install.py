"""docs/install.md names every value of the chart."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
VALUES = yaml.safe_load((ROOT / "charts/slmops/values.yaml").read_text())
TEXT = (ROOT / "docs/install.md").read_text()
# Kubernetes' own fields, told of as a whole.
WHOLE = ("resources",)


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        here = f"{path}.{name}" if path else name
        if isinstance(value, dict) and value and name not in WHOLE:
            yield from leaves(value, here)
        else:
            yield here


def described() -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE))


@pytest.mark.parametrize("path", [path for path in leaves(VALUES) if not path.startswith("images.")])
def test_every_value_is_described(path: str) -> None:
    assert path in described()


def test_every_image_is_named() -> None:
    (row,) = [line for line in TEXT.splitlines() if line.startswith("| `images.<name>` |")]
    assert all(re.search(rf"\b{name}\b", row) for name in VALUES["images"])


@pytest.mark.parametrize("path", sorted(described() - {"images.<name>"}))
def test_every_described_value_exists(path: str) -> None:
    assert path in set(leaves(VALUES))
