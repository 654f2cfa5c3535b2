"""Bytes on the wire: OpenAI's JSON answers and SSE frames. Frames are glued, not built: a microsecond each."""

import codecs
import secrets
import time
from typing import Any

import orjson

from slmops_server.tools import Call

DONE = b"data: [DONE]\n\n"
# Line ends in Unicode's eyes, not in SSE's: clients in Python that split the stream by str.splitlines cut a frame there
LINE_ENDS = {one.encode(): b"\\u%04x" % ord(one) for one in "\x85\u2028\u2029"}


def usage(prompt: int, completion: int, cached: int) -> dict[str, object]:
    """Token counts of one answer; `cached` of the prompt's did not have to be computed."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_frame(body: bytes) -> bytes:
    """A failure after the stream began; nothing follows it."""
    return b"data: " + _one_line(body) + b"\n\n"


def _one_line(json: bytes) -> bytes:
    """The same JSON without a character that anybody takes for the end of a line."""
    if not json.isascii():
        for raw, escape in LINE_ENDS.items():
            json = json.replace(raw, escape)
    return json


class Frames:
    """The answer to one request. kind is "chat" or "completions"."""

    def __init__(self, kind: str, model: str, include_usage: bool = False, continuous_usage: bool = False) -> None:
        self.kind, self._model = kind, model
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._object = "chat.completion" if kind == "chat" else "text_completion"
        chunk = "chat.completion.chunk" if kind == "chat" else "text_completion"
        self._head = b"data: " + _one_line(orjson.dumps(self._base(chunk))[:-1])
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._include_usage, self._continuous_usage = include_usage, continuous_usage

    def count(self, prompt: int, completion: int) -> None:
        """Tokens of a choice so far, for its next frames where these are to tell them (vLLM's continuous_usage_stats).

        What was cached is known at the end only.
        """
        if self._continuous_usage:
            told = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
            self._tail = b',"usage":' + orjson.dumps(told) + b"}\n\n"

    def _base(self, name: str) -> dict[str, object]:
        return {"id": self.id, "object": name, "created": self._created, "model": self._model}

    def role(self, choice: int = 0) -> bytes:
        """The first frame of a choice of a chat stream; nothing for completions."""
        if self.kind != "chat":
            return b""
        return self._chunk(choice, b'"delta":{"role":"assistant","content":""}')

    def text(self, text: str, choice: int = 0, logprobs: object = None) -> bytes:
        """Some characters of the answer."""
        content = orjson.dumps(text)
        return self._chunk(
            choice, b'"delta":{"content":' + content + b"}" if self.kind == "chat" else b'"text":' + content, logprobs
        )

    def call(self, call: Call, number: int, choice: int = 0) -> bytes:
        """A whole tool call, the number-th of its choice."""
        return self._chunk(choice, b'"delta":{"tool_calls":' + orjson.dumps([{"index": number, **_call(call)}]) + b"}")

    def finish(self, reason: str, choice: int = 0) -> bytes:
        """The last frame of a choice."""
        return self._chunk(
            choice, b'"delta":{}' if self.kind == "chat" else b'"text":""', None, b'"' + reason.encode() + b'"'
        )

    def end(self, prompt: int, completion: int, cached: int) -> bytes:
        """The usage where it was asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        return (
            self._head + b',"choices":[],"usage":' + orjson.dumps(usage(prompt, completion, cached)) + b"}\n\n" + DONE
        )

    def _chunk(self, choice: int, body: bytes, logprobs: object = None, reason: bytes = b"null") -> bytes:
        told = b"null" if logprobs is None else _one_line(orjson.dumps(logprobs))
        head = self._head + b',"choices":[{"index":%d,' % choice
        return head + _one_line(body) + b',"logprobs":' + told + b',"finish_reason":' + reason + b"}]" + self._tail

    def choice(self, number: int, text: str, calls: list[Call], logprobs: object, finish: str) -> dict[str, object]:
        """One choice of a whole answer."""
        made: dict[str, object] = {"index": number}
        if self.kind == "chat":
            message: dict[str, object] = {
                "role": "assistant",
                "content": text or (None if calls else ""),
                "refusal": None,
            }
            if calls:
                message["tool_calls"] = [_call(call) for call in calls]
            made["message"] = message
        else:
            made["text"] = text
        return made | {"logprobs": logprobs, "finish_reason": finish}

    def whole(self, choices: list[dict[str, object]], prompt: int, completion: int, cached: int) -> bytes:
        """The answer as one JSON object."""
        return orjson.dumps(self._base(self._object) | {"choices": choices, "usage": usage(prompt, completion, cached)})


def _call(call: Call) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(scores: list[Any]) -> dict[str, object]:
    """From the worker's [token, logprob, top] lists."""

    def one(token: str, logprob: float) -> dict[str, object]:
        piece = token.encode("latin-1")
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}

    told = [{**one(t, p), "top_logprobs": [one(*other) for other in top]} for t, p, top in scores]
    return {"content": told, "refusal": None}


class TextLogprobs:
    """The completions form; offsets go on from call to call."""

    def __init__(self) -> None:
        self._at = 0
        # A character may be of several tokens: it counts with the last of them.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, scores: list[Any], first: str | None = None, alternatives: int = 0) -> dict[str, object]:
        """`first`: a token before all others, which nothing can have predicted."""
        names, logprobs, tops, offsets = [], [], [], []
        if first is not None:
            scores = [[first, None, None], *scores]
        for token, logprob, top in scores:
            name = _name(token)
            names.append(name)
            logprobs.append(logprob)
            # the token itself is always among them: clients look there whether it was the likeliest
            best = None if top is None or not alternatives else {_name(t): p for t, p in top} | {name: logprob}
            tops.append(best)
            offsets.append(self._at)
            self._at += len(self._decoder.decode(token.encode("latin-1")))
        return {
            "tokens": names,
            "token_logprobs": logprobs,
            "top_logprobs": tops if alternatives else None,
            "text_offset": offsets,
        }


def _name(token: str) -> str:
    """The token's text; OpenAI's spelling of bytes that are none."""
    piece = token.encode("latin-1")
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
