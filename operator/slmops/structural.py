"""pydantic's JSON Schema -> the structural schema that a CustomResourceDefinition takes.

pydantic writes what the API server refuses or misreads: `$ref`, `anyOf: [X, null]`, `const`, numeric
`exclusiveMinimum`, null defaults, titles. This module rewrites these and leaves all else as it is. Raises
UnsupportedError for what it does not know: a schema that says less than the model would be found out by users only.
"""

from typing import Any

Schema = dict[str, Any]

_KEPT = frozenset(
    {
        "type", "format", "description", "enum", "pattern", "default", "required",
        "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength",
        "minItems", "maxItems", "minProperties", "maxProperties",
        "properties", "items", "additionalProperties",
    }
)  # fmt: skip


class UnsupportedError(ValueError):
    """The model says something that a structural schema cannot."""


def structural(schema: Schema) -> Schema:
    """`schema` of a pydantic model, with its `$defs`, as a structural schema without references."""
    return without_defaults(_rewrite(schema, schema.get("$defs") or {}, ""), of_items=True)


def without_defaults(schema: Schema, *, of_items: bool = False) -> Schema:
    """A copy with no `default` anywhere: for status, which the operator writes whole.

    `of_items`: with none in the items of lists alone. GitOps compares lists whole, and one that the API server adds
    something to would differ from the one in Git for ever.
    """
    copy = {key: value for key, value in schema.items() if key != "default" or of_items}
    if "properties" in copy:
        fields = copy["properties"].items()
        copy["properties"] = {name: without_defaults(field, of_items=of_items) for name, field in fields}
    if isinstance(copy.get("additionalProperties"), dict):
        copy["additionalProperties"] = without_defaults(copy["additionalProperties"], of_items=of_items)
    if "items" in copy:
        copy["items"] = without_defaults(copy["items"])
    return copy


def _rewrite(schema: Schema, defs: Schema, path: str) -> Schema:
    schema = _inline(schema, defs, path)
    if schema.get("x-kubernetes-int-or-string"):
        return _int_or_string(schema)
    out: Schema = {}
    for key, value in schema.items():
        if key in ("title", "$defs", "additionalProperties") and not isinstance(value, dict):
            continue
        if key in ("$defs", "title"):
            continue
        if key == "const":
            out["enum"] = [value]
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            out[key.replace("exclusiveM", "m")] = value
            out[key] = True
        elif key in _KEPT or key.startswith("x-kubernetes-"):
            out[key] = value
        else:
            raise UnsupportedError(f"{path or '.'}: a structural schema has no {key!r}")
    if "properties" in out:
        out["properties"] = {name: _rewrite(field, defs, f"{path}.{name}") for name, field in out["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in out:
            out[key] = _rewrite(out[key], defs, f"{path}[]")
    if "type" not in out:
        raise UnsupportedError(f"{path or '.'}: no type")
    return _with_default(out)


def _inline(schema: Schema, defs: Schema, path: str) -> Schema:
    """Follow `$ref` and the optional's `anyOf`; what stands beside them (description, default) wins."""
    while True:
        beside = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}
        if "$ref" in schema:
            schema = {**defs[schema["$ref"].rsplit("/", 1)[1]], **beside}
        elif "anyOf" in schema and not schema.get("x-kubernetes-int-or-string"):
            inner = [branch for branch in schema["anyOf"] if branch != {"type": "null"}]
            if len(inner) != 1:
                raise UnsupportedError(f"{path}: a union; use optional siblings and a CEL rule")
            schema = {**inner[0], **beside}
        else:
            return schema


def _int_or_string(schema: Schema) -> Schema:
    kept = {key: value for key, value in schema.items() if key in ("description", "pattern", "maxLength")}
    return {**kept, "anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}


def _with_default(schema: Schema) -> Schema:
    """Drop a null default; of an object's default keep only what its fields' own defaults do not say already."""
    if "default" not in schema:
        return schema
    default = schema["default"]
    if default is None:
        return {key: value for key, value in schema.items() if key != "default"}
    return {**schema, "default": _reduced(default, schema)}


def _reduced(value: Any, schema: Schema) -> Any:
    if isinstance(value, dict) and "properties" in schema:
        fields = schema["properties"]
        reduced = {name: _reduced(item, fields.get(name, {})) for name, item in value.items() if item is not None}
        return {name: item for name, item in reduced.items() if item != fields.get(name, {}).get("default")}
    if isinstance(value, list):
        return [_reduced(item, schema.get("items", {})) for item in value]
    return value
