"""Requests: what is taken, and the 400 that names what is not."""

import json
from typing import Any

import pytest

from slmops_server.errors import ApiError
from slmops_server.grammar import JSON_OPTIONS, calls_grammar
from slmops_server.schema import parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


def tool(parameters: object, **more: object) -> dict[str, Any]:
    """One with that schema of its arguments."""
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


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
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": {}, "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "system", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "tool_call_id": "a", "content": {}}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "id": {}}]}]}, "messages[0].tool_calls[0].id"),
    ({"messages": [{"role": "user", "content": "", "reasoning_content": "x"}]}, "messages[0].reasoning_content"),
    ({"messages": [{"role": "assistant", "content": "", "reasoning_content": 1}]}, "messages[0].reasoning_content"),
    ({"messages": [{"role": "user", "content": "", "reasoning": "x"}]}, "messages[0].reasoning"),
    ({"messages": [{"role": "assistant", "content": "", "reasoning": 1}]}, "messages[0].reasoning"),
    ({"messages": [{"role": "assistant", "reasoning": "x", "reasoning_content": "y"}]}, "messages[0].reasoning"),
    ({"messages": [{"role": "user", "content": "", "made_up": 1}]}, "messages[0].made_up"),
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
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": True}, "max_completion_tokens"),
    ({"stop": [f"{n}" for n in range(17)]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop": 0}, "stop"),
    ({"stop": {}}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": 1}},
        "stream_options.continuous_usage_stats",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"echo": True}, "echo"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"\u00b2": 1}}, "logit_bias"),
    ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "made_up": 1}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "name": 1}}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "no"}}},
        "response_format.json_schema.strict",
    ),
    ({"response_format": {"type": ["text"]}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": "{}"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format"),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}}, "tools": [TOOL]}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a", "strict": False}}, "structured_outputs"),
    ({"tools": {}}, "tools"),
    ({"tools": [{}]}, "tools[0]"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [tool(1)]}, "tools[0].function.parameters"),
    ({"tools": [tool({"type": "array"})]}, "tools[0].function.parameters"),
    ({"tools": [tool({"type": ["string", "null"]})]}, "tools[0].function.parameters"),
    ({"tools": [tool({"type": {}})]}, "tools[0].function.parameters"),
    ({"tools": [TOOL, {**TOOL, "made_up": 1}]}, "tools[1].made_up"),
    ({"tools": [tool({}, strict="yes")]}, "tools[0].function.strict"),
    ({"tools": [tool({}, strict=True)], "ignore_eos": True}, "ignore_eos"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"chat_template_kwargs": 1}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"}, "chat_template_kwargs"),
    ({"reasoning_effort": 1}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"made_up": 1}, "made_up"),
    ({"prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[json.dumps(b[0])[:60] for b in BAD])
def test_refusals_name_the_field(change: dict[str, Any], param: str) -> None:
    assert refused("chat", CHAT | change).param == param


@pytest.mark.parametrize("prompt", [None, 3, [], [1.5], [True], ["a", [1]], [[]], {}])
def test_prompts_that_are_refused(prompt: object) -> None:
    assert refused("completions", TEXT | {"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_that_are_taken(prompt: object, prompts: list[object]) -> None:
    got = parse("completions", json.dumps(TEXT | {"prompt": prompt}).encode())
    assert (got.prompts, got.max_tokens) == (prompts, 16)


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
        {"verbosity": None, "prediction": None, "reasoning_effort": None},
        {"top_k": -1},
        {"stop": None},
        {"stop": ["a", "b", "c", "d", "e", "f"]},
        {"tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [tool({})]},
        {"tools": [tool({}, strict=None, description=None, made_up=None)], "ignore_eos": True},
        {"tools": [tool({}, strict=True, description="d")]},
        {"tools": [tool({"type": ["object", "null"]})]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
        {"response_format": {"type": "json_object"}, "tools": [TOOL]},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"n": 3, "logprobs": True, "top_logprobs": 20, "logit_bias": {"5": -100}, "stop_token_ids": [1]},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": None}},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"stream": False, "stream_options": {"include_usage": None}},
    ],
)
def test_harmless_fields_are_taken(extra: dict[str, Any]) -> None:
    assert parse("chat", json.dumps(CHAT | extra).encode()).model == "m"


def nested(depth: int) -> str:
    """A JSON schema of that depth."""
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize("depth", [900, 950, 970, 980, 990, 1000, 1010, 1020, 1030, 5000, 9900, 9970, 9990, 20_000])
@pytest.mark.parametrize(
    "fields",
    [
        '"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}',
        '"structured_outputs": {"json": SCHEMA}',
        '"structured_outputs": {"json": TEXT}',
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}], "tool_choice": "required"',
        '"messages": [{"role": "assistant", "tool_calls": [{"id": SCHEMA, "function": {"name": "f"}}]}]',
        '"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": TEXT}}]}]',
        '"chat_template_kwargs": SCHEMA, "metadata": SCHEMA',
        '"functions": SCHEMA',
    ],
)
def test_what_is_nested_too_deeply_is_a_400(fields: str, depth: int) -> None:
    """How deep is too deep is Python's to say, by its version and by what calls it."""
    told = fields.replace("SCHEMA", nested(depth)).replace("TEXT", json.dumps(nested(depth)))
    refusal = None
    try:
        got = parse("chat", f'{{"model": "m", "messages": [{{"role": "user", "content": "hi"}}], {told}}}'.encode())
        if got.tools:
            calls_grammar(got.tools, tagged=True)
    except ApiError as error:
        refusal = error
    assert refusal is None or (refusal.status == 400 and len(refusal.body()) < 1000)


def test_content_parts_and_the_developer_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = parse("chat", json.dumps(CHAT | {"messages": [{"role": "developer", "content": parts}]}).encode())
    assert got.messages == [{"role": "system", "content": "a\nb"}]


def test_a_schema_is_kept_by_either_type_of_response_format() -> None:
    """json_object with a schema: llama.cpp, Together, Fireworks."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    forms = (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}, "schema": None},
    )
    for form in forms:
        got = parse("chat", json.dumps(CHAT | {"response_format": form}).encode()).grammar
        assert got
        assert (got.kind, json.loads(got.text), got.param) == (
            "json",
            {"x-guidance": JSON_OPTIONS, **schema},
            "response_format",
        )


def test_what_litellm_adds_to_an_answer_is_taken_in_the_next_turn() -> None:
    call = {"id": "a1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    added = {"function_call": None, "provider_specific_fields": {"refusal": None}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], **added}
    result = {"role": "tool", "tool_call_id": "a1", "name": "f", "content": "2"}
    got = parse("chat", json.dumps(CHAT | {"messages": [answer, result], "tools": [TOOL]}).encode()).messages
    assert got
    assert [message["role"] for message in got] == ["assistant", "tool"]
    assert set(got[0]) == {"role", "content", "tool_calls"}


def test_answers_that_clients_send_back_are_taken_with_what_the_model_thought() -> None:
    answer = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "parsed": {"a": 1}}
    thought = {"role": "assistant", "content": "b", "type": "message", "reasoning_content": "hm", "parsed": None}
    cut = {"role": "assistant", "content": None, "reasoning_content": "h"}  # before it had thought to the end
    newer = {"role": "assistant", "content": "c", "reasoning": "so"}  # vLLM's name, and of some clients both
    both = {**newer, "reasoning_content": "so"}
    got = parse("chat", json.dumps(CHAT | {"messages": [answer, thought, cut, newer, both]}).encode()).messages
    assert got == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "assistant", "content": "", "reasoning_content": "h"},
        {"role": "assistant", "content": "c", "reasoning_content": "so"},
        {"role": "assistant", "content": "c", "reasoning_content": "so"},
    ]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
def test_answers_and_results_without_text_are_taken(content: dict[str, Any]) -> None:
    """As agents send a tool's that gave nothing back, and an answer that was empty."""
    silent = [{"role": "assistant", **content}, {"role": "tool", "tool_call_id": "a", **content}]
    got = parse("chat", json.dumps(CHAT | {"messages": silent}).encode()).messages
    assert got
    assert [message["content"] for message in got] == ["", ""]
    error = refused("chat", CHAT | {"messages": [{"role": "user", **content}]})
    assert error.message == "messages[0].content is missing or empty."


def test_sampling_fields_arrive() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": -3, "repetition_penalty": 1.1, "min_p": 0.1}
    got = parse("chat", json.dumps(CHAT | fields | {"stop": "x", "max_completion_tokens": 9}).encode())
    assert {k: getattr(got.sampling, k) for k in fields} == fields
    assert (got.stop, got.max_tokens) == (("x",), 9)


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_what_load_generators_send_is_taken(kind: str) -> None:
    """guidellm's and vLLM's: the length by both names, counts in every chunk."""
    base = CHAT if kind == "chat" else TEXT
    both = parse(kind, json.dumps(base | {"max_tokens": 9, "max_completion_tokens": 9, "ignore_eos": True}).encode())
    newer = parse(kind, json.dumps(base | {"max_completion_tokens": 9}).encode())
    assert (both.max_tokens, newer.max_tokens) == (9, 9)
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = parse(kind, json.dumps(base | {"stream": True, "stream_options": options}).encode())
    assert (got.include_usage, got.continuous_usage) == (True, True)


def test_tool_messages_reach_the_template_with_arguments_as_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    got = parse("chat", json.dumps(CHAT | {"messages": messages}).encode()).messages
    assert got == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    call["function"]["arguments"] = "{"  # type: ignore[index]
    assert refused("chat", CHAT | {"messages": messages}).param == "messages[0].tool_calls[0].function.arguments"


def test_logprobs_of_both_forms() -> None:
    assert parse("completions", json.dumps(TEXT | {"logprobs": 0}).encode()).sampling.logprobs == 0
    assert parse("completions", json.dumps(TEXT).encode()).sampling.logprobs == -1
    assert parse("chat", json.dumps(CHAT | {"logprobs": True}).encode()).sampling.logprobs == 0
    assert refused("completions", TEXT | {"logprobs": 21}).param == "logprobs"
