"""JSON schemas as clients write them, made into what llguidance keeps."""

import re
from typing import Any

# Keywords whose values are schemas by name, and those whose values are none though they may look so
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
CONTENT = {"const", "enum", "default", "examples"}
# Values that ask for nothing, of keywords that llguidance refuses whatever their value
IDLE: dict[str, list[Any]] = {
    "uniqueItems": [False],
    "propertyNames": [True, {}, {"type": "string"}],
    "unevaluatedProperties": [True, {}],
    "unevaluatedItems": [True, {}],
    "dependentRequired": [{}],
    "dependentSchemas": [{}],
    "dependencies": [{}],
    "format": [""],
}
# An expression without look-around, back-references and edges of words, which llguidance has not
REGULAR = re.compile(r"(?:\\[^1-9kbB]|\[(?:\\.|[^\]\\])*\]|\((?!\?<?[=!])|[^\\\[(])*", re.DOTALL)


def kept(schema: Any, strict: bool) -> Any:
    """The same schema without what asks for nothing; not strict: without patterns that cannot be enforced, too."""
    if isinstance(schema, list):
        return [kept(one, strict) for one in schema]
    if not isinstance(schema, dict):
        return schema
    told: dict[str, Any] = {}
    for key, value in schema.items():
        if value in IDLE.get(key, ()) or (key == "pattern" and not strict and not _regular(value)):
            continue
        if key in NAMED and isinstance(value, dict):
            names = value if strict or key != "patternProperties" else filter(_regular, value)
            told[key] = {name: kept(value[name], strict) for name in names}
        else:
            told[key] = value if key in CONTENT else kept(value, strict)
    if "anyOf" not in told and _apart(told.get("oneOf")):
        told["anyOf"] = told.pop("oneOf")
    return told


def _regular(pattern: Any) -> bool:
    return not isinstance(pattern, str) or REGULAR.fullmatch(pattern) is not None


def _apart(branches: Any) -> bool:
    """Whether each branch lists its values, and none is in two: any of them is then one of them."""
    if not isinstance(branches, list) or not all(isinstance(branch, dict) for branch in branches):
        return False
    seen = set[tuple[bool, Any]]()
    for branch in branches:
        values = [branch["const"]] if "const" in branch else branch.get("enum")
        if not isinstance(values, list) or any(isinstance(value, (dict, list)) for value in values):
            return False
        own = {(isinstance(value, bool), value) for value in values}  # of Python's, True is 1 as well
        if own & seen:
            return False
        seen |= own
    return True
