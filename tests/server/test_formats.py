"""Logprobs, echo, several answers, prescribed formats and tools, through OpenAI's own client."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import openai
import pydantic
import pytest
from server_harness import TINY, Server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slmops_server import model_folder
from slmops_server.engines.choose import EngineOptions
from slmops_server.engines.choose import load as load_engine

Start = Callable[..., Server]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n<tool_call>{% endif %}{% for message in messages %}{{ message['content'] }}"
    "{% for call in message.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"severity": {"enum": ["low", "high"]}, "floor": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["severity", "floor"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tools")
    shutil.copytree(TINY, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    running = Server(folder / "log", "--slots", "4", model=folder / "model")
    yield running
    running.close()


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its tokenizer has one token more than the model, as that of Gemma 3 1B."""
    folder = tmp_path_factory.mktemp("gemma")
    shutil.copytree(TINY, folder / "model")
    file = folder / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    assert tokenizer.add_special_tokens(["<image_soft_token>"]) == 1
    assert tokenizer.token_to_id("<image_soft_token>") == model_folder.read(TINY).vocab_size
    tokenizer.save(str(file))
    running = Server(folder / "log", "--slots", "2", model=folder / "model")
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_loglikelihoods_by_echo_are_those_of_the_model(server: Server) -> None:
    """What lm-evaluation-harness asks of local-completions, several prompts at once, against direct scoring."""
    prompts = [[40, 41, 42, 300, 17, 5], [7, 9, 11]]
    answer = server.complete(prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    engine = load_engine(model_folder.read(TINY), EngineOptions("onnxruntime", 1, 2))
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        logits = np.array(engine._forward.score(0, prompt, 0), np.float64)  # type: ignore[attr-defined]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:-1] == pytest.approx(
            [expected[at, token] for at, token in enumerate(prompt[1:])], abs=1e-4
        )
        assert len(told["tokens"]) == len(told["text_offset"]) == len(prompt) + 1
        for position, logprob, top in zip(expected, told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
            assert max(top.values()) == pytest.approx(position.max(), abs=1e-4)
            assert logprob in top.values()
    assert answer["usage"]["prompt_tokens"] == 9


def test_a_scored_prompt_has_one_more_token_even_if_it_ends_the_answer(server: Server) -> None:
    """The harness takes the last score off, whatever it is."""
    ask = {"prompt": [[40, 41, 42]], "max_tokens": 1, "echo": True, "logprobs": 1}
    plain, ended = (server.complete(**ask, **more).json()["choices"][0] for more in ({}, {"logit_bias": {"2": 100}}))
    assert (ended["finish_reason"], ended["text"]) == ("stop", plain["text"][:3])
    assert ended["logprobs"]["tokens"] == [*plain["logprobs"]["tokens"][:3], "<|im_end|>"]
    assert ended["logprobs"]["token_logprobs"][:3] == plain["logprobs"]["token_logprobs"][:3]
    assert len(ended["logprobs"]["token_logprobs"]) == len(ended["logprobs"]["top_logprobs"]) == 4
    assert "<|im_end|>" in ended["logprobs"]["top_logprobs"][3]
    streamed = server.complete(**ask, logit_bias={"2": 100}, stream=True).text.split("\n\n")
    told = [json.loads(f[6:])["choices"][0]["logprobs"] for f in streamed if f.startswith("data: {")]
    assert [one for part in told if part for one in part["tokens"]] == ended["logprobs"]["tokens"]
    unscored = server.complete(prompt=[40, 41, 42], max_tokens=1, logprobs=1, logit_bias={"2": 100}).json()
    assert unscored["choices"][0]["logprobs"]["tokens"] == []


def test_a_completion_keeps_the_blank_before_its_first_word(start: Start, tmp_path: Path) -> None:
    """SentencePiece's first blank belongs to the tokenizer only where a text begins."""
    shutil.copytree(TINY, tmp_path / "model")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *(f"\u2581w{n}" for n in range(259, 512))]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    server = start("--slots", "2", model=tmp_path / "model")
    ask = {"logit_bias": {"301": 100}, "max_tokens": 3}
    assert server.complete(prompt=[300], **ask).json()["choices"][0]["text"] == " w301 w301 w301"
    echoed = server.complete(prompt=[300], echo=True, **ask).json()["choices"][0]["text"]
    assert echoed == tokenizer.decode([300, 301, 301, 301]) == "w300 w301 w301 w301"
    assert server.chat(**ask).json()["choices"][0]["message"]["content"] == "w301 w301 w301"


def test_a_model_whose_tokenizer_takes_no_formats_is_served_without_them(start: Start, tmp_path: Path) -> None:
    """llguidance reads no decoder of SentencePiece's unigram models, nor those without one."""
    model = shutil.copytree(TINY, tmp_path / "model")
    words = ["<unk>", "<s>", "</s>", "\u2581", *(f"\u2581w{n}" for n in range(4, 512))]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    server = start("--slots", "2", model=model)
    ask = {"logit_bias": {"301": 100}, "max_tokens": 2}
    assert server.complete(prompt="w300", **ask).json()["choices"][0]["text"] == " w301 w301"
    assert server.chat(**ask).json()["choices"][0]["message"]["content"] == "w301 w301"
    for refused, param in (
        (server.complete(structured_outputs={"regex": "a"}), "structured_outputs.regex"),
        (server.chat(response_format={"type": "json_object"}), "response_format"),
        (server.chat(tools=[WEATHER], tool_choice="required"), "tools"),
    ):
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_grammar", param)
        assert "tokenizer" in error["message"]
    assert server.complete(prompt="w300", **ask).status_code == 200
    assert "no formats" in server.log.read_text()


def test_echo_gives_the_prompt_back(server: Server) -> None:
    plain = server.complete().json()["choices"][0]["text"]
    assert server.complete(echo=True).json()["choices"][0]["text"] == "The printer" + plain
    streamed = server.complete(echo=True, stream=True).text.split("\n\n")
    texts = [json.loads(f[6:])["choices"][0]["text"] for f in streamed if f.startswith("data: {")]
    assert "".join(texts) == "The printer" + plain


def test_chat_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)  # type: ignore[call-overload]
    told = whole.choices[0].logprobs.content
    assert len(told) == whole.usage.completion_tokens == 12
    assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == one.logprob <= 0 for one in told)
    assert b"".join(bytes(one.bytes) for one in told).decode(errors="replace") == whole.choices[0].message.content
    stream = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True)  # type: ignore[call-overload]
    parts = [c.choices[0].logprobs.content for c in stream if c.choices[0].logprobs]
    assert [one for part in parts for one in part] == told


def test_several_answers(client: openai.OpenAI, server: Server) -> None:
    ask = {"model": "tiny", "prompt": "The printer", "n": 3, "seed": 5, "max_tokens": 10}
    whole = client.completions.create(**ask)  # type: ignore[call-overload]
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    single = client.completions.create(**{**ask, "n": 1})  # type: ignore[call-overload]
    assert single.choices[0].text == texts[0]
    assert whole.usage.prompt_tokens == single.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in client.completions.create(**ask, stream=True):  # type: ignore[call-overload]
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    refused = server.complete(n=13)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


def test_stop_ids_min_tokens_and_bias(server: Server) -> None:
    told = server.complete(logprobs=0, max_tokens=6).json()["choices"][0]
    pick = server.complete(logit_bias={"300": 100}, max_tokens=3, logprobs=0).json()["choices"][0]["logprobs"]["tokens"]
    assert len(set(pick)) == 1
    stopped = server.complete(logit_bias={"300": 100}, stop_token_ids=[300], max_tokens=6).json()
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == ("", "stop")
    later = server.complete(logit_bias={"300": 100}, stop_token_ids=[300], min_tokens=3, max_tokens=6).json()
    assert (later["usage"]["completion_tokens"], later["choices"][0]["finish_reason"]) == (4, "stop")
    assert told["finish_reason"] == "length"
    assert server.complete(logit_bias={"512": 1}).json()["error"]["param"] == "logit_bias"
    assert server.complete(stop_token_ids=[512]).json()["error"]["param"] == "stop_token_ids"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_json_schema_is_kept(client: openai.OpenAI, temperature: float) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "The printer on floor three"}],
            response_format={"type": "json_schema", "json_schema": {"name": "ticket", "schema": SCHEMA}},
            temperature=temperature,
            seed=seed,
            max_tokens=200,
        )
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


class Ticket(pydantic.BaseModel):
    severity: Literal["low", "high"]
    floor: int = pydantic.Field(ge=0, le=99)


def test_a_parsed_answer_can_be_sent_back_as_it_is(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "The printer on floor three"}]
    first = client.chat.completions.parse(
        model="tiny", messages=messages, response_format=Ticket, temperature=0, max_tokens=200
    )
    answer = first.choices[0].message
    assert isinstance(answer.parsed, Ticket)
    messages += [answer, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=5)
    assert first.usage
    assert second.usage
    assert second.usage.prompt_tokens > first.usage.total_tokens


@pytest.mark.parametrize(
    ("outputs", "good"),
    [
        ({"choice": ["red", 'gre"en']}, lambda text: text in ("red", 'gre"en')),
        ({"regex": "[0-9]{3}-[a-c]"}, lambda text: len(text) == 5 and text[3] == "-" and text[4] in "abc"),
        ({"grammar": 'start: "a" "b"'}, lambda text: text == "ab"),
    ],
)
def test_other_formats_are_kept(server: Server, outputs: dict[str, object], good: Callable[[str], bool]) -> None:
    choice = server.complete(structured_outputs=outputs, max_tokens=50, temperature=1).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert good(choice["text"])


def test_a_json_object_keeps_the_schema_that_stands_beside_it(server: Server) -> None:
    form = {"type": "json_object", "schema": SCHEMA}
    choice = server.chat(response_format=form, temperature=1, seed=7, max_tokens=200).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"uniqueItems": True}, "uniqueItems"),
        ({"not": {"const": []}}, "not"),
        ({"contains": {"const": "a"}}, "contains"),
        ({"items": {"type": "string", "format": "path", "maxLength": 1}}, "format"),
        ({"items": {"oneOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}}, "oneOf"),
    ],
)
def test_a_strict_schema_is_kept_whole_or_refused(server: Server, more: dict[str, object], what: str) -> None:
    schema = {"type": "array", "items": {"enum": ["a"]}, "maxItems": 1, **more}
    form = {"name": "x", "description": "y", "schema": schema}
    for fields, param in (
        ({"response_format": {"type": "json_schema", "json_schema": {**form, "strict": True}}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": schema}}, "response_format"),
        ({"structured_outputs": {"json": schema}}, "structured_outputs.json"),
    ):
        refused = server.chat(**fields)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_grammar", param)
        assert what in error["message"]
        assert "strict" in error["message"]
    for loose in (form, {**form, "strict": False}, {**form, "strict": None}):
        answer = server.chat(response_format={"type": "json_schema", "json_schema": loose}, max_tokens=200).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), list)


def test_a_tokenizer_may_have_a_token_that_the_model_lacks(gemma_like: Server, server: Server) -> None:
    plain, same = (one.complete(logprobs=3).json()["choices"][0] for one in (gemma_like, server))
    assert plain == same
    form = {"type": "json_object", "schema": SCHEMA}
    kept = gemma_like.chat(response_format=form, temperature=1, seed=7, max_tokens=200).json()["choices"][0]
    jsonschema.validate(json.loads(kept["message"]["content"]), SCHEMA)
    assert kept["finish_reason"] == "stop"
    refused = gemma_like.chat("see <image_soft_token>")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert gemma_like.complete().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_grammars_that_cannot_be_used_are_refused(server: Server, stream: bool) -> None:
    for outputs, param in (
        ({"regex": "(a"}, "structured_outputs.regex"),
        ({"grammar": "begin"}, "structured_outputs.grammar"),
        ({"json": {"type": "foo"}}, "structured_outputs.json"),
    ):
        answer = server.complete(structured_outputs=outputs, stream=stream)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_grammar", param)
    assert server.idle


def test_a_forced_tool_is_called_whole_and_streamed(with_tools: Server) -> None:
    with openai.OpenAI(base_url=with_tools.url + "/v1", api_key="none") as client:
        ask = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "How is it outside?"}],
            "tools": [WEATHER],
            "temperature": 0,
            "max_tokens": 300,
            "parallel_tool_calls": False,
        }
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            whole = client.chat.completions.create(**ask, tool_choice=choice).choices[0]  # type: ignore[call-overload]
            assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
            (call,) = whole.message.tool_calls
            assert call.function.name == "weather"
            jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
            chunks = list(client.chat.completions.create(**ask, tool_choice=choice, stream=True))  # type: ignore[call-overload]
            calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
            assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
                (0, "weather", call.function.arguments)
            ]
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
            assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_forced_tool_may_say_what_cannot_be_enforced(with_tools: Server) -> None:
    """As pydantic's schemas of a set and of a path do."""
    fields = {
        "rooms": {"type": "array", "items": {"enum": ["a"]}, "uniqueItems": True, "maxItems": 1},
        "plan": {"type": "string", "format": "path", "maxLength": 1},
    }
    parameters = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    answer = with_tools.chat(tools=[tool], tool_choice="required", max_tokens=200)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_strict_tool_is_kept_whole_or_refused(with_tools: Server, choice: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    array = {"type": "json_object", "schema": parameters}
    with_form = "tools" if choice == "required" else "tools, response_format"
    for fields, param in (
        ({"tools": [tool]}, "tools"),
        ({"tools": [tool], "response_format": {"type": "json_object"}}, with_form),
        ({"tools": [WEATHER], "response_format": array, "tool_choice": "auto"}, "response_format"),
    ):
        refused = with_tools.chat(**{"tool_choice": choice, **fields})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_grammar", param)
        assert "uniqueItems" in error["message"]
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    assert with_tools.chat(tools=[strict], tool_choice=choice, max_tokens=300).status_code == 200


@pytest.mark.parametrize("tool_choice", ["auto", "required", "none"])
def test_tools_go_past_a_format(with_tools: Server, tool_choice: str) -> None:
    """As agents with both ask, every turn."""
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    tokens = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    brace, tag = (tokens.encode(text, add_special_tokens=False).ids[0] for text in ("{", "<"))
    with openai.OpenAI(base_url=with_tools.url + "/v1", api_key="none") as client:
        for begin, calls in ((brace, tool_choice == "required"), (tag, tool_choice != "none")):
            ask = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "The printer"}],
                "tools": [tool],
                "tool_choice": tool_choice,
                "response_format": form,
                "logit_bias": {str(begin): 100},
                "temperature": 0,
                "max_tokens": 300,
            }
            whole = client.chat.completions.create(**ask).choices[0]  # type: ignore[call-overload]
            assert whole.finish_reason == ("tool_calls" if calls else "stop")
            made = [call.function.arguments for call in whole.message.tool_calls or []]
            for arguments in made:
                jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
            if not calls:
                jsonschema.validate(json.loads(whole.message.content or ""), SCHEMA)
            assert (bool(made), whole.message.content is None) == (calls, calls)
            deltas = [c.choices[0].delta for c in client.chat.completions.create(**ask, stream=True)]  # type: ignore[call-overload]
            assert "".join(delta.content or "" for delta in deltas) == (whole.message.content or "")
            streamed = [call for delta in deltas for call in delta.tool_calls or []]
            assert [(call.index, call.function.arguments) for call in streamed] == [*enumerate(made)]


def test_what_a_model_without_tags_begins_as_json_is_a_call_of_its_strict_tools(start: Start, tmp_path: Path) -> None:
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("<tool_call>", ""))
    server = start("--slots", "2", model=model)
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    (brace,) = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode("{", add_special_tokens=False).ids
    (choice,) = server.chat(tools=[tool], logit_bias={brace: 100}, max_tokens=300).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])  # type: ignore[index]
    (choice,) = server.chat(tools=[tool], logit_bias={brace: -100}, max_tokens=5).json()["choices"]
    assert len(choice["message"]["content"]) > 0


def test_a_forced_tool_without_parameters_gets_no_arguments(with_tools: Server) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    choices = with_tools.chat(
        tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=2, n=20, seed=1, max_tokens=300
    ).json()["choices"]
    arguments = [call["function"]["arguments"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert arguments == ["{}"] * 20


@pytest.mark.parametrize("kind", [{}, {"type": ["object", "null"]}])
def test_arguments_of_a_forced_tool_are_an_object_though_its_schema_leaves_that_open(
    with_tools: Server, kind: dict[str, object]
) -> None:
    parameters = {"properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False, **kind}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    choices = with_tools.chat(
        tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=2, n=20, seed=1, max_tokens=300
    ).json()["choices"]
    for choice in choices:
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert set(json.loads(call["function"]["arguments"])) == {"a"}


def test_a_call_with_half_a_character_can_be_sent_back(with_tools: Server) -> None:
    """A model may make one, and a client has to show it in the next turn."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": r'{"days": "\ud83d"}'}}
    answer = with_tools.http.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "assistant", "tool_calls": [call]}], "max_tokens": 1},
    )
    assert answer.status_code == 200


def test_a_template_for_tools_alone_is_taken_for_them(start: Start, tmp_path: Path, server: Server) -> None:
    """As the hub has it for Hermes and Command R: the other one knows no tools."""
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    both = start("--slots", "2", model=model)
    assert both.chat().json()["choices"] == server.chat().json()["choices"]
    told = both.chat(tools=[WEATHER], tool_choice="required", max_tokens=300)
    assert told.status_code == 200, told.text
    (choice,) = told.json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert told.json()["usage"]["prompt_tokens"] > both.chat().json()["usage"]["prompt_tokens"]


def test_tools_need_a_template_that_knows_them(server: Server, with_tools: Server) -> None:
    refused = server.chat(tools=[WEATHER])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
    assert server.chat(tools=[WEATHER], tool_choice="none").status_code == 200
    answer = with_tools.chat(tools=[WEATHER]).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"]
    assert math.isfinite(answer["usage"]["prompt_tokens"])
