"""docs/install.md names every value of the chart, and the ports that have to be open."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slmops.api import keys
from slmops.build import router

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


def test_who_calls_whom_names_the_ports_of_the_pods() -> None:
    section = TEXT[TEXT.index("## Who calls whom") :].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    told = {(a, b, int(port)) for callers, callees, port, _ in rows[1:] for a in callers.split(", ")
            for b in callees.split(", ")}  # fmt: skip
    api, metrics = keys.API_PORT, keys.METRICS_PORT
    assert {("routers", "servers", api), ("clients", "routers", api), ("operator", "workers", metrics)} <= told
    assert ("operator", "routers", router.AGENT_PORT) in told
    assert {who for caller, who, port in told if (caller, port) == ("Prometheus", metrics)} == {
        "operator", "workers", "servers", "routers",
    }  # fmt: skip


def test_a_namespace_is_there_before_something_is_put_into_it() -> None:
    lines = re.findall(r"^\$ (.*)", TEXT, re.MULTILINE)
    (used,) = [n for n, line in enumerate(lines) if line.startswith("kubectl -n slmops-system create secret")]
    assert "kubectl create namespace slmops-system" in lines[:used]
