"""The next token from a row of logits: numpy, exact, reproducible by seed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slmops_server.engines.base import Guide, Sampling, Scores

Logits = NDArray[np.float32]
COLD = 1e-5  # temperatures below are greedy: nothing else is left of them in float32
BLOCK = 256  # weights are summed in blocks of that many: one block is searched, not the vocabulary
LEAST = -9999.0  # what stands for a logprob of minus infinity, which JSON does not know


class Sampler:
    """State of one answer: its random stream and the tokens already seen. Independent of other answers.

    `ends` are the tokens that end the answer. `scores` belongs to the token picked last.
    """

    def __init__(
        self,
        how: Sampling,
        prompt: Sequence[int],
        vocab: int,
        ends: frozenset[int] = frozenset(),
        guide: Guide | None = None,
    ) -> None:
        self._how, self._guide = how, guide
        self._greedy = how.temperature < COLD or how.top_k == 1
        self._random = None if self._greedy else np.random.Generator(np.random.PCG64(how.seed & (2**64 - 1)))
        self._weights = np.zeros(0 if self._greedy else -(-vocab // BLOCK) * BLOCK, np.float32)
        self._seen: NDArray[np.bool_] | None = None
        self._counts: NDArray[np.float32] | None = None
        if how.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab, np.bool_)
            self._seen[np.asarray(prompt, np.int64)] = True
        if how.frequency_penalty or how.presence_penalty:
            self._counts = np.zeros(vocab, np.float32)
        self._biased = np.array([token for token, _ in how.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in how.logit_bias], np.float32)
        self._ends = np.array(sorted(ends), np.int64)
        self._made = 0
        self.scores: Scores | None = None

    def pick(self, logits: Logits) -> int:
        """Choose a token from logits of shape [vocab]; the row may be changed. ValueError if there is none."""
        before = logits.copy() if self._how.logprobs >= 0 else None
        self._change(logits)
        token = int(logits.argmax()) if self._greedy else self._draw(logits)
        value = logits[token]
        if value != value:  # argmax returns the first NaN
            raise ValueError("the model computed NaN")
        if value == -np.inf:
            raise ValueError("no token is allowed")
        self._made += 1
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self._guide is not None:
            self._guide.take(token)
        if before is not None:
            self.scores = scores(before, token, self._how.logprobs)
        return token

    def _change(self, logits: Logits) -> None:
        """Penalties, bias and what is forbidden."""
        how = self._how
        if self._seen is not None:
            seen = logits[self._seen]
            logits[self._seen] = np.where(seen < 0, seen * how.repetition_penalty, seen / how.repetition_penalty)
        if self._counts is not None:
            logits -= how.frequency_penalty * self._counts + how.presence_penalty * (self._counts > 0)
        if self._biased.size:
            np.add.at(logits, self._biased, self._bias)
        if self._made < how.min_tokens and self._ends.size:
            logits[self._ends] = -np.inf
        if self._guide is not None:
            logits[~self._guide.allowed()] = -np.inf

    def _draw(self, logits: Logits) -> int:
        """temperature, then top_k, top_p, min_p, in the order that transformers applies them."""
        how = self._how
        assert self._random is not None
        weights = self._weights[: logits.size]
        top = logits.max()
        if not np.isfinite(top):  # NaN, or nothing is allowed: pick tells
            return int(logits.argmax())
        np.subtract(logits, top, out=weights)
        np.multiply(weights, np.float32(1 / how.temperature), out=weights)
        np.exp(weights, out=weights)
        if 0 < how.top_k < weights.size:
            keep_largest(weights, how.top_k)
        if how.top_p < 1.0:
            _nucleus(weights, how.top_p)
        if how.min_p > 0.0:
            weights[weights < how.min_p] = 0.0  # the largest weight is 1
        blocks = np.add.reduce(self._weights.reshape(-1, BLOCK), axis=1).cumsum(dtype=np.float64)
        at = self._random.random() * blocks[-1]
        block = min(int(np.searchsorted(blocks, at, side="right")), blocks.size - 1)
        inside = self._weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
        at -= blocks[block] - inside[-1]
        token: int = block * BLOCK + int(np.searchsorted(inside, at, side="right"))
        if token < weights.size and weights[token] > 0:
            return token
        possible: list[int] = np.flatnonzero(weights).tolist()  # the last bits of rounding: the nearest one
        return min(possible, key=lambda one: abs(one - token))


def keep_largest(weights: Logits, count: int) -> None:
    """All but the largest `count` weights become 0; of equals the first ones stay."""
    least = np.partition(weights, weights.size - count)[weights.size - count]
    _cut(weights, least, count - int(np.count_nonzero(weights > least)))


def _cut(weights: Logits, least: np.float32, equals: int) -> None:
    """What is smaller than `least` becomes 0; of what is equal to it, all but the first `equals`."""
    same = np.flatnonzero(weights == least)
    weights[weights < least] = 0.0
    weights[same[equals:]] = 0.0


def _nucleus(weights: Logits, share: float) -> None:
    """All but the fewest largest weights that hold `share` of the sum become 0; of equals the first ones stay."""
    total = float(np.add.reduce(weights))
    # all weights below this bound together hold less than 1 - share: none of them is in the nucleus
    candidates = weights[weights >= (1 - share) * total / weights.size]
    candidates.sort()
    reached = np.cumsum(candidates[::-1], dtype=np.float64)
    last = min(int(np.searchsorted(reached, share * total)), candidates.size - 1)
    least = candidates[candidates.size - 1 - last]
    _cut(weights, least, last + 1 - int(np.count_nonzero(candidates > least)))


def scores(logits: Logits, token: int, alternatives: int) -> Scores:
    """How likely `token` was, and the likeliest tokens, from untouched logits of shape [vocab]."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    best: list[int] = []
    if alternatives > 0:
        count = min(alternatives, row.size)
        best = np.argpartition(row, row.size - count)[row.size - count :].tolist()
        best.sort(key=lambda one: (-row[one], one))
    return Scores(max(float(row[token]), LEAST), [(one, max(float(row[one]), LEAST)) for one in best])
