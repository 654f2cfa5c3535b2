"""Requests, checked field by field. What is not supported is refused with its name, never ignored."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from slmops_server.engines.base import Sampling
from slmops_server.errors import ApiError, bad_request
from slmops_server.fields import flag, integer, is_ids, number
from slmops_server.grammar import Grammar, read_grammar
from slmops_server.messages import Tools, read_messages, read_tools

# Fields of OpenAI's API that change nothing here
HARMLESS = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    ]
)
# Fields that are accepted at the value that means "off" and refused otherwise
OFF: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "web_search_options": (),
    "verbosity": (),
    "prediction": (),
    "audio": (),
}
COMMON = frozenset(
    [
        "model",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "seed",
        "stop",
        "max_tokens",
        "max_completion_tokens",
        "ignore_eos",
        "n",
        "logprobs",
        "logit_bias",
        "min_tokens",
        "stop_token_ids",
        "response_format",
        "structured_outputs",
    ]
)
CHAT = (
    "messages",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "reasoning_effort",
)
FIELDS = {"chat": COMMON.union(CHAT), "completions": COMMON | {"prompt", "echo"}}
TOKEN_ID = re.compile(r"[0-9]{1,10}")  # no vocabulary has more
MAX_STOPS = 16  # OpenAI takes 4; tasks of lm-evaluation-harness have more
MAX_LOGPROBS = 20
MAX_CHOICES = 128
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request: messages, or one or more prompts. max_tokens None is "what the context leaves"."""

    model: str
    messages: list[dict[str, Any]] | None
    prompts: list[str | list[int]]
    tools: Tools | None
    template_fields: dict[str, Any]
    sampling: Sampling
    seeded: bool  # by its client
    n: int
    echo: bool
    stop: tuple[str, ...]
    max_tokens: int | None
    ignore_eos: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    grammar: Grammar | None

    @property
    def speaks_of_tools(self) -> bool:
        """Whether there are tools to call, or calls in its messages: a model's plain template may not print them."""
        return self.tools is not None or any(m["role"] == "tool" or "tool_calls" in m for m in self.messages or [])


def parse(kind: str, body: bytes) -> Request:
    """Kind is "chat" or "completions". Every flaw is an ApiError 400 that names the field."""
    fields = fields_of(body)
    _refuse_unsupported(kind, fields)
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise bad_request("stream_options is not an object.", "stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    if unknown := set(options) - {"include_usage", "continuous_usage_stats", "include_obfuscation"}:
        raise bad_request(f"stream_options.{min(unknown)} is not supported.", "stream_options")
    stream = flag(fields, "stream")
    if options and not stream:
        raise bad_request("stream_options needs stream: true.", "stream_options")
    grammar = read_grammar(fields)
    tools = read_tools(fields) if kind == "chat" else None
    for name in ("ignore_eos", "min_tokens"):
        if fields.get(name) and (grammar or (tools and tools.prescribed)):
            raise bad_request(f"{name} and a prescribed format exclude each other.", name)
    if grammar and tools and grammar.param != "response_format":
        raise bad_request(f"tools and {grammar.param} exclude each other.", grammar.param)
    more = fields.get("chat_template_kwargs", {})
    if not isinstance(more, dict):
        raise bad_request("chat_template_kwargs is not an object.", "chat_template_kwargs")
    own = {"messages", "tools", "add_generation_prompt"} | (fields.keys() & {"reasoning_effort"})
    for name in more.keys() & own:
        raise bad_request(f"chat_template_kwargs.{name} is the request's own.", "chat_template_kwargs")
    if (effort := fields.get("reasoning_effort")) is not None:
        if not isinstance(effort, str):
            raise bad_request("reasoning_effort is not a string.", "reasoning_effort")
        more = {**more, "reasoning_effort": effort}
    return Request(
        model=_model(fields.get("model")),
        messages=read_messages(fields.get("messages")) if kind == "chat" else None,
        prompts=_prompts(fields.get("prompt")) if kind == "completions" else [],
        tools=tools,
        template_fields=more,
        sampling=_sampling(kind, fields),
        seeded="seed" in fields,
        n=integer(fields, "n", 1, 1, MAX_CHOICES),
        echo=flag(fields, "echo"),
        stop=_stop(fields.get("stop", [])),
        max_tokens=_max_tokens(kind, fields),
        ignore_eos=flag(fields, "ignore_eos"),
        stream=stream,
        include_usage=flag(options, "include_usage", shown="stream_options.include_usage"),
        continuous_usage=flag(options, "continuous_usage_stats", shown="stream_options.continuous_usage_stats"),
        grammar=grammar,
    )


def model_name(body: bytes) -> str:
    """The field `model` of any request. ApiError 400."""
    return _model(fields_of(body).get("model"))


def fields_of(body: bytes) -> dict[str, Any]:
    """The object that a body holds, without what is null. ApiError 400."""
    try:
        fields = orjson.loads(body)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise bad_request("The body is not a JSON object.", code="invalid_json")
    return {k: v for k, v in fields.items() if v is not None}


def _refuse_unsupported(kind: str, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in FIELDS[kind] or name in HARMLESS:
            continue
        if name not in OFF:
            raise bad_request(f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
        if not any(type(value) is type(off) and value == off for off in OFF[name]):
            raise bad_request(f"{name} is not supported by this server.", name, "unsupported_parameter")


def _model(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise bad_request("you must provide a model parameter", "model")
    return value


def _sampling(kind: str, fields: Mapping[str, Any]) -> Sampling:
    top_p = number(fields, "top_p", 1.0, 0.0, 1.0)
    return Sampling(
        temperature=number(fields, "temperature", 1.0, 0.0, 2.0),
        top_p=max(top_p, 1e-9),  # 0 keeps the likeliest token only
        top_k=max(0, integer(fields, "top_k", 0, -1, 1 << 30)),  # -1 and 0 both mean off
        min_p=number(fields, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=number(fields, "repetition_penalty", 1.0, 0.01, 100.0),
        frequency_penalty=number(fields, "frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=number(fields, "presence_penalty", 0.0, -2.0, 2.0),
        seed=integer(fields, "seed", secrets.randbits(62), -(1 << 63), (1 << 63) - 1),
        logit_bias=_logit_bias(fields.get("logit_bias", {})),
        stop_ids=_stop_ids(fields.get("stop_token_ids", [])),
        min_tokens=integer(fields, "min_tokens", 0, 0, 1 << 30),
        logprobs=_logprobs(kind, fields),
    )


def _logprobs(kind: str, fields: Mapping[str, Any]) -> int:
    """How many alternatives; -1 without logprobs."""
    if kind == "completions":
        return integer(fields, "logprobs", -1, 0, MAX_LOGPROBS) if "logprobs" in fields else -1
    if not flag(fields, "logprobs"):
        if fields.get("top_logprobs"):
            raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
        return -1
    return integer(fields, "top_logprobs", 0, 0, MAX_LOGPROBS)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise bad_request("logit_bias is not an object.", "logit_bias")
    pairs = []
    for token, bias in value.items():
        if not TOKEN_ID.fullmatch(token) or isinstance(bias, bool) or not isinstance(bias, int | float):
            raise bad_request(f"logit_bias[{token[:20]!r}] is not a number for a token id.", "logit_bias")
        if not -100 <= bias <= 100:
            raise bad_request(f"logit_bias[{token!r}] is {bias}, it must be from -100 to 100.", "logit_bias")
        pairs.append((int(token), float(bias)))
    return tuple(pairs)


def _stop_ids(value: Any) -> tuple[int, ...]:
    if value != [] and not is_ids(value):
        raise bad_request("stop_token_ids is not a list of token ids.", "stop_token_ids")
    return tuple(value)


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise bad_request("stop is neither a string nor a list of strings.", "stop")
    if len(stops) > MAX_STOPS:
        raise bad_request(f"stop has {len(stops)} strings, {MAX_STOPS} are allowed.", "stop")
    if "" in stops:
        raise bad_request("stop holds an empty string.", "stop")
    return tuple(stops)


def _max_tokens(kind: str, fields: Mapping[str, Any]) -> int | None:
    scoring = kind == "completions" and fields.get("echo") is True  # 0: the prompt and nothing more
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in fields]
    given = {integer(fields, name, 0, 0 if scoring else 1, 1 << 30) for name in names}
    if len(given) > 1:  # some clients send both, for servers that know only one of them
        raise bad_request("max_tokens and max_completion_tokens differ; send one of them.", "max_tokens")
    return given.pop() if given else COMPLETION_TOKENS if kind == "completions" else None


def _prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str) or is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(map(is_ids, value))):
        return value
    raise bad_request("prompt is neither a string, nor a list of token ids, nor a list of these.", "prompt")


def unknown_model(name: str, known: tuple[str, ...]) -> ApiError:
    """404 in OpenAI's shape."""
    return ApiError(
        404,
        f"The model {name!r} does not exist; this server has {', '.join(known)}.",
        param="model",
        code="model_not_found",
    )
