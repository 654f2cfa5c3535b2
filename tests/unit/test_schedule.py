"""The queue, with the clock in the test's hand."""

import math

from hypothesis import given
from hypothesis import strategies as st

from slmops.handlers.schedule import BACKOFF_MOST, COALESCE, RESYNC, Schedule


def make(jitter: float = 0.0) -> Schedule[str]:
    return Schedule(lambda: jitter)


def test_a_poked_object_is_due_after_the_burst() -> None:
    schedule = make()
    schedule.poke("a", 0.0)
    schedule.poke("a", 0.01)
    assert schedule.take(0.0) is None
    assert schedule.wait(0.0) == COALESCE
    assert schedule.take(0.1) == "a"
    assert schedule.take(0.1) is None


def test_one_pass_at_a_time_for_an_object_and_another_for_what_came_meanwhile() -> None:
    schedule = make()
    schedule.poke("a", 0.0)
    assert schedule.take(1.0) == "a"
    schedule.poke("a", 1.0)
    schedule.poke("a", 1.1)
    assert schedule.take(9.0) is None
    schedule.done("a", 9.0, None)
    assert schedule.take(9.1) == "a"
    schedule.done("a", 9.2, None)
    assert schedule.take(20.0) is None


def test_first_come_first_served() -> None:
    schedule = make()
    for number, key in enumerate("bca"):
        schedule.poke(key, number * 0.1)
    assert [schedule.take(1.0) for _ in range(3)] == ["b", "c", "a"]


def test_a_requeue_is_kept_and_an_event_comes_before_it() -> None:
    schedule = make()
    schedule.poke("a", 0.0)
    schedule.take(1.0)
    schedule.done("a", 1.0, 10.0)
    assert schedule.take(10.9) is None
    schedule.poke("a", 5.0)
    assert schedule.take(5.1) == "a"
    schedule.done("a", 5.1, 10.0)
    assert schedule.take(11.5) is None  # the old time no longer counts
    assert schedule.take(15.2) == "a"


def test_an_object_at_rest_is_looked_at_from_time_to_time() -> None:
    schedule = make(jitter=1.0)
    schedule.poke("a", 0.0)
    schedule.take(1.0)
    schedule.done("a", 1.0, None)
    assert schedule.wait(1.0) == RESYNC * 1.2
    assert schedule.take(1.0 + RESYNC * 1.2) == "a"
    schedule.done("a", 400.0, 1e9)  # a requeue beyond it is no excuse
    assert schedule.wait(400.0) == RESYNC * 1.2


def test_a_gone_object_is_forgotten_unless_something_happened_since() -> None:
    schedule = make()
    schedule.poke("a", 0.0)
    schedule.take(1.0)
    schedule.done("a", 1.0, math.inf)
    assert len(schedule) == 0
    assert schedule.wait(1.0) is None
    schedule.poke("a", 2.0)
    schedule.take(3.0)
    schedule.poke("a", 3.0)
    schedule.done("a", 3.0, math.inf)
    assert schedule.take(4.0) == "a"


def test_failures_back_off_to_a_limit_and_a_good_pass_ends_that() -> None:
    schedule = make()
    schedule.poke("a", 0.0)
    now, delays = 0.0, []
    for _ in range(9):
        now += schedule.wait(now) or 0.0
        assert schedule.take(now) == "a"
        delays.append(schedule.failed("a", now))
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    now += schedule.wait(now) or 0.0
    schedule.take(now)
    schedule.done("a", now, 0.0)
    schedule.take(now)
    assert schedule.failed("a", now) == 1.0


def test_an_event_cuts_a_backoff_short_but_makes_no_hot_loop() -> None:
    schedule = make()
    schedule.poke("a", 0.0)
    now = 1.0
    for _ in range(6):
        schedule.take(now)
        schedule.failed("a", now)
        now += schedule.wait(now) or 0.0
    schedule.take(now)
    assert schedule.failed("a", now) == BACKOFF_MOST
    schedule.poke("a", now + 0.1)
    assert schedule.take(now + 0.5) is None
    assert schedule.take(now + 1.1) == "a"


def test_depth_and_age_count_what_waits() -> None:
    schedule = make()
    schedule.poke("a", 0.0)
    schedule.poke("b", 2.0)
    assert (schedule.depth(10.0), round(schedule.oldest(10.0), 2)) == (2, 9.95)
    schedule.take(10.0)
    assert (schedule.depth(10.0), round(schedule.oldest(10.0), 2)) == (1, 7.95)
    schedule.take(10.0)
    assert (schedule.depth(10.0), schedule.oldest(10.0)) == (0, 0.0)


@given(st.lists(st.tuples(st.sampled_from(["poke", "take", "done", "failed"]), st.sampled_from("abc")), max_size=60))
def test_no_event_is_ever_lost(steps: list[tuple[str, str]]) -> None:
    """Whatever the order: an object poked after its last pass began is handed out again, and soon."""
    schedule, now = make(), 0.0
    out: set[str] = set()
    owed: set[str] = set()
    for action, key in steps:
        now += 0.5
        if action == "poke":
            schedule.poke(key, now)
            owed.add(key)
        elif action == "take":
            taken = schedule.take(now)
            if taken:
                assert taken not in out
                out.add(taken)
                owed.discard(taken)
        elif key in out:
            out.discard(key)
            if action == "done":
                schedule.done(key, now, None)
            else:
                schedule.failed(key, now)
    for key in out:
        schedule.done(key, now, None)
    soon = now + 2.0
    found = set()
    while (taken := schedule.take(soon)) is not None:
        found.add(taken)
    assert owed <= found
