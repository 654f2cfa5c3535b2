"""The next token from a row of logits: numpy, exact, reproducible by seed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slmops_server.engines.base import Sampling

Logits = NDArray[np.float32]


class Sampler:
    """State of one answer: its random stream and the tokens already seen. Independent of other answers."""

    def __init__(self, how: Sampling, prompt: Sequence[int], vocab: int) -> None:
        self._how = how
        self._greedy = how.temperature == 0.0 or how.top_k == 1
        self._random = None if self._greedy else np.random.Generator(np.random.PCG64(how.seed & (2**64 - 1)))
        self._seen: NDArray[np.bool_] | None = None
        self._counts: NDArray[np.float32] | None = None
        if how.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab, np.bool_)
            self._seen[np.asarray(prompt, np.int64)] = True
        if how.frequency_penalty or how.presence_penalty:
            self._counts = np.zeros(vocab, np.float32)

    def pick(self, logits: Logits) -> int:
        """Choose a token from logits of shape [vocab]; the row may be changed. ValueError if it holds NaN."""
        if self._seen is not None or self._counts is not None:
            self._penalise(logits)
        token = int(logits.argmax()) if self._greedy else self._draw(logits)
        if logits[token] != logits[token]:  # argmax returns the first NaN
            raise ValueError("the model computed NaN")
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _penalise(self, logits: Logits) -> None:
        how = self._how
        if self._seen is not None:
            seen = logits[self._seen]
            logits[self._seen] = np.where(seen < 0, seen * how.repetition_penalty, seen / how.repetition_penalty)
        if self._counts is not None:
            logits -= how.frequency_penalty * self._counts + how.presence_penalty * (self._counts > 0)

    def _draw(self, logits: Logits) -> int:
        """temperature, then top_k, top_p, min_p, in the order that transformers applies them."""
        how = self._how
        assert self._random is not None
        ids: NDArray[np.int64] | None = None
        row = logits.astype(np.float64)
        if 0 < how.top_k < row.size:
            ids = np.argpartition(row, -how.top_k)[-how.top_k :]
            row = row[ids]
        top = row.max()
        if top != top:
            return int(logits.argmax())
        weights = np.exp((row - top) / how.temperature)
        if how.top_p < 1.0:
            order = np.argsort(-weights, kind="stable")
            total = np.cumsum(weights[order])
            order = order[: int(np.searchsorted(total, how.top_p * total[-1])) + 1]
            ids = order if ids is None else ids[order]
            weights = weights[order]
        if how.min_p > 0.0:
            weights = np.where(weights >= how.min_p * weights.max(), weights, 0.0)
        total = np.cumsum(weights)
        at = min(int(np.searchsorted(total, self._random.random() * total[-1], side="right")), weights.size - 1)
        return at if ids is None else int(ids[at])
