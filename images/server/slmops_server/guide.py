"""Grammars as masks over the vocabulary, by llguidance: one Guide for one answer."""

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from slmops_server.grammar import JSON_OPTIONS


class BadGrammarError(Exception):
    """The grammar cannot be used; the message is for the user."""


log = logging.getLogger(__name__)
UNKEPT = re.compile(
    r"Unimplemented keys|Unknown format|oneOf constraints are not|look-around|lookarounds not supported yet; Word"
    r"|backreferences are not"
)
REGEX = re.compile(r"regex parse error:|lookarounds not supported")
CACHED = 64  # grammars
CACHED_TEXT = 1 << 20  # characters of them all


class MatcherGuide:
    """A Guide over llguidance's matcher. `problem`: why it gave up, if it did."""

    def __init__(self, matcher: LLMatcher, known: int, vocab: int) -> None:
        """known: tokens that the matcher knows, of which the model has the first `vocab`."""
        self.problem = ""
        self._matcher, self._known, self._vocab = matcher, known, vocab
        self._bits = np.zeros(-(-known // 32), np.int32)

    def copy(self) -> "MatcherGuide":
        """One for another answer, at the same place."""
        return MatcherGuide(self._matcher.deep_copy(), self._known, self._vocab)

    def allowed(self) -> NDArray[np.bool_]:
        """See Guide. At the grammar's end only an end token is allowed."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            self.problem = _reason(self._matcher.get_error())
            raise ValueError(f"the grammar failed: {self.problem}")
        return np.unpackbits(self._bits.view(np.uint8), count=self._vocab, bitorder="little").view(np.bool_)

    def take(self, token: int) -> None:
        """See Guide."""
        self._matcher.consume_token(token)


class Guides:
    """Compiles grammars for one tokenizer, from any thread, and keeps the newest of them."""

    def __init__(self, tokenizer: Path, vocab: int, eos: Iterable[int]) -> None:
        """tokenizer: the path of a tokenizer.json; eos: the tokens that end an answer."""
        self._vocab = vocab
        self._tokenizer = _read(tokenizer, vocab, sorted(eos))
        self._made: OrderedDict[tuple[str, str], MatcherGuide] = OrderedDict()
        self._size = 0  # characters
        self._lock = threading.Lock()

    def known(self, kind: str, text: str) -> MatcherGuide | None:
        """A guide for a grammar that was compiled before; takes microseconds."""
        with self._lock:
            guide = self._made.get((kind, text))
            if guide is None:
                return None
            self._made.move_to_end((kind, text))
            return guide.copy()

    def new(self, kind: str, text: str) -> MatcherGuide:
        """Kind as in Grammar. May take seconds for a large grammar; the GIL is free meanwhile. BadGrammarError."""
        if self._tokenizer is None:
            raise BadGrammarError("the model's tokenizer is of a kind for which no format can be prescribed")
        # llguidance itself limits the work: its default limits on a grammar's size, its states and each step
        try:
            matcher = LLMatcher(self._tokenizer, _internal_form(kind, text), log_level=0)
        except ValueError as error:  # JSON nested too deeply, say
            raise BadGrammarError(_reason(str(error))) from None
        if matcher.is_error():
            raise BadGrammarError(_reason(matcher.get_error(), kind == "json"))
        try:
            # the first mask is the dearest, and the first that may fail
            guide = MatcherGuide(matcher, self._tokenizer.vocab_size, self._vocab)
            guide.allowed()
        except ValueError as error:
            raise BadGrammarError(str(error)) from None
        self._keep(kind, text, guide)
        return guide.copy()

    def _keep(self, kind: str, text: str, guide: MatcherGuide) -> None:
        with self._lock:
            if (kind, text) in self._made:
                return
            self._made[kind, text] = guide
            self._size += len(text)
            while len(self._made) > CACHED or self._size > CACHED_TEXT:
                (_, oldest), _ = self._made.popitem(last=False)
                self._size -= len(oldest)

    def warm(self) -> None:
        """Compile once and mask once, so that the first user does not wait for it."""
        if self._tokenizer is not None:
            self.new("json", json.dumps({"type": "object"})).allowed()


def _read(path: Path, vocab: int, eos: list[int]) -> LLTokenizer | None:
    """The library reads most tokenizers; None of one without byte level or byte fallback."""
    try:
        return LLTokenizer(str(path), n_vocab=vocab, eos_token=eos)
    except ValueError:  # the tokenizer has tokens that the model lacks (Gemma 3 has one): room for all of them
        try:
            return LLTokenizer(str(path), eos_token=eos)
        except ValueError as error:
            log.warning(
                "The tokenizer takes no formats, so requests with one are refused problem=%s", _reason(str(error))
            )
            return None


def _internal_form(kind: str, text: str) -> str:
    match kind:
        case "json":
            return LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case _:
            return LLMatcher.grammar_from_lark(text)


def _reason(text: str, schema: bool = False) -> str:
    """In a line; the library's has its first line, and of a regular expression the last. schema: it is of a schema."""
    line = (text.strip() or "no reason given").splitlines()[0].partition(". Enable ")[0]  # an option that no client has
    if line.endswith("regex parse error:") and (found := re.search(r"^error: (.*)", text, re.MULTILINE)):
        line = f"{line} {found[1]}"
    if not schema and "failed to compile JSON schema" not in line:
        return line
    line = REGEX.sub(r"pattern: \g<0>", line, count=1)
    if UNKEPT.search(line):
        return f"{line}. This cannot be enforced; a json_schema or function that is not strict may have it."
    return line
