"""Which text an answer may have: from the request's fields to one grammar in llguidance's terms."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from slmops_server.detok import CLOSE, OPEN
from slmops_server.errors import bad_request
from slmops_server.fields import flag
from slmops_server.json_schema import kept
from slmops_server.messages import Tools

if TYPE_CHECKING:  # the front does without the library
    from llguidance._lib import JsonCompileOptions

# whitespace_pattern: any JSON is accepted at any width, but no model may fill its answer with blanks.
# lenient: whether a schema's keywords that cannot be enforced (a format of its own, say) are let be, or refused.
JSON_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"[ \n\t]{0,24}", "lenient": False}
LENIENT: "JsonCompileOptions" = {**JSON_OPTIONS, "lenient": True}
MAX_CALLS = 8  # in one answer, where calls are forced
MAX_TEXT = 256 << 10  # characters; compiling takes seconds from there on
# The types of response_format, and what each may have beside it. A schema without a name is llama.cpp's form
FORMS = {"text": set[str](), "json_object": {"schema"}, "json_schema": {"json_schema"}}
WRAPPED = {"name", "description", "schema", "strict"}
KINDS = ("json", "regex", "choice", "grammar", "json_object")


class Grammar(NamedTuple):
    """kind is "json" (text is a JSON schema), "regex" or "lark"; param is the request's field, for error messages."""

    kind: str
    text: str
    param: str


def _schema(value: Any, param: str, strict: bool = True) -> Grammar:
    if not isinstance(value, dict):
        raise bad_request(f"{param} is not a JSON schema.", param)
    told = {"x-guidance": JSON_OPTIONS if strict else LENIENT, **value}
    return Grammar("json", _dumps(told, param, strict), param)


def _dumps(schema: Any, param: str, strict: bool) -> str:
    try:
        text = json.dumps(schema)
        return text if len(text) > MAX_TEXT else json.dumps(kept(schema, strict))  # too large, it is refused unread
    except RecursionError:
        raise bad_request(f"{param} is nested too deeply.", param, "invalid_grammar") from None


def read_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """From response_format (OpenAI) or structured_outputs (vLLM)."""
    form, outputs = fields.get("response_format"), fields.get("structured_outputs")
    found = _response_format(form) if form is not None else None
    if outputs is None:
        return _checked(found) if found else None
    if found is not None:
        raise bad_request("structured_outputs and response_format exclude each other.", "structured_outputs")
    return _checked(_structured_outputs(outputs))


def _checked(grammar: Grammar) -> Grammar:
    if len(grammar.text) > MAX_TEXT:
        raise bad_request(
            f"The grammar has {len(grammar.text)} characters, {MAX_TEXT} are allowed.", grammar.param, "invalid_grammar"
        )
    return grammar


def _response_format(form: Any) -> Grammar | None:
    where = "response_format"
    given = {k: v for k, v in form.items() if v is not None} if isinstance(form, dict) else {}
    kind = given.pop("type", None)
    if not isinstance(kind, str) or kind not in FORMS:
        raise bad_request(f"{where}.type is not one of {', '.join(FORMS)}.", where)
    if unknown := set(given) - FORMS[kind]:
        raise bad_request(f"{where}.{min(unknown)} is not supported with the type {kind}.", where)
    if kind == "text":
        return None
    if kind == "json_object":
        return _schema(given.get("schema", {"type": "object"}), where)
    told = given.get("json_schema")
    wrapped = {k: v for k, v in told.items() if v is not None} if isinstance(told, dict) else {}
    if "schema" not in wrapped:
        raise bad_request(f"{where}.json_schema.schema is missing.", where)
    if unknown := set(wrapped) - WRAPPED:
        raise bad_request(f"{where}.json_schema.{min(unknown)} is not supported.", where)
    for name in ("name", "description"):
        if not isinstance(wrapped.get(name, ""), str):
            raise bad_request(f"{where}.json_schema.{name} is not a string.", where)
    return _schema(wrapped["schema"], where, flag(wrapped, "strict", False, f"{where}.json_schema.strict"))


def _structured_outputs(outputs: Any) -> Grammar:
    where = "structured_outputs"
    told = outputs.items() if isinstance(outputs, dict) else ()
    given = {k: v for k, v in told if v is not None and not (v is False and k in KINDS)}
    if len(given) != 1 or next(iter(given)) not in KINDS:
        raise bad_request(f"{where} is not an object with exactly one of {', '.join(KINDS)}.", where)
    kind, value = next(iter(given.items()))
    if kind == "json_object":
        return _schema({"type": "object"}, where)
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        return _schema(value, f"{where}.json")
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(c, str) and c for c in value):
            raise bad_request(f"{where}.choice is not a list of strings.", f"{where}.choice")
        # one terminal: as rules, thousands of choices that begin alike are more than the parser takes at a time
        return Grammar("lark", "start: CHOICE\nCHOICE: " + " | ".join(map(_literal, value)), f"{where}.choice")
    if not isinstance(value, str) or not value:
        raise bad_request(f"{where}.{kind} is not a string.", f"{where}.{kind}")
    return Grammar("lark" if kind == "grammar" else kind, value, f"{where}.{kind}")


def calls_grammar(tools: Tools, tagged: bool, special: Collection[str] = (), form: Grammar | None = None) -> Grammar:
    """One of the forced tools is called, or several if parallel calls are allowed and the model tags each.

    Where none is forced, there may be text and calls, and these are of the tools; with a form, of JSON, either that or
    calls. special: tags that are tokens too.
    """
    names: Sequence[str] = tools.forced or list(tools.schemas)
    if tools.forced:
        form = None
    elif form and not tagged:
        raise bad_request(
            f"tools and {form.param} exclude each other where the model's chat template has no tags for calls, unless "
            "tool_choice asks for one.",
            form.param,
        )
    rules = []
    for index, name in enumerate(names):
        head = _literal('{"name": ' + json.dumps(name) + ', "arguments": ')
        rules.append(f"tool_{index}: {head} arguments_{index} {_literal('}')}")
        strict = name in tools.strict
        told = tools.schemas[name] if tools.forced or strict else {}
        # a schema need not say that arguments are an object, but they always are
        schema = {**told, "type": "object", "x-guidance": JSON_OPTIONS if strict else LENIENT}
        rules.append(f"arguments_{index}: %json {_dumps(schema, 'tools', strict)}")
    tool = " | ".join(f"tool_{index}" for index in range(len(names)))
    if not tagged and not tools.forced:  # what begins as JSON may be calls, and has to be: see ToolParser
        again = f' (BLANK "," BLANK ({tool})){{0,{MAX_CALLS - 1}}}' if tools.parallel else ""
        rules += [
            r"BLANK: /[ \n\r\t]{0,24}/",
            r"TEXT: /[ \n\r\t]*([^{\[ \n\r\t](.|\n)*)?/",
            f'calls: "[" BLANK ({tool}){again} BLANK "]"',
        ]
        return _checked(Grammar("lark", "\n".join([f"start: TEXT | BLANK ({tool} | calls)", *rules]), "tools"))
    if not tagged:
        return _checked(Grammar("lark", "\n".join([f"start: {tool}", *rules]), "tools"))
    close = f'("{CLOSE}" | {CLOSE})' if CLOSE in special else f'"{CLOSE}"'
    rules.append(f'call: "\\n" ({tool}) "\\n" {close}')
    if tools.forced or form:
        opened = f'("{OPEN}" | {OPEN})' if OPEN in special else f'"{OPEN}"'
        again = f' ("\\n" {opened} call){{0,{MAX_CALLS - 1}}}' if tools.parallel else ""
        start, param = f"start: {opened} call{again}", "tools"
        if form:
            start, param = f"{start} | form", f"tools, {form.param}" if tools.strict else form.param
            rules.append(f"form: %json {form.text}")
        return _checked(Grammar("lark", "\n".join([start, *rules]), param))
    rules += [
        f'spelt[lazy]: TEXT "{OPEN}"',
        r"TEXT: /(.|\n)*/",
        f"opened: spelt{f' | TEXT {OPEN}' if OPEN in special else ''}",
    ]
    count = "*" if tools.parallel else "?"  # beyond one, calls are left out then
    return _checked(Grammar("lark", "\n".join([f"start: (opened call){count} TEXT", *rules]), "tools"))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
