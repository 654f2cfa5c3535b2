"""From models to structural schemas."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from slmops import crdgen
from slmops.api.base import Model
from slmops.api.batch import MUTABLE
from slmops.structural import UnsupportedError, structural, without_defaults

CRDS = Path(__file__).resolve().parents[2] / "crds"
REFUSED = {"$ref", "$defs", "title", "const", "oneOf", "allOf", "prefixItems", "discriminator", "nullable"}


def test_crds_are_what_the_models_say() -> None:
    assert crdgen.main(["--check", "--out", str(CRDS)]) == 0, "run `make crds`"


def test_a_stale_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert crdgen.main(["--out", str(tmp_path)]) == 0
    assert crdgen.main(["--check", "--out", str(tmp_path)]) == 0
    (tmp_path / "finetunejobs.slmops.dev.yaml").write_text("x")
    (tmp_path / "old.yaml").write_text("x")
    assert crdgen.main(["--check", "--out", str(tmp_path)]) == 1
    assert "finetunejobs.slmops.dev.yaml, old.yaml" in capsys.readouterr().err


class Inner(Model):
    """An inner object."""

    a: int = Field(default=1, ge=0, lt=5, description="A.")
    b: str | None = Field(default=None, max_length=3, description="B.")


class Outer(Model):
    """An outer object."""

    inner: Inner = Field(default=Inner(), description="Described here.")
    other: Inner = Field(default=Inner(a=2), description="Another.")
    one: Literal["x"] = Field(description="One.")
    some: list[Inner] = Field(default=[Inner(a=3)], description="Some.")
    table: dict[str, float] | None = Field(default=None, description="A map.")


def test_rewriting() -> None:
    inner = {
        "type": "object",
        "properties": {
            "a": {
                "type": "integer", "default": 1, "minimum": 0, "maximum": 5, "exclusiveMaximum": True,
                "description": "A.",
            },
            "b": {"type": "string", "maxLength": 3, "description": "B."},
        },
    }  # fmt: skip
    item = without_defaults(inner)
    assert structural(Outer.model_json_schema(by_alias=True)) == {
        "type": "object",
        "description": "An outer object.",
        "required": ["one"],
        "properties": {
            "inner": {**inner, "description": "Described here.", "default": {}},
            "other": {**inner, "description": "Another.", "default": {"a": 2}},
            "one": {"type": "string", "enum": ["x"], "description": "One."},
            "some": {
                "type": "array",
                "items": {**item, "description": "An inner object."},
                "default": [{"a": 3}],
                "description": "Some.",
            },
            "table": {"type": "object", "additionalProperties": {"type": "number"}, "description": "A map."},
        },
    }


class Union(Model):
    """What a structural schema cannot say."""

    field: int | str


class Anything(Model):
    """Nor this."""

    field: Any


@pytest.mark.parametrize("model", [Union, Anything])
def test_what_cannot_be_said_is_refused(model: type[Model]) -> None:
    with pytest.raises(UnsupportedError, match=r"\.field"):
        structural(model.model_json_schema(by_alias=True))


def walk(schema: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
    found = [(path, schema)]
    for name, field in (schema.get("properties") or {}).items():
        found += walk(field, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found += walk(schema[key], f"{path}[]")
    return found


@pytest.mark.parametrize("kind", crdgen.KINDS, ids=lambda kind: kind.name)
def test_every_field_is_described_and_every_size_is_bounded(kind: crdgen.Kind) -> None:
    for path, schema in walk(crdgen.schema(kind), kind.name):
        assert not REFUSED & schema.keys(), path
        if path.count(".") < 2 or path.endswith("[]"):
            continue
        assert schema.get("description"), path
        if ".status" in path:
            continue
        if schema.get("type") == "string" and "enum" not in schema:
            assert "maxLength" in schema, path
        if schema.get("type") == "array":
            assert "maxItems" in schema, path
        if schema.get("type") == "object" and "additionalProperties" in schema:
            assert "maxProperties" in schema, path


# An object that an operator took before has to be taken by the next one: these may grow, and not shrink.
LEAST = {
    "image": 1024, "uri": 1024, "output": 1024, "url": 1024, "args": 64, "args[]": 1024, "env": 64, "env[].value": 4096,
    "env[].name": 128, "secretRef.name": 253, "configMap.name": 253, "ref.name": 253, "file": 512, "servedName": 253,
    "systemPrompt": 16384, "query": 4096, "analysis.metrics": 16, "steps": 32, "tolerations": 32, "nodeSelector": 32,
    "nodeSelector[]": 63, "resources.limits": 16, "imagePullSecrets": 8, "targetModules": 64, "queueName": 63,
}  # fmt: skip


@pytest.mark.parametrize("field", LEAST)
def test_what_was_allowed_stays_allowed(field: str) -> None:
    found = [
        max(schema[name] for name in ("maxLength", "maxItems", "maxProperties") if name in schema)
        for kind in crdgen.KINDS
        for path, schema in walk(crdgen.schema(kind)["properties"]["spec"], kind.name)
        if path.endswith(f".{field}")
    ]
    assert found
    assert min(found) >= LEAST[field]


@pytest.mark.parametrize("kind", [kind for kind in crdgen.KINDS if kind.batch], ids=lambda kind: kind.name)
def test_every_field_of_a_recipe_is_immutable(kind: crdgen.Kind) -> None:
    spec = crdgen.schema(kind)["properties"]["spec"]
    fixed = {rule["message"].split()[0] for rule in spec["x-kubernetes-validations"] if "oldSelf" in rule["rule"]}
    assert fixed == spec["properties"].keys() - set(MUTABLE)


@pytest.mark.parametrize("kind", crdgen.KINDS, ids=lambda kind: kind.name)
def test_nothing_is_added_to_a_list_that_somebody_applies(kind: crdgen.Kind) -> None:
    """GitOps compares lists whole: with a default in its items it would apply the object again and again."""
    spec = walk(crdgen.schema(kind)["properties"]["spec"], "spec")
    assert len([path for path, _ in spec if "[]" in path]) > 5
    assert [path for path, schema in spec if "[]" in path and "default" in schema] == []


def test_status_defaults_to_in_progress_and_to_nothing_else() -> None:
    for kind in crdgen.KINDS:
        status = crdgen.schema(kind)["properties"]["status"]
        assert status["default"] == {"observedGeneration": -1}
        assert [path for path, schema in walk(status, "") if path and "default" in schema] == []
