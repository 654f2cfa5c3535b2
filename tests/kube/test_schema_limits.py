"""What is just allowed: the least and greatest of every number, text, list and map of every CRD, and every choice."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.kube.api import Api, Object
from tests.kube.specs import EXAMPLES, put
from tests.kube.test_schema import SCHEMAS, tried, walk

# Rules across fields forbid a value alone that another field would allow, as they should: see specs.py.
OTHERS = ("goes with", "spec.rollout: Invalid", "one of metrics", "Duplicate")


def exclusive(schema: Object, name: str) -> bool:
    return bool(schema.get("exclusiveMinimum" if name == "minimum" else "exclusiveMaximum"))


def longest(schema: Object, value: str) -> str:
    """`value` drawn out to the greatest length, in a way that its pattern allows."""
    more = schema["maxLength"] - len(value)
    drawn = (value + "a" * more, "a" * more + value, "1" * more + value)
    return next(text for text in drawn if re.search(schema.get("pattern", ""), text))


def fullest(schema: Object, value: list[Any]) -> list[Any]:
    """A list of the greatest length, of items like those of `value`; each differs where they have to."""
    count, items = schema["maxItems"], schema["items"]
    if schema.get("x-kubernetes-list-type") == "set":
        return list(items["enum"])
    keys = schema.get("x-kubernetes-list-map-keys", [])
    return [{**value[0], **dict.fromkeys(keys, f"n{n}")} if keys else value[0] for n in range(count)]


def allowed(schema: Object, value: Any) -> Iterator[tuple[str, Any]]:
    """(constraint, a value that just meets it) for one place, where `value` stands."""
    for name in ("minimum", "maximum"):
        if name in schema and not exclusive(schema, name):
            yield name, schema[name]
    yield from (("enum", choice) for choice in schema.get("enum", []))
    if "maxLength" in schema:
        yield "maxLength", longest(schema, str(value))
    if "maxItems" in schema and value:
        yield "maxItems", fullest(schema, value)
    if "maxProperties" in schema:
        yield "maxProperties", {f"k{n}": next(iter(value.values())) for n in range(schema["maxProperties"])}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_limits_themselves_are_taken(api: Api, kind: str) -> None:
    tested: dict[str, set[str]] = {}
    refused: set[tuple[str, str]] = set()
    for spec in EXAMPLES[kind]:
        for path, schema, old in walk(SCHEMAS[kind]["properties"]["spec"], spec, "spec"):
            for name, value in allowed(schema, old):
                place = re.sub(r"\.\d+(?=\.|$)", "[]", path)
                if name != "enum" and place in tested.get(name, ()):
                    continue
                answer = tried(api, kind, put({"spec": spec}, path, value)["spec"])
                if any(word in answer for word in OTHERS):
                    refused.add((name, place))
                    continue
                assert answer == "", (path, name)
                tested.setdefault(name, set()).add(place)
    assert tested.keys() == {"minimum", "maximum", "enum", "maxLength", "maxItems", "maxProperties"}
    never = {place for name, place in refused if place not in tested[name]}
    assert never <= {"spec.evaluation.thresholds"}, "of which there are as many as of metrics"
