"""crds/*.yaml -> the field tables in docs/: `python -m slmops.docgen [--check]`.

A page holds the lines `<!-- fields: <plural> -->` and `<!-- end of fields -->`; what stands between them is generated.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MARK = re.compile(r"(<!-- fields: (?P<plural>\w+) -->\n).*?(<!-- end of fields -->)", re.DOTALL)


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object" and "additionalProperties" in schema:
        return f"map to {_type(schema['additionalProperties'])}"
    return str(schema.get("format") or schema.get("type") or "any")


def _count(schema: dict[str, Any], what: str, word: str) -> list[str]:
    """How many of something there may be: minItems and maxItems, for one."""
    low, high = schema.get(f"min{what}"), schema.get(f"max{what}")
    if high is None:
        return [f"≥ {low} {word}"] if low else []
    return [f"{low} to {high} {word}" if low else f"≤ {high} {word}"]


def _limits(schema: dict[str, Any]) -> str:
    words = []
    if "minimum" in schema or "maximum" in schema:
        low = f"{'>' if schema.get('exclusiveMinimum') else '≥'} {schema['minimum']}" if "minimum" in schema else ""
        high = f"{'<' if schema.get('exclusiveMaximum') else '≤'} {schema['maximum']}" if "maximum" in schema else ""
        words.append(", ".join(part for part in (low, high) if part))
    for what, word in (("Length", "characters"), ("Items", "items"), ("Properties", "entries")):
        words += _count(schema, what, word)
    if "pattern" in schema and not schema.get("x-kubernetes-int-or-string"):  # a quantity's says nothing to people
        words.append(f"as `{schema['pattern']}`".replace("|", "\\|"))
    if schema.get("x-kubernetes-list-type") == "set":
        words.append("each once")
    if keys := schema.get("x-kubernetes-list-map-keys"):
        words.append(f"each {', '.join(f'`{key}`' for key in keys)} once")
    inner = schema.get("items", schema.get("additionalProperties"))
    if isinstance(inner, dict) and "properties" not in inner and (said := _limits(inner)):
        words.append(f"of each: {said}")
    if "default" in schema and schema["default"] != {}:  # of an empty object, the fields tell theirs
        default = schema["default"]
        words.append(f"default `{default if isinstance(default, str) else json.dumps(default)}`")
    return "; ".join(words)


def rows(schema: dict[str, Any], path: str = "", limits: bool = True) -> Iterator[str]:
    """Table rows, depth first, of an object schema's fields; `limits`: with what a value may be."""
    required = set(schema.get("required") or [])
    for name, field in (schema.get("properties") or {}).items():
        here = f"{path}.{name}" if path else name
        star = " **required**" if name in required else ""
        text = str(field.get("description", "")).replace("|", "\\|").replace("\n", " ")
        cells = [f"`{here}`{star}", _type(field), *([_limits(field)] if limits else []), text]
        yield f"| {' | '.join(cells)} |"
        inner = field.get("items", field) if field.get("type") == "array" else field
        suffix = "[]" if field.get("type") == "array" else ""
        if inner.get("properties"):
            yield from rows(inner, here + suffix, limits)


def rules(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """The messages of all CEL rules of `schema` and below it, with the place each holds at."""
    for rule in schema.get("x-kubernetes-validations") or []:
        yield f"- {f'`{path}`' if path else 'the object'}: {rule.get('message', rule['rule'])}"
    for name, field in (schema.get("properties") or {}).items():
        yield from rules(field, f"{path}.{name}" if path else name)
    if "items" in schema:
        yield from rules(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from rules(schema["additionalProperties"], f"{path}.*")


def section(crd: dict[str, Any]) -> str:
    """The generated section of one kind's page."""
    whole = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec, status = whole["properties"]["spec"], whole["properties"]["status"]
    return (
        "### spec\n\n| field | type | limits | meaning |\n|---|---|---|---|\n"
        + "\n".join(rows(spec))
        + "\n\n"
        + "### Rules across fields\n\n"
        + "\n".join(dict.fromkeys(rules(whole)))
        + "\n\n"
        + "### status\n\n| field | type | meaning |\n|---|---|---|\n"
        + "\n".join(rows(status, limits=False))
        + "\n"
    )


def render(page: str, crds: Path) -> str:
    """`page` with its generated sections renewed."""

    def renew(match: re.Match[str]) -> str:
        crd = yaml.safe_load((crds / f"{match['plural']}.slmops.dev.yaml").read_text(encoding="utf-8"))
        return match[1] + section(crd) + match[3]

    return MARK.sub(renew, page)


def main() -> int:
    """0, or with --check 1 where a page is out of date."""
    root = Path(__file__).resolve().parents[2]
    stale = 0
    for path in sorted((root / "docs").glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = render(old, root / "crds")
        if old == new:
            continue
        stale += 1
        if "--check" in sys.argv:
            sys.stderr.write(f"{path.name} is out of date: run `make crds`\n")
        else:
            path.write_text(new, encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
