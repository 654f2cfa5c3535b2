"""Guesses of what a text says next, from what it said before.

Speculative decoding without a second model: where the newest tokens stood before, what followed them then is likely to
follow again (prompt lookup decoding, Saxena 2023; "ngram" in vLLM). The model then computes the guessed tokens in one
call and keeps those that it would have chosen itself.
"""

from collections.abc import Sequence

SIZES = (3, 2)  # tokens of an n-gram, the surest first
COST = 0.25  # steps by which a guess makes a call of its own longer, at most (measured, AVX2: one to eight guesses)
SAVED = 4.0  # most steps saved that count for worse times
REST = 16  # tokens without guesses after they did not pay


class Drafts:
    """The guesses for one answer, at most `most` tokens at a time.

    Where a call over guesses rounds otherwise than one without, they may depend on nothing but the answer's own text,
    so that an answer is the same in any company: there `cost` is always the same.
    """

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        self._most = most
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token that followed it last
        self._saved, self._rest = 0.0, 0
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on."""
        tokens = self._tokens
        for size in SIZES:
            if len(tokens) >= size:
                self._after[tuple(tokens[-size:])] = len(tokens)
        tokens.append(token)
        self._rest = max(0, self._rest - 1)

    def guess(self, room: int) -> list[int]:
        """The next tokens, `room` at most; none where nothing repeats or guesses do not pay."""
        if self._rest:
            return []
        ends = (tuple(self._tokens[-size:]) for size in SIZES)
        at = next((self._after[end] for end in ends if end in self._after), None)
        if at is None:
            return []
        text = self._tokens[at:]
        guessed = text[: min(room, self._most)]
        while guessed and len(guessed) < min(room, self._most):  # the text repeats itself right now
            guessed.append(guessed[len(guessed) - len(text)])
        return guessed

    def learn(self, guessed: int, accepted: int, cost: float = COST) -> None:
        """So many tokens were guessed, and so many of them were right. cost: of a guess, in tokens."""
        self._saved = min(self._saved + accepted - guessed * cost, SAVED)
        if self._saved < 0:
            self._saved, self._rest = 0.0, REST
