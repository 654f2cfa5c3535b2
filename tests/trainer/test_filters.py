"""Tables for the filters: what goes, under which name, and what stays."""

import json
from typing import Any

import pytest

from slmops.api.distillation import Filters
from slmops_trainer import filters
from slmops_trainer.data import Example, Message
from slmops_trainer.failure import RunFailure, interrupted

SCHEMA = {"type": "object", "required": ["room"], "properties": {"room": {"type": "string"}}}


def row(text: str, prompt: str = "q", finish: str = "stop") -> filters.Row:
    return filters.Row(Example((Message("user", prompt),), None), text, finish)


def run(
    rows: list[filters.Row], thoughts: bool = False, schema: Any = None, **rules: Any
) -> tuple[list[str], dict[str, int]]:
    validator = filters.schema_of(json.dumps(schema), "test") if schema is not None else None
    kept, drops = filters.apply(rows, Filters.model_validate(rules), validator, thoughts=thoughts, check=lambda: None)
    return [example.answer or "" for example in kept], dict(drops)


@pytest.mark.parametrize(
    ("rows", "rules", "kept", "drops"),
    [
        ([row(" a \n")], {}, ["a"], {}),
        ([row("a"), row("a "), row("b"), row("a", "other")], {}, ["a", "b", "a"], {"dedupe": 1}),
        ([row("a"), row("a", "Q"), row("a", "q ")], {}, ["a", "a", "a"], {}),  # case and space may be the question
        ([row("a"), row("a")], {"dedupe": False}, ["a", "a"], {}),
        ([row("ab"), row("a")], {"minCharacters": 2}, ["ab"], {"minCharacters": 1}),
        ([row("ab"), row("abc")], {"maxCharacters": 2}, ["ab"], {"maxCharacters": 1}),
        ([row("   ")], {"minCharacters": 0}, [], {"noAnswer": 1}),
        ([row("a", finish="length"), row("b", finish="")], {}, ["b"], {"truncated": 1}),
        ([row("a", finish="content_filter")], {}, [], {"truncated": 1}),
        ([row("a", finish="length")], {"dropTruncated": False}, ["a"], {}),
        ([row('{"a": 1}'), row("3"), row("{"), row("NaN"), row("```json\n{}\n```")], {"validJson": True},
         ['{"a": 1}', "3"], {"validJson": 3}),
        ([row("[" * 100_000)], {"validJson": True}, [], {"validJson": 1}),
    ],
)  # fmt: skip
def test_each_filter_drops_what_it_names(
    rows: list[filters.Row], rules: dict[str, Any], kept: list[str], drops: dict[str, int]
) -> None:
    assert run(rows, **rules) == (kept, drops)


def test_the_schema_drops_what_does_not_fit_and_what_is_no_json() -> None:
    rows = [row('{"room": "lab"}'), row('{"room": 3}'), row("{}"), row("hello")]
    assert run(rows, schema=SCHEMA) == (['{"room": "lab"}'], {"jsonSchema": 3})
    assert run(rows, schema=SCHEMA, validJson=True) == (['{"room": "lab"}'], {"jsonSchema": 2, "validJson": 1})


def test_an_answer_nested_deeper_than_a_recursive_schema_can_follow_is_dropped() -> None:
    lists = {"$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}, "$ref": "#/$defs/list"}
    assert run([row("[[]]"), row("[" * 600 + "]" * 600)], schema=lists) == (["[[]]"], {"jsonSchema": 1})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>two and two</think>\n4", "4"),
        ("two and two</think> 4", "4"),  # servers that cut the opening tag
        ("<think>a</think> b <think>c</think> 4", "4"),
        ("4", "4"),
        ("<think>it never ends", None),
        ("<think>nothing after it</think>  ", None),
    ],
)
def test_thoughts_are_cut_out(text: str, answer: str | None) -> None:
    kept, drops = run([row(text)], thoughts=True)
    assert (kept, drops) == (([answer], {}) if answer else ([], {"noAnswer": 1}))


def test_thoughts_stay_where_none_were_asked_for() -> None:
    assert run([row("<think>x</think>4")])[0] == ["<think>x</think>4"]


def test_a_row_is_counted_once_and_every_row_is_accounted_for() -> None:
    rows = [row("x", finish="length"), row("x"), row("x"), row(""), row("xxxx")]
    kept, drops = run(rows, maxCharacters=3, validJson=False)
    assert len(kept) + sum(drops.values()) == len(rows)
    assert set(drops) <= set(filters.NAMES)


def test_a_pod_that_is_asked_to_stop_does_not_filter_to_the_end() -> None:
    left = 3

    def check() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise interrupted("stop")

    rows = [row(str(number)) for number in range(9)]
    with pytest.raises(RunFailure, match="stop"):
        filters.apply(rows, Filters(), None, thoughts=False, check=check)
    assert left == -1


def test_contamination_is_told_whatever_the_case_and_space() -> None:
    prompts = [Example((Message("user", text),), None) for text in ("one", "Two  words", "three")]
    held_out = [Example((Message("user", "two words"),), "2")]
    assert filters.contaminated(prompts, held_out) == {1}


def test_contamination_is_told_in_conversations_and_behind_system_prompts() -> None:
    """The system prompt of the spec is put before both later; the answers to earlier turns are trained on, too."""
    user, other = Message("user", "one"), Message("user", "two")
    prompts = [(user,), (user, Message("assistant", "1"), other), (other,), (Message("system", "t"), user)]
    held_out = [Example((Message("system", "s"), user), "1")]
    assert filters.contaminated([Example(turns, None) for turns in prompts], held_out) == {0, 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "here is not JSON"),
        ('{"type": "objekt"}', "here is no JSON Schema"),
        ('{"pattern": "("}', "here is no JSON Schema"),
        ("3", "here is no JSON Schema: it has to be an object"),
        ("[]", "here is no JSON Schema: it has to be an object"),
        ('{"$ref": "#/$defs/room"}', r"here has a \$ref that leads nowhere"),
        ('{"$ref": "https://example.com/room.json"}', r"here has a \$ref that leads nowhere"),
    ],
)
def test_a_bad_schema_is_named_before_anything_is_asked(text: str, message: str) -> None:
    with pytest.raises(RunFailure, match=message) as caught:
        filters.schema_of(text, "here")
    assert caught.value.reason == "BadSpec"
