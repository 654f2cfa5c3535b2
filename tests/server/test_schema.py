"""Requests: what is taken, and the 400 that names what is not."""

import json
from typing import Any

import pytest

from slmops_server.errors import ApiError
from slmops_server.schema import parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}


def refused(kind: str, fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, json.dumps(fields).encode())
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b'{"a": "\xc3"}'])
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse("chat", body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


BAD = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [3]}, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": "x"}, "seed"),
    ({"seed": 1 << 70}, "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"tools": [{}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"logit_bias": {"1": 2}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"made_up": 1}, "made_up"),
    ({"prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[json.dumps(b[0])[:60] for b in BAD])
def test_refusals_name_the_field(change: dict[str, Any], param: str) -> None:
    assert refused("chat", CHAT | change).param == param


@pytest.mark.parametrize("prompt", [None, 3, [], [1.5], [True], ["a", "b"], [[1], [2]], {}])
def test_prompts_that_are_refused(prompt: object) -> None:
    assert refused("completions", TEXT | {"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "text", "ids"), [("a", "a", None), (["a"], "a", None), ([1, 2], None, [1, 2]), ([[1]], None, [1])]
)
def test_prompts_that_are_taken(prompt: object, text: str | None, ids: list[int] | None) -> None:
    got = parse("completions", json.dumps(TEXT | {"prompt": prompt}).encode())
    assert (got.text, got.ids, got.max_tokens) == (text, ids, 16)


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "u"},
        {"metadata": {"a": "b"}},
        {"store": False},
        {"service_tier": "auto"},
        {"n": 1},
        {"logprobs": False},
        {"tools": []},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"made_up": None},
        {"top_k": -1},
        {"stop": None},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_harmless_fields_are_taken(extra: dict[str, Any]) -> None:
    assert parse("chat", json.dumps(CHAT | extra).encode()).model == "m"


def test_content_parts_and_the_developer_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = parse("chat", json.dumps(CHAT | {"messages": [{"role": "developer", "content": parts}]}).encode())
    assert got.messages == [{"role": "system", "content": "a\nb"}]


def test_sampling_fields_arrive() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": -3, "repetition_penalty": 1.1, "min_p": 0.1}
    got = parse("chat", json.dumps(CHAT | fields | {"stop": "x", "max_completion_tokens": 9}).encode())
    assert {k: getattr(got.sampling, k) for k in fields} == fields
    assert (got.stop, got.max_tokens) == (("x",), 9)
