"""The field tables of docs/: nothing that the CRDs say is left out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slmops import docgen

ROOT = Path(__file__).resolve().parents[2]


def defaults(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The path of each field with a default, and that default."""
    for name, field in (schema.get("properties") or {}).items():
        here = f"{path}.{name}" if path else name
        if "default" in field:
            yield here, field["default"]
        inner, suffix = (field["items"], "[]") if field.get("type") == "array" else (field, "")
        yield from defaults(inner, here + suffix)


def specs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        crd = yaml.safe_load(path.read_text())
        schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        yield crd["spec"]["names"]["singular"], schema["properties"]["spec"]


SPECS = dict(specs())
DEFAULTS = [
    (kind, path, value)
    for kind, spec in SPECS.items()
    for path, value in defaults(spec)
    if isinstance(value, list | bool | int | float)
]


def test_lists_are_among_them() -> None:
    assert {path for _, path, value in DEFAULTS if isinstance(value, list)} == {"rollout.steps", "evaluation.metrics"}


@pytest.mark.parametrize(("kind", "path", "default"), DEFAULTS)
def test_a_default_is_in_its_row(kind: str, path: str, default: Any) -> None:
    (row,) = [row for row in docgen.rows(SPECS[kind]) if row.startswith(f"| `{path}` ")]
    assert f"default `{json.dumps(default)}`" in row
