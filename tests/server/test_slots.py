"""The slot engine over a forward of known times: what waiting prompts and running answers do to each other."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from slmops_server.engines.adapters import BASE, Adapter, Shelf
from slmops_server.engines.base import EngineInfo, EngineRefusedError, Job, Sampling
from slmops_server.engines.forward import IDLE
from slmops_server.engines.sampler import Logits
from slmops_server.engines.slots import SlotEngine


class Timed:
    """The times of a 0.43 B int4 model on two cores, in virtual seconds: short chunks are dear, rows share a step."""

    vocab, rows, chunk, scored, keeps, uniform = 8, 8, 256, 64, False, False
    decode_seconds: Sequence[float] = (math.inf, 0.020, 0.028, 0.034, 0.040, 0.046, 0.052, 0.057)
    prefill_seconds = {4: 0.033, 32: 0.190}  # noqa: RUF012 - a test's table, read only

    def __init__(self) -> None:
        self.now = 0.0

    def prefill(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter) -> Logits:
        self.now += 0.013 + 0.005 * len(tokens)
        return np.zeros(self.vocab, np.float32)

    score = prefill

    def decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int], adapter: Adapter) -> Logits:
        self.now += self.decode_seconds[len(tokens) - 1]
        return np.zeros((len(tokens), self.vocab), np.float32)

    def copy(self, source: int, target: int, count: int) -> None:
        """Rows are not kept."""

    def release(self, slot: int) -> None:
        """Rows are not kept."""


class Mixing(Timed):
    """Rows that ride on a prompt's chunk for a tenth of their own step."""

    mixes = 4
    decode_seconds = (0.020, *Timed.decode_seconds[1:])
    extra = 0.0  # seconds more for each call, of rows that have grown

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[tuple[int, int]] = []

    def compute(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        at: Sequence[int],
        adapter: Adapter,
    ) -> Logits:
        answers = riders(tokens, at)
        self.now += self.extra
        if len(answers) < len(tokens):
            chunk, rows = len(tokens[0]), len(answers)
            self.mixed.append((chunk, rows))
            self.now += 0.013 + 0.005 * chunk + self.decode_seconds[max(rows, 2) - 1] / 10
        else:
            self.now += self.decode_seconds[sum(map(len, tokens)) - 1]
        return np.zeros((len(at), self.vocab), np.float32)


def riders(tokens: Sequence[Sequence[int]], at: Sequence[int]) -> Sequence[Sequence[int]]:
    """The tokens of the answers in a call: of a prompt's chunk, which then comes first, only the last one is scored."""
    return tokens[1:] if len(at) < sum(map(len, tokens)) else tokens


def engine(made: type[Timed] = Timed) -> tuple[Timed, SlotEngine]:
    forward = made()
    return forward, SlotEngine(forward, EngineInfo("timed", 8, 1024, 2, {}), frozenset(), clock=lambda: forward.now)


def job(number: int, prompt: int, tokens: int) -> Job:
    return Job(number, [1] * prompt, tokens, Sampling(temperature=0.0), ignore_eos=True)


def gaps(forward: Timed, slots: SlotEngine, answers: set[int]) -> list[float]:
    """Times between the tokens of these answers, until nothing runs."""
    last: dict[int, float] = {}
    seen = []
    while slots.busy:
        for token in slots.step():
            if token.job in last and token.job in answers:
                seen.append(forward.now - last[token.job])
            last[token.job] = forward.now
    return sorted(seen)


@pytest.mark.parametrize("running", [1, 2, 4])
def test_a_long_prompt_holds_up_a_running_answer_for_three_steps_at_most(running: int) -> None:
    forward, slots = engine()
    for number in range(running):
        slots.submit(job(number, 8, 300))
    for _ in range(2 * running):
        slots.step()
    slots.submit(job(99, 512, 4))
    step = forward.decode_seconds[max(running, 2) - 1]
    assert gaps(forward, slots, set(range(running)))[-1] <= 3.1 * step


class Scoring(Timed):
    """A prompt takes longer where each of its tokens is scored."""

    def score(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter) -> Logits:
        self.now += 0.013 + 0.008 * len(tokens)
        return np.zeros((len(tokens), self.vocab), np.float32)


def test_a_prompt_that_is_scored_holds_up_running_answers_no_longer_than_others() -> None:
    forward, slots = engine(Scoring)
    for number in range(4):
        slots.submit(job(number, 8, 300))
    for _ in range(8):
        slots.step()
    slots.submit(Job(99, [1] * 500, 1, Sampling(temperature=0.0, logprobs=0), ignore_eos=True, score_prompt=True))
    *rest, first = gaps(forward, slots, {0})
    assert first <= 3.5 * forward.decode_seconds[3]  # before it is known how long they take
    assert rest[-1] <= 3.1 * forward.decode_seconds[3]


@pytest.mark.parametrize("running", [1, 2, 4, 5])
def test_running_answers_ride_on_the_chunks_of_a_prompt(running: int) -> None:
    """All of them or, where they are too many for such a call, none; a gap is no longer than without."""
    forward, slots = engine(Mixing)
    assert isinstance(forward, Mixing)
    for number in range(running):
        slots.submit(job(number, 8, 300))
    while any(row is None or row.last < 0 for row in slots._rows[:running]):
        slots.step()
    forward.mixed.clear()
    slots.submit(job(99, 512, 4))
    step = sum(forward.decode_seconds[rows - 1] for rows in (min(running, 4), running - 4) if rows > 0)
    assert gaps(forward, slots, set(range(running)))[-1] <= 3.1 * step
    assert sum(chunk for chunk, _ in forward.mixed) == (512 if running <= 4 else 0)
    assert {riders for _, riders in forward.mixed} == ({running} if running <= 4 else set())


def test_chunks_are_as_long_as_the_running_answers_bear_by_now() -> None:
    """Steps take longer where the rows have grown, and chunks must not shrink to nothing beside them, nor stay so."""
    forward, slots = engine(Mixing)
    assert isinstance(forward, Mixing)
    slots.submit(job(1, 8, 1000))

    def chunks(extra: float) -> list[int]:
        forward.extra = extra
        for _ in range(40):
            slots.step()
        forward.mixed.clear()
        slots.submit(job(99, 512, 1))
        while sum(chunk for chunk, _ in forward.mixed) < 512:
            slots.step()
        return [chunk for chunk, _ in forward.mixed]

    fresh, grown = chunks(0.0), chunks(0.1)
    assert len(grown) < len(fresh)
    chunks(0.0)  # the first one learns
    assert len(chunks(0.0)) <= len(fresh) + 1


def test_eight_streams_are_faster_than_one_after_the_other() -> None:
    """Prompts that wait are not starved by those that run: in this load prefill is two thirds of the work."""
    jobs = [job(number, 40 + 43 * (number % 11), 32 + 9 * (number % 10)) for number in range(40)]
    forward, slots = engine()
    waiting = list(jobs)
    for _ in range(8):
        slots.submit(waiting.pop(0))
    while slots.busy:
        for token in slots.step():
            if token.finish and waiting:
                slots.submit(waiting.pop(0))
    together = forward.now
    forward, slots = engine()
    for one in jobs:
        slots.submit(one)
        gaps(forward, slots, set())
    assert together < 0.9 * forward.now


@pytest.mark.parametrize(
    ("rows", "seconds", "plain", "with_adapters"),
    [
        (3, (math.inf, 0.02, math.inf), False, False),
        (3, (0.02, 0.02, math.inf), True, False),  # an adapter's lone rows always get company
        (3, (math.inf, 0.02, 0.03), True, True),
        (4, (math.inf, 0.02, math.inf, math.inf), True, True),
        (5, (math.inf, 0.02, 0.03, math.inf, math.inf), True, True),
        (4, (1.0,), True, True),
    ],
)
def test_rows_that_no_calls_add_up_to_are_refused_at_load(
    rows: int, seconds: tuple[float, ...], plain: bool, with_adapters: bool
) -> None:
    """Else an answer in the last row would wait for ever, and the engine spin."""
    forward = Timed()
    forward.rows, forward.decode_seconds = rows, seconds
    for adapters, served in ((None, plain), (Shelf({}, 0), with_adapters)):
        info = EngineInfo("timed", rows, 1024, 2, {})
        if not served:
            with pytest.raises(EngineRefusedError, match=rf"2 rows at a time .* {rows} slots. Set --slots to an even"):
                SlotEngine(forward, info, frozenset(), adapters=adapters)
            continue
        slots = SlotEngine(forward, info, frozenset(), adapters=adapters)
        for number in range(rows):
            adapter = Adapter({}) if adapters else BASE
            slots.submit(Job(number, [1] * 4, 9, Sampling(temperature=0.0), ignore_eos=True, adapter=adapter))
        steps = 0
        while slots.busy and steps < 100:
            slots.step()
            steps += 1
        assert not slots.busy


class Noting(Timed):
    """Notes which rows were moved, by calls over guesses and by decode calls."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []
        self.likely = np.array([4, 4, *[0] * 6], np.float32)  # two tokens: guesses are right now and then

    def score(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter) -> Logits:
        self.moved.append(slot)
        return self.likely[None].repeat(len(tokens), 0)

    def decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int], adapter: Adapter) -> Logits:
        self.moved += [slot for slot, length in enumerate(lengths, first) if length != IDLE]
        return self.likely[None].repeat(len(tokens), 0)


def test_a_row_that_was_moved_by_guesses_is_idle_in_the_calls_of_its_neighbours() -> None:
    """Else an answer would be computed by other calls in company than alone, and be rounded differently."""
    forward = Noting()
    slots = SlotEngine(forward, EngineInfo("noting", 8, 1024, 2, {}), frozenset(), guesses=3)
    for number in range(8):
        sampling = Sampling(temperature=1.0, seed=number)
        slots.submit(Job(number, [1, 2] * 4, 200, sampling, ignore_eos=True))
    while slots.busy:
        forward.moved.clear()
        slots.step()
        assert len(forward.moved) == len(set(forward.moved))
    assert slots.drafted.accepted > 50


class Together(Mixing):
    """Notes the tokens of each row in each call."""

    mixes = 8

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[int]] = []
        self.likely = np.array([4, 4, *[0] * 6], np.float32)  # two tokens: guesses are right now and then

    def compute(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        at: Sequence[int],
        adapter: Adapter,
    ) -> Logits:
        self.calls.append([len(row) for row in riders(tokens, at)])
        return self.likely[None].repeat(len(at), 0)


def test_a_guess_costs_more_beside_many_answers_which_all_wait_for_it() -> None:
    _, slots = engine(Together)
    costs = [slots._guess_cost(rows) for rows in (1, 2, 4, 8)]
    assert costs == sorted(costs)
    assert costs[0] < 0.3 < 0.7 < costs[-1] <= 1


def test_guesses_share_the_calls_of_all_and_their_scores_stay_within_bounds() -> None:
    forward = Together()
    forward.scored = 12
    slots = SlotEngine(forward, EngineInfo("together", 8, 1024, 2, {}), frozenset(), guesses=3)
    made = dict.fromkeys(range(8), 0)
    for number in made:
        sampling = Sampling(temperature=1.0, seed=number)
        slots.submit(Job(number, [1, 2] * 4, 200, sampling, ignore_eos=True))
    while slots.busy:
        forward.calls.clear()
        for token in slots.step():
            made[token.job] += 1
        assert len(forward.calls) <= 1
        assert all(sum(call) <= 12 for call in forward.calls)
    assert set(made.values()) == {200}
    assert slots.drafted.accepted > 50
