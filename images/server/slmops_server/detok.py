"""From token ids to text, piece by piece: whole characters only, and stop strings found across token borders."""

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer, decoders

# Tags of tool calls. They are text even where a tokenizer calls them special: calls are found by them
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CONTEXT = 8  # tokens before an answer that may decide on how its first one is written


class Detokenizer(Protocol):
    """Text of one answer as it grows."""

    def feed(self, token: int) -> str:
        """The characters that this token completes; a character cut by the token border waits."""


def _byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others are moved to U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(moved)}}


class _Bytes:
    """Tokens are byte strings. Unicode's replacement character appears only for bytes that are no text at all."""

    def __init__(self, table: Sequence[bytes], strip_first_space: bool) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip = strip_first_space

    def feed(self, token: int) -> str:
        text = self._decode(self._table[token]) if 0 <= token < len(self._table) else ""
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _Stream:
    """Any other decoder, through the tokenizers library."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(after[-CONTEXT:], skip_special_tokens=True)

    def feed(self, token: int) -> str:
        if (name := self._tokenizer.id_to_token(token)) in (OPEN, CLOSE):
            return name
        return self._stream.step(self._tokenizer, token) or ""


class DetokenizerFactory:
    """Makes one Detokenizer per answer; the table of byte strings is built once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._table: list[bytes] | None = None
        described = str(tokenizer.decoder)
        self._byte_level = "ByteLevel" in described
        self._fallback = "ByteFallback" in described
        self._strip = "Strip(" in described
        if self._byte_level or self._fallback:
            self._table = self._build()

    def _build(self) -> list[bytes]:
        added = self._tokenizer.get_added_tokens_decoder()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        alphabet = _byte_alphabet()
        table = [b""] * (max(vocab.values(), default=-1) + 1)
        for text, token in vocab.items():
            if token in added and added[token].special:
                table[token] = text.encode() if text in (OPEN, CLOSE) else b""
            elif self._byte_level:
                known = [None if token in added else alphabet.get(c) for c in text]
                table[token] = text.encode() if None in known else bytes(b for b in known if b is not None)
            elif match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text):
                table[token] = bytes([int(match[1], 16)])
            else:
                table[token] = text.replace("\u2581", " ").encode()
        return table

    def piece(self, token: int) -> bytes:
        """What one token stands for by itself, special tokens by their names."""
        if self._table is not None and 0 <= token < len(self._table) and self._table[token]:
            return self._table[token]
        return (self._tokenizer.id_to_token(token) or "").encode()

    def new(self, after: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for one answer; `after`: the tokens whose text it continues, if it does."""
        if self._table is None:
            return _Stream(self._tokenizer, after)
        return _Bytes(self._table, strip_first_space=self._fallback and self._strip and not after)


class StopScanner:
    """Holds back what might become a stop string, so that no part of one is ever sent."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str, looking: bool = True) -> tuple[str, bool]:
        """(text that is safe to send, whether a stop string was met). After True nothing more may be fed.

        A stop string counts where it ends: not if that is in a text that was fed without looking.
        """
        if not self._stops:
            return text, False
        old, held = len(self._held), self._held + text
        found = [held.find(stop, max(0, old + 1 - len(stop))) for stop in self._stops] if looking else []
        cut = min((at for at in found if at >= 0), default=-1)
        if cut >= 0:
            self._held = ""
            return held[:cut], True
        keep = max(overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What is still held when the answer ends for another reason."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
