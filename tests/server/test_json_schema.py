"""What of a client's JSON schema is kept, let be or refused, through the request's fields and llguidance."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from slmops_server.grammar import Grammar, calls_grammar
from slmops_server.guide import BadGrammarError, Guides
from slmops_server.json_schema import kept
from slmops_server.schema import parse

LOOK = r"^(?!\.)(?!.*\.\.)[a-z.]+@[a-z]+$"  # as zod has it of an e-mail address
ADVICE = "a json_schema or function that is not strict may have it."


@pytest.fixture(scope="module")
def guides(tiny: Path) -> Guides:
    return Guides(tiny / "tokenizer.json", 512, [2])


def grammars(schema: dict[str, Any], strict: bool) -> list[Grammar]:
    """Of a json_schema, and of a function that has to be called."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
    inner = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": inner, "strict": strict}}
    made = []
    for fields in ({"response_format": form}, {"tools": [tool], "tool_choice": "required"}):
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
        got = parse("chat", json.dumps(body).encode())
        made.append(got.grammar or calls_grammar(got.tools, tagged=False))  # type: ignore[arg-type]
    return made


def fits(guides: Guides, tiny: Path, grammar: Grammar, answer: str) -> bool:
    guide = guides.new(grammar.kind, grammar.text)
    for token in Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(answer, add_special_tokens=False).ids:
        if not guide.allowed()[token]:
            return False
        guide.take(token)
    return bool(guide.allowed()[2])


NUMBERS = {"oneOf": [{"const": 1, "title": "a"}, {"enum": [2, 3]}, {"const": 4}]}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "array", "items": {"const": 1}, "uniqueItems": False}, "[1, 1]", "[2]"),
        ({"type": "object", "propertyNames": {"type": "string"}, "required": ["a"]}, '{"a": 1}', "{}"),
        ({"type": "object", "propertyNames": True, "maxProperties": 0}, "{}", "[]"),
        ({"type": "object", "unevaluatedProperties": True, "required": ["a"]}, '{"a": 1}', "{}"),
        ({"type": "array", "unevaluatedItems": {}, "minItems": 1}, "[1]", "[]"),
        ({"type": "object", "dependentRequired": {}, "dependentSchemas": {}, "required": ["a"]}, '{"a": 1}', "{}"),
        ({"type": "object", "dependencies": {}, "required": ["a"]}, '{"a": 1}', "{}"),
        ({"type": "string", "format": "", "maxLength": 2}, '"ab"', '"abc"'),
        ({"type": "array", "items": NUMBERS}, "[1, 2, 3, 4]", "[5]"),
        ({"oneOf": [{"const": True}, {"const": 1}, {"const": None}]}, "true", "2"),
        ({"$ref": "#/$defs/n", "$defs": {"n": NUMBERS}}, "3", "5"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_asks_for_nothing_is_refused_to_nobody(
    guides: Guides, tiny: Path, schema: dict[str, Any], good: str, bad: str, strict: bool
) -> None:
    form, call = grammars(schema, strict)
    assert fits(guides, tiny, form, good)
    assert not fits(guides, tiny, form, bad)
    if "$ref" not in schema:  # its pointer is from the root of the arguments there
        assert fits(guides, tiny, call, f'{{"name": "f", "arguments": {{"a": {good}}}}}')


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"oneOf": [{"const": 1}, {"enum": [2, 1.0]}]}, "oneOf constraints are not supported. This"),
        ({"oneOf": [{"enum": [1, 2]}, {"type": "integer", "minimum": 2}]}, "oneOf"),
        ({"oneOf": [{"const": 1}, {"const": 2}], "anyOf": [{"const": 1}]}, "oneOf"),
        ({"type": "string", "pattern": LOOK}, "pattern: regex parse error: look-around"),
        ({"type": "string", "pattern": r"(a)\1"}, "pattern: regex parse error: backreferences are not"),
        ({"type": "string", "pattern": r"\ba"}, "pattern: lookarounds not supported"),
        ({"type": "object", "patternProperties": {LOOK: {}}}, "pattern: regex parse error: look-around"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_cannot_be_enforced_is_named_and_let_be_where_nothing_is_strict(
    guides: Guides, schema: dict[str, Any], named: str
) -> None:
    for grammar in grammars(schema, strict=True):
        with pytest.raises(BadGrammarError) as caught:
            guides.new(grammar.kind, grammar.text)
        assert named in str(caught.value)
        assert str(caught.value).endswith(ADVICE)
    for grammar in grammars(schema, strict=False):
        guides.new(grammar.kind, grammar.text)


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        *((grammar, True) for strict in (True, False) for grammar in grammars({"pattern": "(a"}, strict)),
        (Grammar("regex", "(a", ""), False),
        (Grammar("lark", "start: /(a/", ""), False),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_broken_pattern_is_refused_with_its_reason_and_no_advice(
    guides: Guides, grammar: Grammar, named: bool
) -> None:
    with pytest.raises(BadGrammarError, match=r"regex parse error: unclosed group$") as caught:
        guides.new(grammar.kind, grammar.text)
    assert ("pattern: " in str(caught.value)) == named


@pytest.mark.parametrize("pattern", [r"\(?!a", "[(?!]a", "[^(?=)]", r"[\](?!]", "(?:a)", "(?<n>a)", r"a\\b", r"\d+$"])
def test_patterns_that_only_look_like_more_are_kept(pattern: str) -> None:
    assert kept({"pattern": pattern}, strict=False) == {"pattern": pattern}


def test_names_and_values_are_not_taken_for_keywords() -> None:
    told = {
        "properties": {"uniqueItems": False, "pattern": {"const": {"uniqueItems": False}}, "oneOf": {"default": LOOK}},
        "enum": [{"format": "", "pattern": LOOK}],
        "required": ["pattern"],
    }
    assert kept(told, strict=False) == told
