"""Grammars as masks over the vocabulary, by llguidance: one Guide for one answer."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from slmops_server.grammar import BLANKS


class BadGrammarError(Exception):
    """The grammar cannot be used; the message is for the user."""


class MatcherGuide:
    """A Guide over llguidance's matcher."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab
        self._bits = np.zeros(-(-vocab // 32), np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """See Guide. At the grammar's end only an end token is allowed."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"the grammar failed: {self._matcher.get_error()}")
        return np.unpackbits(self._bits.view(np.uint8), count=self._vocab, bitorder="little").view(np.bool_)

    def take(self, token: int) -> None:
        """See Guide."""
        self._matcher.consume_token(token)


class Guides:
    """Compiles grammars for one tokenizer."""

    def __init__(self, tokenizer: Path, vocab: int, eos: Iterable[int]) -> None:
        """tokenizer: the path of a tokenizer.json; eos: the tokens that end an answer."""
        self._vocab = vocab
        self._tokenizer = LLTokenizer(str(tokenizer), n_vocab=vocab, eos_token=sorted(eos))

    def new(self, kind: str, text: str) -> MatcherGuide:
        """Kind as in Grammar. May take long for a large grammar; the GIL is free meanwhile. BadGrammarError."""
        match kind:
            case "json":
                # lenient: what cannot be enforced (a format, say) is a hint to the model, as it is at OpenAI
                made = LLMatcher.grammar_from_json_schema(
                    text, defaults={"whitespace_pattern": BLANKS["whitespace_pattern"], "lenient": True}
                )
            case "regex":
                made = LLMatcher.grammar_from_regex(text)
            case _:
                made = LLMatcher.grammar_from_lark(text)
        matcher = LLMatcher(self._tokenizer, made, log_level=0)
        if matcher.is_error():
            raise BadGrammarError(matcher.get_error().strip().splitlines()[0])
        return MatcherGuide(matcher, self._vocab)

    def warm(self) -> None:
        """Compile once and mask once, so that the first user does not wait for it."""
        self.new("json", json.dumps({"type": "object"})).allowed()
