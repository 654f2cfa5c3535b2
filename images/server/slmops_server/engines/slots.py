"""A slot scheduler: continuous batching over anything that computes logits for rows of a KV cache.

Each running answer owns a slot (a row of the cache). A step prefills one chunk of one waiting prompt, then advances
every decoding row by a token, so a long prompt never stops the answers that already run.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol, cast

from slmops_server.engines.base import EngineInfo, Job, Scores, Token
from slmops_server.engines.sampler import Logits, Sampler, scores


class Forward(Protocol):
    """A loaded model with `slots` rows of KV cache, each `max_len` tokens long."""

    vocab: int
    width: int  # rows that one decode call may hold: adjacent slots only
    chunk: int  # prompt tokens that one prefill call may hold

    def prefill(self, slot: int, tokens: Sequence[int], past: int) -> Logits:
        """Append tokens to a row that holds `past` tokens; logits of the last one, shape [vocab]."""

    def score(self, slot: int, tokens: Sequence[int], past: int) -> Logits:
        """As prefill, with the logits after every token: shape [tokens, vocab]."""

    def decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """One token for each of the slots first, first+1, ...; lengths before it; logits [rows, vocab]."""

    def release(self, slot: int) -> None:
        """The row is free; its content may be forgotten."""


class _Row:
    """A running answer."""

    __slots__ = ("ends", "job", "last", "length", "made", "prompt_scores", "sampler", "slot")

    def __init__(self, job: Job, slot: int, vocab: int, eos: frozenset[int]) -> None:
        self.job, self.slot = job, slot
        self.ends = (frozenset() if job.ignore_eos else eos) | frozenset(job.sampling.stop_ids)
        self.sampler = Sampler(job.sampling, job.prompt, vocab, self.ends, job.guide)
        self.prompt_scores: list[tuple[int, Scores]] | None = [] if job.score_prompt else None
        self.length = 0  # tokens in the cache
        self.last = -1  # newest token, not yet in the cache
        self.made = 0


class SlotEngine:
    """An Engine over a Forward."""

    def __init__(self, forward: Forward, info: EngineInfo, eos: frozenset[int]) -> None:
        self.info = info
        self._forward, self._eos = forward, eos
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[_Row] = deque()
        self._rows: list[_Row | None] = [None] * info.slots

    @property
    def busy(self) -> bool:
        """See Engine."""
        return bool(self._waiting) or any(self._rows)

    @property
    def running(self) -> int:
        """See Engine."""
        return sum(row is not None for row in self._rows)

    def submit(self, job: Job) -> None:
        """See Engine."""
        self._waiting.append(job)

    def cancel(self, job: int) -> None:
        """See Engine."""
        self._waiting = deque(j for j in self._waiting if j.id != job)
        for row in self._rows:
            if row is not None and row.job.id == job:
                self._free(row)

    def step(self) -> list[Token]:
        """See Engine."""
        self._admit()
        tokens: list[Token] = []
        if self._prefilling:
            self._prefill(self._prefilling[0], tokens)
        for first, rows in self._batches():
            self._decode(first, rows, tokens)
        return tokens

    def _admit(self) -> None:
        for slot, row in enumerate(self._rows):
            if not self._waiting:
                return
            if row is None:
                self._rows[slot] = new = _Row(self._waiting.popleft(), slot, self._forward.vocab, self._eos)
                self._prefilling.append(new)

    def _prefill(self, row: _Row, tokens: list[Token]) -> None:
        part = row.job.prompt[row.length : row.length + self._forward.chunk]
        if row.prompt_scores is None:
            logits = self._forward.prefill(row.slot, part, row.length)
        else:
            logits = self._score(row, part, row.prompt_scores)
        row.length += len(part)
        if row.length == len(row.job.prompt):
            self._prefilling.popleft()
            self._sample(row, logits, tokens)

    def _score(self, row: _Row, part: list[int], told: list[tuple[int, Scores]]) -> Logits:
        """Prefill and note how likely the model thought each next token of the prompt."""
        after = self._forward.score(row.slot, part, row.length)
        for logits, token in zip(after, row.job.prompt[row.length + 1 : row.length + 1 + len(part)], strict=False):
            told.append((token, scores(logits, token, row.job.sampling.logprobs)))
        return cast("Logits", after[-1])

    def _batches(self) -> list[tuple[int, list[_Row]]]:
        """Decoding rows in adjacent slots, at most `width` at a time."""
        batches: list[tuple[int, list[_Row]]] = []
        for slot, row in enumerate(self._rows):
            if row is None or row.last < 0:
                continue
            if batches and slot == batches[-1][0] + len(batches[-1][1]) and len(batches[-1][1]) < self._forward.width:
                batches[-1][1].append(row)
            else:
                batches.append((slot, [row]))
        return batches

    def _decode(self, first: int, rows: list[_Row], tokens: list[Token]) -> None:
        logits = self._forward.decode(first, [r.last for r in rows], [r.length for r in rows])
        for row, row_logits in zip(rows, logits, strict=True):
            row.length += 1
            self._sample(row, row_logits, tokens)

    def _sample(self, row: _Row, logits: Logits, tokens: list[Token]) -> None:
        try:
            token = row.sampler.pick(logits)
        except ValueError:
            tokens.append(Token(row.job.id, -1, "error"))
            self._free(row)
            return
        row.last = token
        row.made += 1
        finish = None
        if token in row.ends:
            finish = "stop"
        elif row.made >= row.job.max_tokens:
            finish = "length"
        tokens.append(Token(row.job.id, token, finish, row.sampler.scores, row.prompt_scores))
        row.prompt_scores = None
        if finish:
            self._free(row)

    def _free(self, row: _Row) -> None:
        self._rows[row.slot] = None
        if row in self._prefilling:
            self._prefilling.remove(row)
        self._forward.release(row.slot)
