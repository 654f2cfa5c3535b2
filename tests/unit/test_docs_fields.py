"""The field tables of docs/: nothing that the CRDs say is left out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slmops import docgen

ROOT = Path(__file__).resolve().parents[2]


# What a schema may say, and how a row of the table says it. Of a status, which the operator writes, none of it is told.
COUNTS = {"Length": "characters", "Items": "items", "Properties": "entries"}
TOLD = {
    "minimum": lambda schema: f"{'>' if schema.get('exclusiveMinimum') else '≥'} {schema['minimum']}",
    "maximum": lambda schema: f"{'<' if schema.get('exclusiveMaximum') else '≤'} {schema['maximum']}",
    **{f"max{what}": lambda schema, what=what: f" {schema[f'max{what}']} {COUNTS[what]}" for what in COUNTS},
    **{f"min{what}": lambda schema, what=what: f" {schema[f'min{what}']} to " for what in COUNTS},
    "pattern": lambda schema: f"as `{schema['pattern'].replace('|', chr(92) + '|')}`",
    "x-kubernetes-list-map-keys": lambda schema: f"each `{schema['x-kubernetes-list-map-keys'][0]}` once",
    "x-kubernetes-list-type": lambda schema: " once",
    "enum": lambda schema: " \\| ".join(f"`{value}`" for value in schema["enum"]),
    "default": lambda schema: "default `" + (d if isinstance(d := schema["default"], str) else json.dumps(d)) + "`",
    "x-kubernetes-int-or-string": lambda schema: "quantity",
}
# The shape of the table, and what TOLD says together with another word.
SHAPE = {
    "type", "format", "description", "properties", "items", "additionalProperties", "required", "exclusiveMinimum",
    "exclusiveMaximum", "x-kubernetes-validations", "anyOf",
}  # fmt: skip


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema below this one, with the path of the row that tells of it."""
    for name, field in (schema.get("properties") or {}).items():
        yield from places(field, f"{path}.{name}" if path else name)


def places(field: dict[str, Any], row: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield row, field
    yield from fields(field, row)
    inner = field.get("items", field.get("additionalProperties"))
    if isinstance(inner, dict) and "properties" in inner:
        yield from fields(inner, f"{row}[]")
    elif isinstance(inner, dict):
        yield from places(inner, row)


def specs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        crd = yaml.safe_load(path.read_text())
        yield crd["spec"]["names"]["singular"], crd


CRDS = dict(specs())
WHOLE = {kind: crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for kind, crd in CRDS.items()}


@pytest.mark.parametrize("kind", CRDS)
def test_what_a_spec_may_be_is_in_its_row(kind: str) -> None:
    spec = WHOLE[kind]["properties"]["spec"]
    rows = {line.split("`")[1]: line for line in docgen.rows(spec)}
    said = set()
    for path, schema in fields(spec):
        quantity = schema.get("x-kubernetes-int-or-string")
        assert schema.keys() <= TOLD.keys() | SHAPE, "tell of it in docgen.py"
        for word in schema.keys() & TOLD.keys():
            if (word, quantity) == ("pattern", True) or (word, schema[word]) == ("default", {}):
                continue  # the type has said it; the fields of the object say theirs
            if word.startswith("min") and schema[word] == 0 and word != "minimum":
                continue
            assert TOLD[word](schema) in rows[path], (path, word)
            said.add(word)
    assert said >= {"minimum", "maxLength", "minLength", "pattern", "maxItems", "maxProperties", "default", "enum"}


def messages(schema: Any) -> Iterator[str]:
    if isinstance(schema, list | dict):
        for inner in schema.values() if isinstance(schema, dict) else schema:
            yield from messages(inner)
    if isinstance(schema, dict):
        yield from (rule["message"] for rule in schema.get("x-kubernetes-validations") or [])


@pytest.mark.parametrize("kind", CRDS)
def test_every_rule_is_on_the_page(kind: str) -> None:
    page = (ROOT / f"docs/{kind}.md").read_text()
    told = list(messages(WHOLE[kind]))
    assert told
    assert [message for message in told if f": {message}\n" not in page] == []


def test_the_rule_about_names_is_said_of_the_whole_object() -> None:
    page = (ROOT / "docs/modeldeployment.md").read_text()
    assert "\n- the object: the name of a ModelDeployment is its Service's: at most 63 of a-z, 0-9 and -" in page
