"""A teacher that is down, and one that a single question brings down: they are told from each other."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ask import ask
from asking import TEXTS, in_thread, saved, upper, wait_until
from fake_teacher import FakeTeacher, Fault, answer

from slmops_trainer import teacher
from slmops_trainer.context import Context
from slmops_trainer.failure import RunFailure


def test_a_teacher_that_is_down_is_waited_for(pod: Callable[[], Context]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    ctx = pod()
    thread, found = in_thread(lambda: ask(ctx, f"http://127.0.0.1:{port}/v1", TEXTS))
    wait_until(lambda: ctx.board.progress.message.startswith("Teacher unavailable for "))
    assert ctx.board.progress.stage == "Generating"
    with FakeTeacher(upper, port=port) as fake:
        thread.join(60)
        assert fake.asked == dict.fromkeys(TEXTS, 1)
    assert found[0][1] == [text.upper() for text in TEXTS]
    assert "unavailable" not in ctx.board.progress.message


def test_a_teacher_that_stays_away_ends_the_pod_with_its_answers_saved(
    pod: Callable[[], Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.5")
    with FakeTeacher(upper, lambda number, *_: Fault(503) if number > 5 else None) as fake:
        with pytest.raises(RunFailure, match=r"did not answer for \d s \(HTTP 503\)") as caught:
            ask(pod(), fake.url, TEXTS)
        assert caught.value.reason == "TeacherUnavailable"
        assert not caught.value.retryable  # the next pod starts later, not at once
        assert caught.value.message.endswith("5 of 12 answers came, and are saved.")
        assert saved(tmp_path) == 5
        fake.script = None
        _, texts = ask(pod(), fake.url, TEXTS)
        assert texts == [text.upper() for text in TEXTS]
        answered_first = [request["messages"][-1]["content"] for request in fake.requests[:5]]
        assert all(fake.asked[text] == 1 for text in answered_first)


def silent(hold: threading.Event) -> Fault:
    return Fault(body=answer("late"), wait=hold)


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("status", [500, 504, 0, 200], ids=["500", "504", "cut", "hangs"])
def test_a_teacher_that_breaks_down_is_not_taken_for_one_that_rejects(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, concurrency: int, status: int
) -> None:
    """HTTP 500, a cut connection and no answer in time may be a question's own fault, but not every question's."""
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.4")
    hold, lock = threading.Event(), threading.Lock()
    answered: set[str] = set()

    def broken(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        with lock:
            if question in answered or len(answered) < 5:
                answered.add(question)  # again, should the answer have come too late
                return None
        return silent(hold) if status == 200 else Fault(status)

    with FakeTeacher(upper, broken) as fake:
        with pytest.raises(RunFailure, match="5 of 12 answers came, and are saved") as caught:
            ask(pod(), fake.url, TEXTS, concurrency=concurrency, timeout=1.0, min_success_ratio=0.9)
        assert caught.value.reason == "TeacherUnavailable"
        hold.set()
        fake.script = None
        _, texts = ask(pod(), fake.url, TEXTS)
    assert texts == [text.upper() for text in TEXTS]


@pytest.mark.parametrize(("place", "status"), [(0, 500), (5, 500), (11, 500), (5, 524), (5, 0)])
def test_a_question_that_the_teacher_never_survives_is_given_up_when_asked_one_by_one(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, place: int, status: int
) -> None:
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.4")
    poison = lambda _, question, __: Fault(status) if question == TEXTS[place] else None  # noqa: E731
    with FakeTeacher(upper, poison) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=1, min_success_ratio=0.9)
    assert [text for text in texts if text is None] == [None]
    assert len(outcome.rejected) == 1
    others = sum(fake.asked[text] for at, text in enumerate(TEXTS) if at != place)
    assert others <= len(TEXTS) - 1 + 2  # at most two are asked again, to see whether the teacher lives


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("status", [500, 502, 504, 0, 200], ids=["500", "502", "504", "cut", "hangs"])
def test_a_teacher_that_breaks_down_near_the_end_loses_no_question(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, concurrency: int, status: int
) -> None:
    """Though the ratio holds without them, and nobody else is left to be asked."""
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.4")
    hold = threading.Event()

    def broken(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        if number < 10:
            return None
        return silent(hold) if status == 200 else Fault(status)

    with FakeTeacher(upper, broken) as fake:
        with pytest.raises(RunFailure, match="9 of 12 answers came, and are saved") as caught:
            ask(pod(), fake.url, TEXTS, concurrency=concurrency, timeout=3.0 if status == 200 else 30.0)
        assert caught.value.reason == "TeacherUnavailable"
        hold.set()
        fake.script = None
        outcome, texts = ask(pod(), fake.url, TEXTS)
    assert (outcome.rejected, texts) == ({}, [text.upper() for text in TEXTS])


@pytest.mark.parametrize("status", [502, 200], ids=["502", "hangs"])
def test_what_a_pod_gave_up_does_not_hold_up_the_next_one(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """It has nothing else to ask, and as many of them as it asks side by side or more."""
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.4")
    hold = threading.Event()

    def poison(_: int, question: str, __: dict[str, Any]) -> Fault | None:
        if question not in (TEXTS[4], TEXTS[8]):
            return None
        return silent(hold) if status == 200 else Fault(status)

    with FakeTeacher(upper, poison) as fake:
        for _ in range(2):
            outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=1, timeout=1.0, min_success_ratio=0.5)
            assert [text for text in TEXTS if text.upper() not in texts] == [TEXTS[4], TEXTS[8]]
            assert len(outcome.rejected) == 2
        hold.set()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_teacher_that_is_away_a_second_time_is_asked_the_rest(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    """That others were answered after a question was put off proves nothing of the time when it was asked again."""
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.4")
    lock, answered, back, hold = threading.Lock(), set[str](), threading.Event(), threading.Event()

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        with lock:
            if question in answered and len(answered) == 11:
                back.set()
            if question != TEXTS[3]:
                answered.add(question)
                return None
        return None if back.is_set() else silent(hold)

    with FakeTeacher(upper, script) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=concurrency, timeout=0.5)
        hold.set()
    assert back.is_set()
    assert (outcome.rejected, texts) == ({}, [text.upper() for text in TEXTS])


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_teacher_that_comes_back_late_is_asked_the_rest(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    """It is back when it is asked what it has answered before."""
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.4")
    lock, answered, back = threading.Lock(), set[str](), threading.Event()

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        with lock:
            if question in answered:
                back.set()
            if len(answered) < 11:
                answered.add(question)
                return None
        return None if back.is_set() else Fault(502)

    with FakeTeacher(upper, script) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=concurrency)
    assert back.is_set()
    assert (outcome.rejected, texts) == ({}, [text.upper() for text in TEXTS])
    assert outcome.tokens == 7 * (len(TEXTS) + 1)


@pytest.mark.parametrize(
    ("status", "what"),
    [(500, "HTTP 500"), (502, "HTTP 502"), (504, "HTTP 504"), (0, "Server disconnected without sending a response.")],
)
def test_one_poisonous_question_does_not_hold_up_the_rest(pod: Callable[[], Context], status: int, what: str) -> None:
    def poison(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        if question == TEXTS[0]:
            return Fault(status, "boom")
        tries = min(TEXTS.index(question), 8)
        wait_until(lambda: fake.asked[TEXTS[0]] >= tries)  # others are answered between its tries
        return None

    with FakeTeacher(upper, poison) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, min_success_ratio=0.9)
    assert texts[0] is None
    assert texts[1:] == [text.upper() for text in TEXTS[1:]]
    assert list(outcome.rejected.values()) == [f"{what}, 8 times, while other questions were answered"]
