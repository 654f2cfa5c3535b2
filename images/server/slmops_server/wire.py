"""Bytes on the wire: OpenAI's JSON answers and SSE frames. Frames are glued, not built: a microsecond each."""

import secrets
import time

import orjson

DONE = b"data: [DONE]\n\n"


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
    return b"data: " + body + b"\n\n"


class Frames:
    """The answer to one request. kind is "chat" or "completions"."""

    def __init__(self, kind: str, model: str, include_usage: bool = False) -> None:
        self.kind, self._model = kind, model
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._object = "chat.completion" if kind == "chat" else "text_completion"
        chunk = "chat.completion.chunk" if kind == "chat" else "text_completion"
        self._head = b"data: " + orjson.dumps(self._base(chunk))[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._include_usage = include_usage

    def _base(self, name: str) -> dict[str, object]:
        return {"id": self.id, "object": name, "created": self._created, "model": self._model}

    def role(self) -> bytes:
        """The first frame of a chat stream; nothing for completions."""
        if self.kind != "chat":
            return b""
        return (
            self._head + b',"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}]' + self._tail
        )

    def text(self, text: str) -> bytes:
        """Some characters of the answer."""
        if self.kind == "chat":
            body = b',"choices":[{"index":0,"delta":{"content":' + orjson.dumps(text) + b"}"
        else:
            body = b',"choices":[{"index":0,"text":' + orjson.dumps(text)
        return self._head + body + b',"logprobs":null,"finish_reason":null}]' + self._tail

    def end(self, finish: str, prompt: int, completion: int, cached: int) -> bytes:
        """The finish reason, the usage where it was asked for, and the end mark."""
        body = b',"choices":[{"index":0,' + (b'"delta":{}' if self.kind == "chat" else b'"text":""')
        frame = self._head + body + b',"logprobs":null,"finish_reason":"' + finish.encode() + b'"}]' + self._tail
        if self._include_usage:
            frame += self._head + b',"choices":[],"usage":' + orjson.dumps(usage(prompt, completion, cached)) + b"}\n\n"
        return frame + DONE

    def whole(self, text: str, finish: str, prompt: int, completion: int, cached: int) -> bytes:
        """The answer as one JSON object."""
        choice: dict[str, object] = {"index": 0}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": finish}
        return orjson.dumps(
            self._base(self._object) | {"choices": [choice], "usage": usage(prompt, completion, cached)}
        )
