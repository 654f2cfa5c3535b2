"""Chat templates: the same text that transformers' apply_chat_template gives (its 4.57 gave the expected values)."""

import asyncio
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slmops_server import schema as requests
from slmops_server.choice import Choice
from slmops_server.errors import ApiError
from slmops_server.messages import read_messages
from slmops_server.service import Service
from slmops_server.settings import parse
from slmops_server.stream import Delta
from slmops_server.template import ChatTemplate
from slmops_server.wire import Frames

USER = [{"role": "user", "content": "hi"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CASES = {
    "plain": ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "<s>hi"),
    "generation prompt": ("{% if add_generation_prompt %}go{% endif %}", "go"),
    "block lines leave no blank lines": (
        "{% for m in messages %}\n  {% if m %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n",
        "user\n",
    ),
    "tojson keeps order and letters": ("{{ {'b': 'ü<', 'a': 1} | tojson }}", '{"b": "ü<", "a": 1}'),
    "tojson keeps half a character as the escape it was": (r"{{ {'a': 'ü\ud83d'} | tojson }}", r'{"a": "ü\ud83d"}'),
    "tojson indents": ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
    "strftime_now": ("{{ strftime_now('%d %b %Y') }}", "17 May 2026"),
    "break": ("{% for m in [1, 2] %}{{ m }}{% break %}{% endfor %}", "1"),
    "generation tag": (
        "{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}",
        "[hi]",
    ),
    "tools are none": ("{% if tools %}t{% else %}n{% endif %}{{ tools is none }}", "nTrue"),
    "undefined tokens are empty": ("{{ unk_token }}x", "x"),
    "namespace": ("{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = 2 %}{% endfor %}{{ n.x }}", "2"),
    "html is not escaped": ("{{ '<b>' }}", "<b>"),
}


@pytest.mark.parametrize("name", CASES)
def test_rendering(name: str) -> None:
    source, expected = CASES[name]
    assert ChatTemplate(source, TOKENS, now=lambda: datetime(2026, 5, 17)).render(USER) == expected


def test_documents_reach_a_template_that_prints_them() -> None:
    template = ChatTemplate("{{ documents }}", TOKENS)
    assert template.render(USER, None, {"documents": ["one"]}) == "['one']"
    assert template.render(USER) == "None"


def test_what_was_thought_reaches_a_template_that_prints_it() -> None:
    source = (
        "{% for m in messages %}{% if m.reasoning_content is string %}({{ m.reasoning_content }}){% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    thought = {"role": "assistant", "content": "42", "reasoning_content": "6 x 7"}
    assert ChatTemplate(source, TOKENS).render(read_messages([*USER, thought])) == "hi(6 x 7)42"


def test_raise_exception_reaches_the_user_with_its_words() -> None:
    with pytest.raises(ApiError, match="roles must alternate") as caught:
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(USER)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "source", ["{{ messages[0].x.y.z }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"]
)
def test_a_template_that_trips_or_tries_to_escape_is_a_400(source: str) -> None:
    text, status = "", 400
    try:
        text = ChatTemplate(source, {}).render(USER)
    except ApiError as error:
        status = error.status
    assert (status, "class" in text) == (400, False)


REFUSES = "{{ raise_exception('not today') }}"
TOOLS_REFUSE = "{% if tools %}" + REFUSES + "{% endif %}hi"


@pytest.mark.parametrize(
    ("plain", "tooled", "warned"),
    [
        ("hi", None, []),
        (REFUSES, None, ["chat"]),
        (TOOLS_REFUSE, None, ["chat with tools"]),
        ("hi", TOOLS_REFUSE, ["chat with tools"]),
        (TOOLS_REFUSE, "{{ tools }}", []),  # never rendered with tools
        (REFUSES, TOOLS_REFUSE, ["chat", "chat with tools"]),
        ("hi", "{% if not tools %}" + REFUSES + "{% endif %}", ["chat with earlier calls and no tools"]),
    ],
)
def test_templates_that_refuse_everybody_are_told_at_the_start(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, plain: str, tooled: str | None, warned: list[str]
) -> None:
    serving(tiny, tmp_path, plain, tooled)
    assert [r.args[0] for r in caplog.records if "not today" in r.getMessage() and isinstance(r.args, tuple)] == warned


def serving(tiny: Path, folder: Path, template: str, tooled: str | None = None) -> Service:
    """The small model, with that template, and one of its own for tools."""
    model = shutil.copytree(tiny, folder / "model")
    (model / "chat_template.jinja").write_text(template)
    if tooled:
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(tooled)
    return Service(parse(["--model", str(model), "--served-name", "m"], {}))


def prompt(service: Service, **fields: object) -> str:
    request = requests.parse("chat", json.dumps({"model": "m", "messages": USER, **fields}).encode())
    (ids,) = asyncio.run(service.prompts(request))
    return str(service.tokenizer.decode(ids))


# As the templates of gpt-oss have it: with a value of its own
EFFORT = (
    "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}{{ reasoning_effort }}"
)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "medium"),
        ({"reasoning_effort": "high"}, "high"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "low"),
    ],
)
def test_how_much_is_to_be_thought_reaches_a_template_that_asks(
    tiny: Path, tmp_path: Path, fields: dict[str, object], told: str
) -> None:
    assert prompt(serving(tiny, tmp_path / "asking", EFFORT), **fields) == told
    if fields:
        with pytest.raises(ApiError) as caught:
            prompt(serving(tiny, tmp_path / "silent", "hi"), **fields)
        assert (caught.value.status, caught.value.param) == (400, "reasoning_effort")


def test_what_a_function_has_beside_the_usual_reaches_a_template_that_prints_it(tiny: Path, tmp_path: Path) -> None:
    """As transformers' get_json_schema writes it, and the templates of Hermes and Qwen3-Coder read it."""
    source = "{% for tool in tools or [] %}{{ (tool.function['return'] or {}).type }}{% endfor %}"
    told = {"name": "f", "return": {"type": "integer"}}
    assert prompt(serving(tiny, tmp_path, source), tools=[{"type": "function", "function": told}]) == "integer"


# As Llama's
ONE_CALL = (
    "{{ tools }}{% for m in messages %}{% if m.tool_calls and m.tool_calls|length != 1 %}"
    "{{ raise_exception('single tool-calls') }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
CALLED = (
    "{% for tool in tools %}{{ tool.function.name }}:{% endfor %}{% for m in messages %}"
    "[{{ m.content }}{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}]{% endfor %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "refund", "arguments": "{}"}}
HISTORY = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "done"},
]
FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "[hi]"),
        ({"tools": [FUNCTION]}, "f:[hi]"),
        ({"tools": [FUNCTION], "tool_choice": "none"}, "[hi]"),
        ({"messages": HISTORY, "tools": [FUNCTION]}, "f:[hi][refund][done]"),
        ({"messages": HISTORY, "tools": [FUNCTION], "tool_choice": "none"}, "[hi][refund][done]"),
        ({"messages": HISTORY}, "[hi][refund][done]"),
    ],
)
def test_earlier_calls_reach_a_model_with_a_template_of_its_own_for_tools(
    tiny: Path, tmp_path: Path, fields: dict[str, object], told: str
) -> None:
    assert prompt(serving(tiny, tmp_path, PLAIN, CALLED), **fields) == told


@pytest.mark.parametrize(
    ("template", "parallel", "count"),
    [
        (CALLED, True, 2),
        (CALLED, False, 1),
        (ONE_CALL, True, 1),
        ("{{ tools }}{% if messages[1] %}" + REFUSES + "{% endif %}", True, 2),  # takes no calls at all
    ],
)
def test_a_conversation_goes_on_after_an_answer_with_calls(
    tiny: Path, tmp_path: Path, template: str, parallel: bool, count: int
) -> None:
    """Llama's template refuses an answer with several."""
    service = serving(tiny, tmp_path, template)
    told = {"model": "m", "messages": USER, "tools": [FUNCTION], "parallel_tool_calls": parallel}
    request = requests.parse("chat", json.dumps(told).encode())
    delta = Delta('[{"name": "f"}, {"name": "f"}]', 9, "stop")
    message: Any = Choice(service, request, Frames("chat", "m"), 0, [1]).whole(delta)["message"]
    calls = message["tool_calls"]
    tools = service.tools_of(request)
    assert tools
    assert (len(calls), tools.parallel) == (count, count == 2)
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in calls]
    if REFUSES not in template:
        assert prompt(service, messages=[*USER, message, *results], tools=[FUNCTION])
