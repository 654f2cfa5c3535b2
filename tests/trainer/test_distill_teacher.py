"""Asking a real HTTP teacher that misbehaves: what is asked again, what is given up, what it costs."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ask import ask
from asking import TEXTS, saved, upper
from fake_teacher import FakeTeacher, Fault, answer

from slmops.api.run import TeacherEndpoint
from slmops_trainer import replies, teacher
from slmops_trainer.context import Context
from slmops_trainer.failure import RunFailure


def test_answers_come_in_order_with_the_settings_asked_for(pod: Callable[[], Context]) -> None:
    with FakeTeacher(upper) as fake:
        ctx = pod()
        outcome, texts = ask(ctx, fake.url, TEXTS, samples=2, key="s3cret")
    assert texts == [text.upper() for text in TEXTS for _ in range(2)]
    assert outcome.rejected == {}
    assert outcome.tokens == 7 * 24
    assert {sent["authorization"] for sent in fake.sent} == {"Bearer s3cret"}
    body = fake.requests[0]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("big", 0.7, 0.9, 16)
    assert len({request["seed"] for request in fake.requests}) == 24  # each sample is drawn anew, and always alike
    assert fake.most_at_once <= 4
    assert ctx.board.progress.message == "24 of 24 answers, 168 tokens"


def test_requests_run_side_by_side_up_to_the_limit(pod: Callable[[], Context]) -> None:
    gate = threading.Event()

    def script(number: int, question: str, body: dict[str, Any]) -> Fault:
        if number == 3:
            gate.set()  # three are in at once, or nobody ever gets an answer
        return Fault(body=answer("x"), wait=gate)

    with FakeTeacher(upper, script) as fake:
        ask(pod(), fake.url, TEXTS, concurrency=3)
    assert fake.most_at_once == 3


def test_retry_after_is_obeyed_by_all(pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four are asked at once; one of them is told to wait, and the other three are answered when that is known."""
    four, known = threading.Event(), threading.Event()
    told: list[float] = []
    later: list[float] = []
    read = replies.retry_after

    def noting(value: str) -> float:
        told.append(time.monotonic())
        known.set()
        return read(value)

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        if number == 4:
            four.set()
        if number > 4:
            later.append(time.monotonic())
            return None
        if number == 1:
            return Fault(429, "slow down", {"Retry-After": "1"}, four)
        return Fault(body=answer(question.upper()), wait=known)

    monkeypatch.setattr(replies, "retry_after", noting)
    with FakeTeacher(upper, script) as fake:
        _, texts = ask(pod(), fake.url, TEXTS, concurrency=4)
    assert texts == [text.upper() for text in TEXTS]
    assert (len(told), len(later)) == (1, len(TEXTS) - 3)
    assert min(later) - told[0] >= 1.0


@pytest.mark.parametrize("status", [500, 502, 503, 429, 0])
def test_passing_trouble_costs_no_answer(pod: Callable[[], Context], status: int) -> None:
    script = lambda _, question, __: Fault(status, "busy") if fake.asked[question] < 4 else None  # noqa: E731
    with FakeTeacher(upper, script) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS)
    assert texts == [text.upper() for text in TEXTS]
    assert outcome.rejected == {}
    assert set(fake.asked.values()) == {4}


def test_a_slow_request_is_cut_off_and_asked_again(pod: Callable[[], Context]) -> None:
    never = threading.Event()
    slow = lambda number, *_: Fault(body=answer("late"), wait=never) if number == 1 else None  # noqa: E731
    with FakeTeacher(upper, slow) as fake:
        _, texts = ask(pod(), fake.url, TEXTS, timeout=0.5)
        never.set()
    assert texts == [text.upper() for text in TEXTS]
    assert sum(fake.asked.values()) == len(TEXTS) + 1


GARBAGE = {
    "no JSON": "<html>welcome</html>",
    "no choices[0].message.content": '{"error": {"message": "quota"}}',
    "an empty answer": answer("  "),
    "half a surrogate pair, which is no text": answer("\ud800"),
}


@pytest.mark.parametrize(("kind", "body"), GARBAGE.items())
def test_garbage_is_counted_and_ends_the_run_below_the_ratio(pod: Callable[[], Context], kind: str, body: str) -> None:
    with FakeTeacher(upper, lambda *_: Fault(body=body)) as fake, pytest.raises(RunFailure) as caught:
        ask(pod(), fake.url, TEXTS, min_success_ratio=0.9, concurrency=1)
    assert caught.value.reason == "TeacherAnswersRejected"
    assert not caught.value.retryable
    assert f"2 x {kind}" in caught.value.message
    assert "minSuccessRatio 0.9 of 12 prompts cannot be reached" in caught.value.message
    assert len(fake.requests) == 2 * teacher.TRIES  # the second lost prompt decides: no further one is asked


@pytest.mark.parametrize(("others", "reason"), [(1, "BadSpec"), (3, "TeacherAnswersRejected")])
def test_what_only_more_tokens_would_mend_is_not_looked_at_again_and_paid_again(
    pod: Callable[[], Context], others: int, reason: str
) -> None:
    """The operator makes another pod for TeacherAnswersRejected: the teacher may be mended. None for BadSpec."""

    def script(_: int, question: str, __: object) -> Fault | None:
        at = TEXTS.index(question)
        other = Fault(422 if at % 2 else 400, "no")  # two kinds, neither more frequent than the thoughts
        return Fault(body=answer("", "length", 16)) if at < 2 else other if at < 2 + others else None

    with FakeTeacher(upper, script) as fake, pytest.raises(RunFailure) as caught:
        ask(pod(), fake.url, TEXTS, min_success_ratio=1 - (1.5 + others) / len(TEXTS), concurrency=1)
    assert caught.value.reason == reason
    assert ("Raise data.generation.maxTokens in a new object" in caught.value.message) == (reason == "BadSpec")
    assert "2 x no room for an answer" in caught.value.message


def test_garbage_that_passes_is_asked_again(pod: Callable[[], Context]) -> None:
    with FakeTeacher(upper, lambda number, *_: Fault(body="oops") if number % 3 else None) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=1)
    assert texts == [text.upper() for text in TEXTS]
    assert outcome.rejected == {}


def test_a_ratio_that_holds_lets_the_run_go_on(pod: Callable[[], Context]) -> None:
    bad = set(TEXTS[:3])
    with FakeTeacher(upper, lambda _, question, __: Fault(400, "too long") if question in bad else None) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, min_success_ratio=0.75)
        assert texts[:3] == [None] * 3
        assert set(outcome.rejected.values()) == {"HTTP 400: 'too long'"}
        with pytest.raises(RunFailure, match="3 prompts got no usable answer"):
            ask(pod(), fake.url, TEXTS, min_success_ratio=0.76)


def test_a_prompt_is_lost_once_however_many_samples_were_wanted(pod: Callable[[], Context]) -> None:
    """And only when its last sample is: the ratio is one of prompts."""
    bad = TEXTS[0]
    hold = threading.Event()

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        if question == bad:
            return Fault(400, "never")
        if question == TEXTS[1] and fake.asked[question] == 1:
            return Fault(body=answer("late"), wait=hold)  # still in flight when its other samples are refused
        if question == TEXTS[1]:
            hold.set()
            return Fault(400, "no further answer")
        return None

    with FakeTeacher(upper, script) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS[:10], samples=4, concurrency=8, min_success_ratio=0.9)
    assert sum(text is not None for text in texts) == 4 * 8 + 1
    assert len(outcome.rejected) == 4 + 3


def test_one_sample_of_several_is_an_answer_to_the_prompt(pod: Callable[[], Context]) -> None:
    seen: set[str] = set()

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        first = question not in seen
        seen.add(question)
        return None if first else Fault(400, "no second answer")

    with FakeTeacher(upper, script) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS[:4], samples=2, min_success_ratio=1.0)
    assert sorted(text for text in texts if text) == sorted(text.upper() for text in TEXTS[:4])
    assert len(outcome.rejected) == 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_would_be_refused_again_is_asked_once(pod: Callable[[], Context], status: int) -> None:
    fault = Fault(status, '{"error": {"message": "max_tokens is too large"}}')
    with FakeTeacher(upper, lambda *_: fault) as fake, pytest.raises(RunFailure, match="max_tokens is too large"):
        ask(pod(), fake.url, TEXTS, min_success_ratio=0.9, concurrency=1)
    assert list(fake.asked.values()) == [1, 1]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_teacher_that_takes_no_temperature_and_another_limit_is_asked_as_it_wants(
    pod: Callable[[], Context], caplog: pytest.LogCaptureFixture, concurrency: int
) -> None:
    """As OpenAI's models that think: they name one parameter at a time."""
    refusals = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0.7 with this model. "
        "Only the default (1) value is supported.",
        "top_p": "Unsupported parameter: 'top_p' is not supported with this model.",
    }

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        odd = next((name for name in refusals if name in body), None)
        error = {"message": refusals[odd], "type": "invalid_request_error", "param": odd} if odd else None
        return Fault(400, json.dumps({"error": error}, indent=2)) if odd else None

    with FakeTeacher(upper, script) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=concurrency, min_success_ratio=1.0)
        assert (texts, outcome.rejected) == ([text.upper() for text in TEXTS], {})
        last = fake.requests[-1]
        assert (last["max_completion_tokens"], set(last) & set(refusals)) == (16, set())
        assert len(fake.requests) <= len(TEXTS) + 3 * concurrency
        assert caplog.text.count("The teacher takes no temperature") == 1
        count = len(fake.requests)
        assert ask(pod(), fake.url, TEXTS)[1] == texts  # the answers are found under what was asked for
        assert len(fake.requests) == count


def test_a_parameter_that_is_refused_although_it_is_left_out_is_a_rejection(pod: Callable[[], Context]) -> None:
    fault = Fault(400, '{"error": {"message": "Unsupported parameter: \'top_p\' is not supported"}}')
    with FakeTeacher(upper, lambda *_: fault) as fake, pytest.raises(RunFailure, match="is not supported"):
        ask(pod(), fake.url, TEXTS[:1], min_success_ratio=1.0)
    assert len(fake.requests) == 2


def test_thoughts_that_leave_no_room_are_paid_once_and_count_for_the_budget(pod: Callable[[], Context]) -> None:
    thoughts = lambda _, question, __: Fault(body=answer("", "length", 16)) if question == TEXTS[0] else None  # noqa: E731
    with FakeTeacher(upper, thoughts) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, budget=20, concurrency=1)
    assert list(outcome.rejected.values()) == ["no room for an answer: raise generation.maxTokens"]
    assert (texts[0], texts[1], outcome.tokens) == (None, TEXTS[1].upper(), 16 + 7)
    assert len(fake.requests) == 2


def test_an_account_without_money_is_named_at_once(pod: Callable[[], Context], tmp_path: Path) -> None:
    with FakeTeacher(upper, lambda number, *_: Fault(402, "pay") if number > 5 else None) as fake:
        with pytest.raises(RunFailure, match="top it up") as caught:
            ask(pod(), fake.url, TEXTS, concurrency=1)
        assert (caught.value.reason, len(fake.requests), saved(tmp_path)) == ("AccessDenied", 6, 5)


def test_a_question_that_is_forbidden_does_not_end_the_run(pod: Callable[[], Context]) -> None:
    flagged = lambda _, question, __: Fault(403, "flagged") if question == TEXTS[5] else None  # noqa: E731
    with FakeTeacher(upper, flagged) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=1, min_success_ratio=0.9)
    assert list(outcome.rejected.values()) == ["HTTP 403: 'flagged'"]
    assert texts.count(None) == 1


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_is_not_followed_and_named(pod: Callable[[], Context], status: int) -> None:
    with FakeTeacher(upper) as other:
        away = Fault(status, "moved", {"Location": f"{other.url}/chat/completions?key=s3cret"})
        with FakeTeacher(upper, lambda *_: away) as fake, pytest.raises(RunFailure) as caught:
            ask(pod(), fake.url, TEXTS, key="s3cret", concurrency=1)
        assert not other.requests
    assert caught.value.reason == "BadSpec"
    assert f"leads elsewhere (HTTP {status}, to '{other.url}/chat/completions')" in caught.value.message
    assert "s3cret" not in caught.value.message
    assert len(fake.requests) == 1


def test_a_url_keeps_its_query(pod: Callable[[], Context]) -> None:
    paths: list[str] = []
    with FakeTeacher(upper) as fake:
        fake.seen = paths.append
        _, texts = ask(pod(), f"{fake.url}/?api-version=1", TEXTS[:1])
    assert texts == [TEXTS[0].upper()]
    assert paths == ["/v1/chat/completions?api-version=1"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_fatal_and_never_told(pod: Callable[[], Context], status: int) -> None:
    fault = Fault(status, json.dumps({"error": "Incorrect API key provided: s3cret"}))
    with FakeTeacher(upper, lambda *_: fault) as fake:
        endpoint = TeacherEndpoint(url=fake.url, model="big", secret="openai", key="token")
        with pytest.raises(RunFailure) as caught:
            ask(pod(), fake.url, TEXTS, key="s3cret", endpoint=endpoint)
        assert len(fake.requests) < 8  # those side by side, and what they asked until the last of them was refused
    assert caught.value.reason == "AccessDenied"
    assert not caught.value.retryable
    assert "Put a valid key under token in Secret openai" in caught.value.message
    assert "s3cret" not in caught.value.message


def test_the_key_is_blotted_out_of_examples(pod: Callable[[], Context]) -> None:
    fault = Fault(400, "your key s3cret is odd")
    with FakeTeacher(upper, lambda *_: fault) as fake, pytest.raises(RunFailure) as caught:
        ask(pod(), fake.url, TEXTS, key="s3cret", min_success_ratio=1.0)
    assert "your key *** is odd" in caught.value.message


def test_a_wrong_url_is_known_after_one_request_a_worker(pod: Callable[[], Context]) -> None:
    with FakeTeacher(upper) as fake, pytest.raises(RunFailure) as caught:
        ask(pod(), fake.url + "/chat", TEXTS, concurrency=1)
    assert "Correct the URL (up to and with /v1)" in caught.value.message
    assert caught.value.reason == "BadSpec"
    assert len(fake.requests) == 1


def test_the_token_budget_ends_the_asking(pod: Callable[[], Context]) -> None:
    with FakeTeacher(upper) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, budget=20, concurrency=1, min_success_ratio=1.0)
        assert outcome.tokens == 21  # 7 each: the third answer crosses the line
        assert outcome.unasked == 9
        assert sum(text is not None for text in texts) == 3
        again, _ = ask(pod(), fake.url, TEXTS, budget=20, concurrency=1)
        assert (again.tokens, len(fake.requests)) == (21, 3)  # the budget is the run's, not the pod's


def test_the_budget_is_for_all_pods_also_where_no_answer_comes(pod: Callable[[], Context]) -> None:
    """The operator makes another pod for TeacherAnswersRejected, for as long as the object is there."""
    rejects = lambda _, question, __: Fault(body=answer(None, tokens=10)) if question in TEXTS[:2] else None  # noqa: E731
    reasons = []
    with FakeTeacher(upper, rejects) as fake:
        for _ in range(4):
            with pytest.raises(RunFailure) as caught:
                ask(pod(), fake.url, TEXTS, budget=100, concurrency=1, min_success_ratio=0.9)
            reasons.append((caught.value.reason, len(fake.requests)))
    assert reasons == [("TeacherAnswersRejected", 6), ("BadSpec", 12), ("BadSpec", 12), ("BadSpec", 12)]
    assert "data.generation.maxTotalTokens is spent" in caught.value.message


def test_what_the_budget_was_spent_on_in_vain_counts_in_the_next_pod_too(pod: Callable[[], Context]) -> None:
    thoughts = lambda _, question, __: Fault(body=answer("", "length", 16)) if question == TEXTS[0] else None  # noqa: E731
    with FakeTeacher(upper, thoughts) as fake:
        for _ in range(2):  # the second one would have to pay for all it asks
            outcome, _ = ask(pod(), fake.url, TEXTS, budget=20, concurrency=1, min_success_ratio=0.5)
            assert (len(outcome.rejected), outcome.unasked, outcome.tokens) == (1, 10, 16 + 7)
    assert len(fake.requests) == 2


def test_equal_questions_are_asked_once(pod: Callable[[], Context]) -> None:
    with FakeTeacher(upper) as fake:
        _, texts = ask(pod(), fake.url, ["same", "same", "other"])
    assert texts == ["SAME", "SAME", "OTHER"]
    assert fake.asked == {"same": 1, "other": 1}
