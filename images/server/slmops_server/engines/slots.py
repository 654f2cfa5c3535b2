"""A slot scheduler: continuous batching over anything that computes logits for rows of a KV cache.

Each running answer owns a slot (a row of the cache). A step prefills one chunk of one waiting prompt and advances every
decoding row by a token, in one call where the Forward mixes them, else in one after the other. The chunk is as long as
the running answers can bear, so that they keep moving.
Rows of different adapters cannot share a call: each adapter's rows are advanced by calls of their own.

A row keeps its cache after its answer has ended; a later prompt that begins alike continues from there. The answer's
part is taken over too, as the next turn of a conversation has it, where a token of an answer is computed as one of a
prompt is: an answer must not depend on what ran before it.
"""

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from slmops_server.engines.adapters import BASE, Adapter, Shelf
from slmops_server.engines.base import Drafted, EngineInfo, EngineRefusedError, Job, Scores, Token
from slmops_server.engines.drafts import COST, Drafts
from slmops_server.engines.forward import IDLE, Adjacent, Mixing
from slmops_server.engines.sampler import Logits, Sampler, scores
from slmops_server.engines.schedule import WEIGHT, Pace, common, cover

PATIENCE = 2.0  # a chunk may take this many times as long as a step of the running answers, for each prompt that waits
RECOMPUTED = 2  # tokens of a prompt that are never taken from the cache: the last one's logits, and a lone one differs


class _Kept(NamedTuple):
    """What may be taken over of a row's cache: tokens, and the adapter that they were computed with."""

    tokens: list[int]
    adapter: "weakref.ref[Adapter]"  # none that has lost its name and its jobs is kept alive


EMPTY = _Kept([], weakref.ref(BASE))


class _Row:
    """A running answer."""

    __slots__ = (
        "cached",
        "drafts",
        "ends",
        "job",
        "last",
        "length",
        "made",
        "prompt_scores",
        "sampler",
        "slot",
        "started",
    )

    def __init__(self, job: Job, slot: int, cached: int, vocab: int, eos: frozenset[int], guesses: int) -> None:
        self.job, self.slot = job, slot
        self.ends = (frozenset() if job.ignore_eos else eos) | frozenset(job.sampling.stop_ids)
        self.sampler = Sampler(job.sampling, job.prompt, vocab, self.ends, job.guide)
        self.prompt_scores: list[tuple[int, Scores]] | None = [] if job.score_prompt else None
        self.drafts = Drafts(job.prompt, guesses) if guesses else None
        self.length = cached  # tokens in the cache
        self.cached = cached  # of these, tokens that were there already
        self.started = False
        self.last = -1  # newest token, not yet in the cache
        self.made = 0


class SlotEngine:
    """An Engine over a Forward."""

    def __init__(
        self,
        forward: Adjacent | Mixing,
        info: EngineInfo,
        eos: frozenset[int],
        guesses: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        adapters: Shelf | None = None,
    ) -> None:
        """guesses: tokens that an answer may be ahead of itself where its text repeats; needs rows that are kept.

        EngineRefusedError when rows are left over that no call computes exactly.
        """
        self.info = info
        self.drafted = Drafted()
        self._guesses = guesses
        self.adapters = adapters or Shelf({}, 0)
        self._forward, self._eos, self._clock = forward, eos, clock
        self._mixing = forward if isinstance(forward, Mixing) else None
        self._adjacent = None if isinstance(forward, Mixing) else forward
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[_Row] = deque()
        self._rows: list[_Row | None] = [None] * info.slots
        self._kept = [EMPTY] * forward.rows
        self._used = [0] * info.slots  # when a row's answer ended, in answers
        self._ended = 0
        self._pace = Pace(forward.chunk, forward.prefill_seconds)
        self._score_pace = Pace(forward.scored, forward.prefill_seconds)  # scores take longer, as it learns
        self._step_seconds = 0.0  # moving average of a step's decode calls
        self._slower = 1.0  # moving average of how many times as long they take as measured at start: longer rows do
        if self._adjacent:
            for adapter in (BASE,) if adapters is None else (BASE, Adapter({})):
                self._check_cover(self._seconds(adapter))

    def _check_cover(self, seconds: Sequence[float]) -> None:
        """What advances all rows advances any of them. Pairs are always exact: an odd number of rows is refused."""
        if cover([True] * self._forward.rows, seconds)[0] == math.inf:
            exact = " or ".join(str(rows) for rows, taken in enumerate(seconds, 1) if taken < math.inf)
            raise EngineRefusedError(
                f"an answer would depend on others: on this CPU {exact} rows at a time are rounded as a pair is, which "
                f"do not add up to {self._forward.rows} slots. Set --slots to an even number"
            )

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
        while self._waiting and not all(self._rows):
            self._admit(self._waiting.popleft())
        tokens: list[Token] = []
        if self._prefilling:
            row = self._prefilling[0]
            if self._mixing and (riders := self._riders(row, self._mixing.mixes)):
                self._mix(self._mixing, row, riders, tokens)
                return tokens
            self._prefill(row, tokens)
        guessed = self._guess(tokens) if self._adjacent and self._guesses else ()
        active = [row is not None and row.last >= 0 and row not in guessed for row in self._rows]
        if any(active):
            begin, expected = self._clock(), 0.0
            for adapter, wanted in self._grouped(active).items():
                if self._mixing:
                    expected += self._advance(self._mixing, wanted, adapter, tokens)
                if self._adjacent:
                    seconds, calls = cover(wanted, self._seconds(adapter))
                    expected += seconds
                    for first, count in calls:
                        self._decode(self._adjacent, first, wanted[first : first + count], adapter, tokens)
            took = self._clock() - begin
            self._step_seconds += (took - self._step_seconds) * (WEIGHT if self._step_seconds else 1.0)
            self._slower += (took / expected - self._slower) * WEIGHT
        return tokens

    def _grouped(self, active: list[bool]) -> dict[Adapter, list[bool]]:
        """Which of all rows are active under each adapter."""
        groups: dict[Adapter, list[bool]] = {}
        for slot, row in enumerate(self._rows):
            if row is not None and active[slot]:
                groups.setdefault(row.job.adapter, [False] * self._forward.rows)[slot] = True
        return groups

    def _seconds(self, adapter: Adapter) -> Sequence[float]:
        """As measured for the base. That a lone row is exact was measured without the products of adapters."""
        seconds = self._forward.decode_seconds
        return seconds if adapter is BASE or len(seconds) == 1 else [math.inf, *seconds[1:]]

    def _admit(self, job: Job) -> None:
        """Give a job a free slot: the one that holds most of its prompt, else where it costs least, else the oldest."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        held = {slot: self._match(slot, job) for slot in free}
        slot = max(free, key=held.__getitem__)
        if held[slot] == 0 or 2 * held[slot] < len(self._kept[slot].tokens):  # rather copy than lose a long tail
            slot = min(free, key=lambda s: (self._cost_with(s, job.adapter), self._used[s]))
        self._kept[slot] = _Kept(job.prompt[: held[slot]], weakref.ref(job.adapter))
        self._rows[slot] = row = _Row(job, slot, held[slot], self._forward.vocab, self._eos, self._guesses)
        self._prefilling.append(row)

    def _cost_with(self, slot: int, adapter: Adapter) -> float:
        """Seconds of the calls for the rows of that adapter if that slot ran too, as far as they depend on the slot."""
        if self._mixing:
            return 0.0
        rows = self._grouped([True] * len(self._rows)).get(adapter, [False] * self._forward.rows)
        wanted = [active or number == slot for number, active in enumerate(rows)]
        return round(cover(wanted, self._seconds(adapter))[0], 9)

    def _match(self, slot: int, job: Job) -> int:
        """Tokens at the beginning of the prompt that the row holds and that may be taken over."""
        kept = self._kept[slot]
        if not self._forward.keeps or job.score_prompt or kept.adapter() is not job.adapter:
            return 0
        count = min(common(kept.tokens, job.prompt), len(job.prompt) - RECOMPUTED)
        return count if count >= RECOMPUTED else 0

    def _prefill(self, row: _Row, tokens: list[Token]) -> None:
        """One chunk of a prompt."""
        self._start(row)
        prompt, left = row.job.prompt, len(row.job.prompt) - row.length
        running = any(other is not None and other.last >= 0 for other in self._rows)
        pace = self._pace if row.prompt_scores is None else self._score_pace
        size = pace.chunk(left, self._bearable() if running else math.inf)
        part = prompt[row.length : row.length + size]
        begin = self._clock()
        if row.prompt_scores is None:
            logits = self._forward.prefill(row.slot, part, row.length, row.job.adapter)
        else:
            logits = self._score(row, part, row.prompt_scores)
        pace.note(size, self._clock() - begin)
        self._prefilled(row, size, logits, tokens)

    def _mix(self, forward: Mixing, row: _Row, riders: list[_Row], tokens: list[Token]) -> None:
        """One chunk of a prompt, and the next tokens of each running answer, in one call."""
        self._start(row)
        prompt = row.job.prompt
        step = self._slower * self._forward.decode_seconds[len(riders) - 1]
        ahead = self._ahead(riders)
        beside = sum(map(len, ahead))
        size = self._pace.chunk(len(prompt) - row.length, (PATIENCE + 1) * step * len(self._prefilling), beside)
        begin = self._clock()
        logits = forward.compute(
            [one.slot for one in (row, *riders)],
            [prompt[row.length : row.length + size], *ahead],
            [one.length for one in (row, *riders)],
            range(size - 1, size + beside),
            row.job.adapter,
        )
        self._pace.note(size, self._clock() - begin, beside)
        self._prefilled(row, size, logits[0], tokens)
        self._take(riders, ahead, logits[1:], tokens)

    def _riders(self, row: _Row, most: int) -> list[_Row]:
        """The running answers, where one call may advance all of them beside a chunk of this row's prompt."""
        running = [other for other in self._rows if other is not None and other.last >= 0]
        fit = len(running) <= most and row.prompt_scores is None
        return running if fit and all(other.job.adapter is row.job.adapter for other in running) else []

    def _start(self, row: _Row) -> None:
        if not row.started:
            row.started = True
            self._take_over(row)

    def _prefilled(self, row: _Row, size: int, logits: Logits, tokens: list[Token]) -> None:
        """The row holds `size` more tokens of its prompt; `logits` are those of the last one."""
        prompt = row.job.prompt
        row.length += size
        if self._forward.keeps:
            self._kept[row.slot] = _Kept(prompt[: row.length], weakref.ref(row.job.adapter))
        if row.length == len(prompt):
            self._prefilling.popleft()
            self._sample(row, logits, tokens)

    def _bearable(self) -> float:
        """Seconds that a chunk may take: more where more prompts wait.

        Short chunks would starve them: the kernels are slow at few tokens and at few rows, and the whole would take
        longer than one answer after the other.
        """
        return PATIENCE * self._step_seconds * len(self._prefilling)

    def _take_over(self, row: _Row) -> None:
        """Copy what another row holds of this prompt, running or not."""
        source = max(range(len(self._rows)), key=lambda slot: self._match(slot, row.job))
        count = self._match(source, row.job)
        if count > row.length:
            self._forward.copy(source, row.slot, count)
            row.length = row.cached = count

    def _score(self, row: _Row, part: list[int], told: list[tuple[int, Scores]]) -> Logits:
        """Prefill and note how likely the model thought each next token of the prompt."""
        after = self._forward.score(row.slot, part, row.length, row.job.adapter)
        for logits, token in zip(after, row.job.prompt[row.length + 1 : row.length + 1 + len(part)], strict=False):
            told.append((token, scores(logits, token, row.job.sampling.logprobs)))
        return cast("Logits", after[-1])

    def _guess(self, tokens: list[Token]) -> list[_Row]:
        """Advance the rows whose text seems to repeat, each by as many tokens as the model chooses as guessed."""
        moved = []
        for row in self._rows:
            if row is None or row.last < 0 or row.drafts is None:
                continue
            guessed = row.drafts.guess(row.job.max_tokens - row.made - 1)
            if guessed:
                self._verify(row, guessed, tokens)
                moved.append(row)
        return moved

    def _verify(self, row: _Row, guessed: list[int], tokens: list[Token]) -> None:
        ahead = [row.last, *guessed]
        after = self._forward.score(row.slot, ahead, row.length, row.job.adapter)
        self._take([row], [ahead], after, tokens)

    def _ahead(self, rows: list[_Row]) -> list[list[int]]:
        """For each row its newest token and what is guessed to follow, as many as a call's scores have room for."""
        found, room = [], self._forward.scored - len(rows)
        for row in rows:
            most = min(room, row.job.max_tokens - row.made - 1)
            guessed = row.drafts.guess(most) if row.drafts is not None and most > 0 else []
            room -= len(guessed)
            found.append([row.last, *guessed])
        return found

    def _take(self, rows: list[_Row], ahead: list[list[int]], logits: Logits, tokens: list[Token]) -> None:
        """The answers go on by a token, and by those that were guessed as the model would have chosen them."""
        at = 0
        for row, computed in zip(rows, ahead, strict=True):
            made = row.made
            for token, guess, after in zip(computed, [*computed[1:], -1], logits[at:], strict=False):
                self._moved(row, token)
                self._sample(row, after, tokens)
                if row.last != guess or self._rows[row.slot] is not row:
                    break
            at += len(computed)
            guessed, accepted = len(computed) - 1, max(0, row.made - made - 1)
            if row.drafts is not None and guessed:
                row.drafts.learn(guessed, accepted, self._guess_cost(len(rows)))
                self.drafted.calls += 1
                self.drafted.tokens += guessed
                self.drafted.accepted += accepted

    def _guess_cost(self, rows: int) -> float:
        """What a guess adds to the call for so many rows, in tokens that the call would have made without it."""
        step = self._forward.decode_seconds[rows - 1]
        size, chunk = max(self._forward.prefill_seconds.items(), default=(0, 0.0))
        if not self._mixing or size <= rows:
            return COST
        more = max(0.0, chunk - step) / (size - rows)  # seconds for a token more
        return min(1.0, rows * more / step)

    def _advance(self, forward: Mixing, wanted: list[bool], adapter: Adapter, tokens: list[Token]) -> float:
        """Calls for these rows, wherever they are; seconds that they were expected to take."""
        rows = [row for row, moves in zip(self._rows, wanted, strict=False) if row is not None and moves]
        expected = 0.0
        for at in range(0, len(rows), forward.mixes):
            part = rows[at : at + forward.mixes]
            ahead = self._ahead(part)
            slots, lengths = [row.slot for row in part], [row.length for row in part]
            logits = forward.compute(slots, ahead, lengths, range(sum(map(len, ahead))), adapter)
            expected += self._forward.decode_seconds[len(part) - 1]
            self._take(part, ahead, logits, tokens)
        return expected

    def _decode(self, forward: Adjacent, first: int, wanted: list[bool], adapter: Adapter, tokens: list[Token]) -> None:
        """One call for these rows. Those that are not wanted are idle in it: free, moved already, of other adapters."""
        running = [self._rows[slot] if moves else None for slot, moves in enumerate(wanted, first)]
        lengths = [IDLE if row is None else row.length for row in running]
        newest = [0 if row is None else row.last for row in running]
        logits = forward.decode(first, newest, lengths, adapter)
        for row, row_logits in zip(running, logits, strict=True):
            if row is not None:
                self._moved(row, row.last)
                self._sample(row, row_logits, tokens)

    def _moved(self, row: _Row, token: int) -> None:
        """A token of the answer is in the cache."""
        row.length += 1
        if self._forward.uniform:
            self._kept[row.slot].tokens.append(token)

    def _sample(self, row: _Row, logits: Logits, tokens: list[Token]) -> None:
        cached = 0 if row.made else row.cached
        try:
            token = row.sampler.pick(logits)
        except ValueError:
            tokens.append(Token(row.job.id, -1, "error", cached=cached))
            self._free(row)
            self._kept[row.slot] = EMPTY
            return
        row.last = token
        row.made += 1
        if row.drafts is not None:
            row.drafts.add(token)
        finish = None
        if token in row.ends:
            finish = "stop"
        elif row.made >= row.job.max_tokens:
            finish = "length"
        tokens.append(Token(row.job.id, token, finish, row.sampler.scores, row.prompt_scores, cached))
        row.prompt_scores = None
        if finish:
            self._free(row)

    def _free(self, row: _Row) -> None:
        self._rows[row.slot] = None
        if row in self._prefilling:
            self._prefilling.remove(row)
        self._ended += 1
        self._used[row.slot] = self._ended
        self._forward.release(row.slot)
