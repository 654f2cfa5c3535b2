"""Tool calls in the text of an answer, found while it grows."""

import json
import re
import secrets
import string
from collections.abc import Collection
from typing import Any, NamedTuple

from slmops_server.detok import CLOSE, OPEN, overlap
from slmops_server.template import json_text

# Templates of Mistral's models refuse a conversation with ids of any other form
ID_LETTERS, ID_LENGTH = string.ascii_letters + string.digits, 9


class Call(NamedTuple):
    """`arguments` is a JSON object in a string."""

    id: str
    name: str
    arguments: str


class ToolParser:
    """Splits an answer into text for the user and calls.

    tagged: calls stand between <tool_call> and </tool_call> (Hermes, Qwen). Otherwise an answer that is nothing but
    JSON {"name": ..., "arguments" or "parameters": ...}, or a list of these, is a call (Llama, Phi). What looks like a
    call and is none stays text, so that nothing is lost; but calls beyond `most` are left out.
    """

    def __init__(self, tagged: bool, names: Collection[str], most: int | None = None) -> None:
        self._tagged, self._names, self._most = tagged, names, most
        self._inside = False  # between tags
        self._plain = False  # nothing more can be a call
        self._held = ""
        self._searched = 0  # characters of what is held, up to the end of a close tag that stands in a call's string
        self._quoted = self._again = False  # of these: whether they end in a string, hold an open tag
        self.called = 0

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """(text for the user, calls that are complete)."""
        if self._plain:
            return text, []
        self._held += text
        return self._feed_tagged() if self._tagged else self._feed_bare()

    def end(self) -> tuple[str, list[Call]]:
        """The same for what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self._tagged and not self._inside:
            return self._trim(held), []
        if self._inside:
            return self._within(held) or (OPEN + held, [])
        calls = self._read(held)
        return (held, []) if calls is None else ("", calls)

    def _feed_tagged(self) -> tuple[str, list[Call]]:
        shown, calls = "", list[Call]()
        while True:
            if self._inside and self._held.lstrip()[:1] not in ("", "{", "["):  # a tag that the text only speaks of
                self._inside, shown = False, shown + OPEN
            tag = CLOSE if self._inside else OPEN
            at = self._held.find(tag, self._searched)
            if at < 0:
                break
            behind = at + len(tag)
            if self._inside:
                piece = self._held[self._searched : at]
                self._quoted ^= _changes_quotes(piece)
                self._again |= OPEN in piece
                before = self._held[:at]
                # no JSON ends in a string: not read again and again where a model repeats its tags
                found = None if self._quoted and not self._again else self._within(before)
                if found is None and self._quoted:
                    self._searched = behind
                    continue
                text, more = found or (OPEN + before + CLOSE, [])
                shown, calls = shown + text, calls + more
            else:
                shown += self._trim(self._held[:at])
            self._held, self._searched = self._held[behind:], 0
            self._quoted = self._again = False
            self._inside = not self._inside
        if not self._inside:
            keep = overlap(self._held, OPEN)
            shown += self._trim(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        return shown, calls

    def _feed_bare(self) -> tuple[str, list[Call]]:
        if self._held.lstrip()[:1] in ("", "{", "["):
            return "", []
        held, self._held, self._plain = self._held, "", True
        return held, []

    def _trim(self, text: str) -> str:
        """Blanks around calls are the template's, not the answer's."""
        return "" if self.called and not text.strip() else text

    def _within(self, text: str) -> tuple[str, list[Call]] | None:
        """What stood behind an open tag: a call, or text with one behind its last open tag; None when text only."""
        if (calls := self._read(text)) is not None:
            return "", calls
        before, tag, after = text.rpartition(OPEN)
        if tag and (calls := self._read(after)) is not None:
            return OPEN + before, calls
        return None

    def _read(self, text: str) -> list[Call] | None:
        """The calls that the text is and that may be made; None when it is no call."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        calls = [self._call(one) for one in (value if isinstance(value, list) else [value])]
        good = [call for call in calls if call is not None]
        if not good or len(good) < len(calls):
            return None
        if self._most is not None:
            good = good[: self._most - self.called]
        self.called += len(good)
        return good

    def _call(self, value: Any) -> Call | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        try:
            text = json_text(arguments, allow_nan=False)
        except (ValueError, RecursionError):  # NaN and Infinity, which only Python takes for JSON; read, but just so
            return None
        return Call("".join(secrets.choice(ID_LETTERS) for _ in range(ID_LENGTH)), name, text)


def _changes_quotes(text: str) -> bool:
    """Whether behind this part of JSON a string is open that was not before it, or the other way round."""
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 1
