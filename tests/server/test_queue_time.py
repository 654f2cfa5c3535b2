"""How long a request would wait: from measured answers, by pure arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops_server.queue_time import QueueTime, Work


def measured(
    answers: int = 1, prompt: int = 100, tokens: int = 11, reading: float = 1.0, writing: float = 2.0
) -> QueueTime:
    made = QueueTime()
    for _ in range(answers):
        made.note(prompt, tokens, reading, writing)
    return made


def test_nothing_measured_is_a_second_each() -> None:
    fresh = QueueTime()
    assert not fresh.measured
    assert fresh.wait([Work(5, 5)] * 2, [Work(5, 5)] * 3, 2) == pytest.approx((3 + 2 / 2) / 2)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(100, 100), 3.0),  # as those before it
        (Work(200, 100), 4.0),  # twice the prompt, read at 100 tokens/s
        (Work(100, 6), 2.0),  # five tokens after the first, of 0.2 s each
        (Work(100, 1), 1.0),
    ],
)
def test_an_answer_takes_what_its_length_makes_of_the_measured_speeds(work: Work, seconds: float) -> None:
    assert measured(5).seconds(work) == pytest.approx(seconds)


def test_slots_work_off_the_queue_side_by_side() -> None:
    work = Work(100, 100)
    assert measured().wait([work] * 4, [work] * 8, 4) == pytest.approx((8 * 3.0 + 4 * 1.5) / 4)


def test_the_newest_answers_count_most() -> None:
    times = measured(50)
    for _ in range(100):
        times.note(100, 11, 0.1, 0.2)
    assert times.seconds(Work(100, 100)) == pytest.approx(0.3, rel=0.1)


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 500), st.floats(0, 100), st.floats(0, 100)), max_size=20),
    st.integers(1, 9000),
    st.integers(1, 500),
)
def test_longer_never_takes_less(noted: list[tuple[int, int, float, float]], prompt: int, limit: int) -> None:
    times = QueueTime()
    for one in noted:
        times.note(*one)
    base = times.seconds(Work(prompt, limit))
    assert 0 <= base <= times.seconds(Work(prompt + 1, limit))
    assert base <= times.seconds(Work(prompt, limit + 1))
