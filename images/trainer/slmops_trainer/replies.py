"""What a teacher's response says, in the words of the many endpoints that there are. Pure."""

import json
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

EXCERPT = 160  # characters of a bad response in messages
CUT_OFF = ("length", "content_filter")  # finish reasons of answers that did not come to their end
NO_ROOM = "no room for an answer"  # what is said of one that was all thoughts
# Those of answers during which the endpoint broke down: DeepSeek; OpenRouter and vLLM; vLLM; SGLang.
BROKEN_OFF = ("insufficient_system_resource", "error", "abort", "aborted")
_OURS = rb"(max_tokens|temperature|top_p|seed)\b"
# OpenAI's words: "Unsupported parameter: 'max_tokens' is ..", "Unsupported value: 'temperature' does not .."
_UNSUPPORTED = re.compile(rb"unsupported (?:parameter|value): \W{0,2}" + _OURS, re.IGNORECASE)
# LiteLLM's: "anthropic does not support parameters: ['seed', 'top_p'], for model=..", formerly {'seed': 1}
_UNSUPPORTED_LIST = re.compile(rb"does not support parameters: ?[\[{]([^\]}]*)", re.IGNORECASE)
_TOO_LARGE = re.compile(rb"request too large", re.IGNORECASE)  # OpenAI says 429 of one that no waiting makes small


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `finish` is the endpoint's finish_reason ("length": cut off); `tokens` counts the answer's tokens."""

    text: str
    finish: str
    tokens: int


class Rejected(Exception):  # noqa: N818  # a verdict, not an error
    """A question got no usable answer. The text says what came instead.

    final        asking again would bring the same
    tokens       that the teacher wrote for it nevertheless
    unsupported  the parameters that the teacher does not take, if that was all that was wrong
    """

    def __init__(
        self, what: str, *, final: bool = False, tokens: int = 0, unsupported: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(what)
        self.final = final
        self.tokens = tokens
        self.unsupported = unsupported


@dataclass(frozen=True, slots=True)
class Trouble:
    """Worth another try. `hint`: seconds that the endpoint asks for; `own`: may be this question's fault alone."""

    what: str
    hint: float = 0.0
    own: bool = False


def load(raw: bytes) -> Any:
    """The body's JSON; None if it is none."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def status(code: int, body: Any) -> int:
    """The HTTP status that is meant: gateways (OpenRouter) say 200 before they know, and the rest in the body."""
    error = body.get("error") if code == 200 and isinstance(body, dict) and not body.get("choices") else None
    said = str(error.get("code")) if isinstance(error, dict) else ""
    return int(said) if re.fullmatch("[45][0-9][0-9]", said) else code


def too_large(raw: bytes) -> bool:
    """Whether a 429 is of this request alone, and for good."""
    return _TOO_LARGE.search(raw) is not None


def unsupported(raw: bytes) -> frozenset[str]:
    """Our parameters that a 400 says are not taken."""
    one, several = _UNSUPPORTED.search(raw), _UNSUPPORTED_LIST.search(raw)
    found = [one[1]] if one else re.findall(rb"\b" + _OURS, several[1]) if several else []
    return frozenset(name.decode() for name in found)


def read(body: Any, excerpt: str) -> Reply | Rejected | Trouble:
    """The answer in the body of a 200. `excerpt`: the body's beginning, for messages."""
    if body is None:
        return Rejected(f"no JSON: {excerpt}")
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return Rejected(f"no choices[0].message.content: {excerpt}")
    finish = str(choice.get("finish_reason") or "")
    if finish.lower() in BROKEN_OFF:
        return Trouble(f"an answer that broke off ({finish})", own=True)
    usage = body.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = counted if isinstance(counted, int) and counted > 0 else 0
    if not isinstance(text, str) or not text.strip():
        if finish == "length":  # a model that reasons aside has used up its tokens
            return Rejected(f"{NO_ROOM}: raise generation.maxTokens", final=True, tokens=tokens)
        return Rejected(f"an empty answer: {excerpt}", tokens=tokens)
    if any("\ud800" <= char <= "\udfff" for char in text):
        return Rejected("half a surrogate pair, which is no text", tokens=tokens)
    # A server that counts nothing must not make the token budget endless: four characters are about a token.
    return Reply(text, finish, tokens or (len(text) + 3) // 4)


def retry_after(value: str) -> float:
    """Seconds that the header asks us to wait: a number or an HTTP date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
