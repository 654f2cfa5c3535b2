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


def _limits(schema: dict[str, Any]) -> str:
    words = []
    if "minimum" in schema or "maximum" in schema:
        low = f"{'>' if schema.get('exclusiveMinimum') else '≥'} {schema['minimum']}" if "minimum" in schema else ""
        high = f"{'<' if schema.get('exclusiveMaximum') else '≤'} {schema['maximum']}" if "maximum" in schema else ""
        words.append(", ".join(part for part in (low, high) if part))
    if "default" in schema and schema["default"] != {}:  # of an empty object, the fields tell theirs
        default = schema["default"]
        words.append(f"default `{default if isinstance(default, str) else json.dumps(default)}`")
    return "; ".join(words)


def rows(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Table rows, depth first, of an object schema's fields."""
    required = set(schema.get("required") or [])
    for name, field in (schema.get("properties") or {}).items():
        here = f"{path}.{name}" if path else name
        star = " **required**" if name in required else ""
        text = str(field.get("description", "")).replace("|", "\\|").replace("\n", " ")
        yield f"| `{here}`{star} | {_type(field)} | {_limits(field)} | {text} |"
        inner = field.get("items", field) if field.get("type") == "array" else field
        suffix = "[]" if field.get("type") == "array" else ""
        if inner.get("properties"):
            yield from rows(inner, here + suffix)


def rules(schema: dict[str, Any], path: str = "spec") -> Iterator[str]:
    """The messages of all CEL rules below `schema`, with the place each holds at."""
    for rule in schema.get("x-kubernetes-validations") or []:
        yield f"- `{path}`: {rule.get('message', rule['rule'])}"
    for name, field in (schema.get("properties") or {}).items():
        yield from rules(field, f"{path}.{name}")
    if "items" in schema:
        yield from rules(schema["items"], f"{path}[]")


def section(crd: dict[str, Any]) -> str:
    """The generated section of one kind's page."""
    top = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    head = "| field | type | limits | meaning |\n|---|---|---|---|\n"
    spec, status = top["spec"], top["status"]
    return (
        f"### spec\n\n{head}"
        + "\n".join(rows(spec))
        + "\n\n"
        + "### Rules across fields\n\n"
        + "\n".join(dict.fromkeys(rules(spec)))
        + "\n\n"
        + f"### status\n\n{head}"
        + "\n".join(rows(status))
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
