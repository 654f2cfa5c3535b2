"""Requests, checked field by field. What is not supported is refused with its name, never ignored."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from slmops_server.engines.base import Sampling
from slmops_server.errors import ApiError, bad_request

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
        "verbosity",
        "reasoning_effort",
        "prediction",
        "parallel_tool_calls",
    ]
)
# Fields that are accepted at the value that means "off" and refused otherwise
OFF: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "web_search_options": (),
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
        "ignore_eos",
    ]
)
FIELDS = {"chat": COMMON | {"messages", "max_completion_tokens"}, "completions": COMMON | {"prompt"}}
ROLES = frozenset({"system", "developer", "user", "assistant"})
MAX_STOPS = 4
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request. Exactly one of messages, text and ids is set; max_tokens None is "what the context leaves"."""

    model: str
    messages: list[dict[str, str]] | None
    text: str | None
    ids: list[int] | None
    sampling: Sampling
    stop: tuple[str, ...]
    max_tokens: int | None
    ignore_eos: bool
    stream: bool
    include_usage: bool


def parse(kind: str, body: bytes) -> Request:
    """Kind is "chat" or "completions". Every flaw is an ApiError 400 that names the field."""
    try:
        fields = orjson.loads(body)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise bad_request("The body is not a JSON object.", code="invalid_json")
    fields = {k: v for k, v in fields.items() if v is not None}
    _refuse_unsupported(kind, fields)
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise bad_request("stream_options is not an object.", "stream_options")
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise bad_request(f"stream_options.{min(unknown)} is not supported.", "stream_options")
    stream = _flag(fields, "stream")
    if options and not stream:
        raise bad_request("stream_options needs stream: true.", "stream_options")
    messages = _messages(fields.get("messages")) if kind == "chat" else None
    text, ids = _prompt(fields.get("prompt")) if kind == "completions" else (None, None)
    return Request(
        model=_model(fields.get("model")),
        messages=messages,
        text=text,
        ids=ids,
        sampling=_sampling(fields),
        stop=_stop(fields.get("stop")),
        max_tokens=_max_tokens(kind, fields),
        ignore_eos=_flag(fields, "ignore_eos"),
        stream=stream,
        include_usage=_flag(options, "include_usage", "stream_options.include_usage"),
    )


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


def _flag(fields: Mapping[str, Any], name: str, shown: str = "") -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise bad_request(f"{shown or name} is not a boolean.", shown or name)
    return value


def _number(fields: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_request(f"{name} is not a number.", name)
    if not low <= value <= high:
        raise bad_request(f"{name} is {value}, it must be from {low:g} to {high:g}.", name)
    return float(value)


def _integer(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_request(f"{name} is not an integer.", name)
    if not low <= value <= high:
        raise bad_request(f"{name} is {value}, it must be from {low} to {high}.", name)
    return value


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    top_p = _number(fields, "top_p", 1.0, 0.0, 1.0)
    return Sampling(
        temperature=_number(fields, "temperature", 1.0, 0.0, 2.0),
        top_p=max(top_p, 1e-9),  # 0 keeps the likeliest token only
        top_k=max(0, _integer(fields, "top_k", 0, -1, 1 << 30)),  # -1 and 0 both mean off
        min_p=_number(fields, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(fields, "repetition_penalty", 1.0, 0.01, 100.0),
        frequency_penalty=_number(fields, "frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=_number(fields, "presence_penalty", 0.0, -2.0, 2.0),
        seed=_integer(fields, "seed", secrets.randbits(62), -(1 << 63), (1 << 63) - 1),
    )


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise bad_request("stop is neither a string nor a list of strings.", "stop")
    if len(stops) > MAX_STOPS:
        raise bad_request(f"stop has {len(stops)} strings, {MAX_STOPS} are allowed.", "stop")
    if "" in stops:
        raise bad_request("stop holds an empty string.", "stop")
    return tuple(stops)


def _max_tokens(kind: str, fields: Mapping[str, Any]) -> int | None:
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise bad_request("max_tokens and max_completion_tokens exclude each other.", "max_tokens")
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    if name not in fields:
        return COMPLETION_TOKENS if kind == "completions" else None
    return _integer(fields, name, 0, 1, 1 << 30)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise bad_request("messages is not a list with at least one message.", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise bad_request(f"{where} is not an object.", where)
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(f"{where}.role is not one of {', '.join(sorted(ROLES))}.", f"{where}.role")
    for name, content in message.items():
        if name in ("role", "content", "name", "refusal", "annotations") or content is None or content == []:
            continue
        raise bad_request(
            f"{where}.{name} is not supported by this server.", f"{where}.{name}", "unsupported_parameter"
        )
    checked = {"role": "system" if role == "developer" else role, "content": _content(message.get("content"), where)}
    if isinstance(message.get("name"), str):
        checked["name"] = message["name"]
    return checked


def _content(content: Any, where: str) -> str:
    where += ".content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} is neither a string nor a list of parts.", where)
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_request(f"{where}[{index}] is not a text part; this model reads text only.", f"{where}[{index}]")
        texts.append(part["text"])
    return "\n".join(texts)


def _prompt(value: Any) -> tuple[str | None, list[int] | None]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and value and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return None, value
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        raise bad_request(
            "prompt holds more than one prompt; send one request for each.", "prompt", "unsupported_parameter"
        )
    raise bad_request("prompt is neither a string nor a list of token ids.", "prompt")


def unknown_model(name: str, known: tuple[str, ...]) -> ApiError:
    """404 in OpenAI's shape."""
    return ApiError(
        404,
        f"The model {name!r} does not exist; this server has {', '.join(known)}.",
        param="model",
        code="model_not_found",
    )
