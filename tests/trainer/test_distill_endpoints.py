"""Endpoints that say things in words of their own: vendors, gateways and servers, as they do it."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ask import ask
from asking import TEXTS, saved, upper
from fake_teacher import FakeTeacher, Fault, Script, answer

from slmops.api.meta import Ancestor
from slmops.api.run import TeacherEndpoint
from slmops_artifacts.trust import trusted
from slmops_trainer import answers, replies, teacher
from slmops_trainer.context import Context
from slmops_trainer.failure import RunFailure

TLS = Path(__file__).parent / "tls"  # of 127.0.0.1, for a hundred years; the CA's key is nowhere
UPPER = [text.upper() for text in TEXTS]


def without(*places: int) -> list[str | None]:
    return [None if at in places else text for at, text in enumerate(UPPER)]


@pytest.mark.parametrize("finish", replies.BROKEN_OFF)
def test_an_answer_that_broke_off_is_asked_again(pod: Callable[[], Context], finish: str) -> None:
    broken = lambda _, question, __: Fault(body=answer("ha", finish)) if fake.asked[question] == 1 else None  # noqa: E731
    with FakeTeacher(upper, broken) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS)
    assert (texts, outcome.rejected) == (UPPER, {})
    assert set(fake.asked.values()) == {2}


def test_an_endpoint_that_breaks_every_answer_off_is_away(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.3")
    with FakeTeacher(upper, lambda *_: Fault(body=answer("ha", "abort"))) as fake, pytest.raises(RunFailure) as caught:
        ask(pod(), fake.url, TEXTS)
    assert caught.value.reason == "TeacherUnavailable"


@pytest.mark.parametrize("finish", replies.CUT_OFF)
def test_only_a_whole_answer_is_found_under_another_limit(tmp_path: Path, finish: str) -> None:
    store = answers.Answers(tmp_path / "own")
    store.add("cut 16", replies.Reply("ha", finish, 3), "cut")
    store.add("whole 16", replies.Reply("ha", "stop", 3), "whole")
    store.seal()
    rows = [json.loads(line) for path in (tmp_path / "own").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert [row.get("whole") for row in rows] == [None, "whole"]


def test_a_request_that_is_too_large_for_the_account_is_rejected_at_once(pod: Callable[[], Context]) -> None:
    said = (
        "Request too large for gpt-4o in organization org-1 on tokens per min (TPM): Limit 30000, Requested 37313. "
        "The input or output tokens must be reduced in order to run successfully."
    )
    fault = Fault(429, json.dumps({"error": {"message": said, "type": "tokens", "code": "rate_limit_exceeded"}}))
    with FakeTeacher(upper, lambda _, question, __: fault if question == TEXTS[5] else None) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, min_success_ratio=0.9)
    assert texts == without(5)
    assert ["Request too large" in what for what in outcome.rejected.values()] == [True]
    assert fake.asked[TEXTS[5]] == 1


def late(flagged: Callable[[str], bool]) -> Script:
    """What is flagged is refused at once, all else is answered later."""

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        if flagged(question):
            return Fault(403, '{"error": {"code": 403, "message": "Your input was flagged"}}')
        time.sleep(0.2)
        return None

    return script


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_first_question_that_is_forbidden_is_rejected_alone(pod: Callable[[], Context], concurrency: int) -> None:
    with FakeTeacher(upper, late(lambda question: question == TEXTS[0])) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=concurrency, min_success_ratio=0.9)
        assert (texts, len(outcome.rejected)) == (without(0), 1)
        # A pod that has nothing else to ask is told by one that was answered.
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=concurrency, min_success_ratio=0.9)
        assert (texts, len(outcome.rejected)) == (without(0), 1)
        assert fake.asked[TEXTS[0]] == 2
        assert len(fake.requests) == len(TEXTS) + 2


def test_a_key_that_is_taken_away_between_two_pods_is_to_blame(pod: Callable[[], Context]) -> None:
    with FakeTeacher(upper) as fake:
        ask(pod(), fake.url, TEXTS[:6])
        fake.script = late(lambda _: True)
        with pytest.raises(RunFailure, match="Give a key") as caught:
            ask(pod(), fake.url, TEXTS)
    assert caught.value.reason == "AccessDenied"


@pytest.mark.parametrize("questions", [1, 2, 12])
def test_a_key_that_opens_nothing_is_to_blame_however_few_are_asked(pod: Callable[[], Context], questions: int) -> None:
    with FakeTeacher(upper, late(lambda _: True)) as fake, pytest.raises(RunFailure) as caught:
        ask(pod(), fake.url, TEXTS[:questions], concurrency=2, min_success_ratio=0.9)
    assert caught.value.reason == "AccessDenied"
    assert len(fake.requests) <= 5


@pytest.mark.parametrize(
    "fault", [Fault(404, '{"detail": "Not Found"}'), Fault(405), Fault(302, "", {"Location": "/login"})]
)
def test_a_url_that_was_right_before_is_waited_for(pod: Callable[[], Context], fault: Fault) -> None:
    """A LoRA adapter that is not loaded yet; an ingress without its backend."""
    with FakeTeacher(upper) as fake:
        ask(pod(), fake.url, TEXTS[:6])
        fake.script = lambda number, *_: fault if number <= 8 else None
        outcome, texts = ask(pod(), fake.url, TEXTS, concurrency=1)
    assert (texts, outcome.rejected) == (UPPER, {})
    assert len(fake.requests) == len(TEXTS) + 2


PASSING = {
    "TGI's shard is dead": Fault(424, '{"error": "Request failed during generation", "error_type": "generation"}'),
    "OpenRouter's provider": Fault(200, '{"error": {"code": 502, "message": "Provider returned error"}}'),
    "OpenRouter's limit": Fault(200, '{"error": {"code": "429", "message": "Rate limit exceeded"}}'),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_no_verdict(pod: Callable[[], Context], fault: Fault) -> None:
    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        return fault if fake.asked[question] <= teacher.TRIES + 1 else None

    with FakeTeacher(upper, script) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, min_success_ratio=1.0)
    assert (texts, outcome.rejected) == (UPPER, {})
    assert max(fake.asked.values()) > teacher.TRIES


def test_a_status_in_the_body_ends_the_run_like_one_of_http(pod: Callable[[], Context]) -> None:
    with FakeTeacher(upper, lambda *_: Fault(200, '{"error": {"code": 402, "message": "credits"}}')) as fake:
        with pytest.raises(RunFailure, match="top it up") as caught:
            ask(pod(), fake.url, TEXTS)
        assert caught.value.reason == "AccessDenied"


def test_an_endpoint_that_asks_for_a_day_is_left_to_a_later_pod(pod: Callable[[], Context], tmp_path: Path) -> None:
    """Azure's quota; a pod that waited would keep its GPU."""
    fault = Fault(429, '{"error": {"message": "quota"}}', {"Retry-After": "86400"})
    began = time.monotonic()
    away = lambda number, *_: fault if number > 5 else None  # noqa: E731
    with FakeTeacher(upper, away) as fake, pytest.raises(RunFailure, match="asks for 86400 s without") as caught:
        ask(pod(), fake.url, TEXTS, concurrency=1)
    assert (caught.value.reason, saved(tmp_path)) == ("TeacherUnavailable", 5)
    assert time.monotonic() - began < teacher.PATIENCE


def test_one_of_several_backends_that_asks_for_a_day_holds_up_nobody(pod: Callable[[], Context]) -> None:
    others = threading.Event()

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        if number == 1:
            return Fault(429, "quota", {"Retry-After": "86400"}, others)
        if number == 6:
            others.set()
        return None

    with FakeTeacher(upper, script) as fake:
        assert ask(pod(), fake.url, TEXTS, concurrency=2)[1] == UPPER


@pytest.mark.parametrize("candidate", [Fault(body=answer("worse")), Fault(401, "its own keys")])
def test_the_answers_of_a_candidate_of_the_teacher_are_not_taken(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, candidate: Fault
) -> None:
    def script(number: int, question: str, body: dict[str, Any]) -> Fault:
        if fake.asked[question] == 1 or promoted:
            return candidate._replace(headers={"X-Slmops-Revision": "r2"})
        return Fault(body=answer(upper(question)), headers={"X-Slmops-Revision": "r1"})

    promoted = False
    with FakeTeacher(upper, script) as fake:
        endpoint = TeacherEndpoint(url=fake.url, model="big", name="ModelDeployment/t", revision="r1")
        outcome, texts = ask(pod(), fake.url, TEXTS, endpoint=endpoint)
        assert (texts, outcome.rejected, outcome.tokens) == (UPPER, {}, 7 * len(TEXTS))
        promoted = True
        monkeypatch.setenv(teacher.ENV_PATIENCE, "0.5")
        with pytest.raises(RunFailure, match=r"revision r2 of ModelDeployment/t answers, r1 is the teacher") as caught:
            ask(pod(), fake.url, ["another"], endpoint=endpoint)
    assert caught.value.reason == "TeacherUnavailable"  # the next Job learns from r2


@pytest.mark.parametrize(
    "fault",
    [
        Fault(401),
        Fault(404, "Cannot POST /v1/chat/completions?subscription-key=s3cret"),
        Fault(400, "Cannot POST /v1/chat/completions?subscription-key=s3cret"),
        Fault(503, '{"path": "/v1/chat/completions?subscription-key=s3cret"}'),
        Fault(429, "quota", {"Retry-After": "86400"}),
        Fault(302, "", {"Location": "https://u:s3cret@login/?s3cret"}),
    ],
)
def test_keys_in_a_url_are_never_told(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.2")
    with FakeTeacher(upper, lambda *_: fault) as fake:
        url = f"{fake.url.replace('//', '//u:s3cret@')}?subscription-key=s3cret"
        with pytest.raises(RunFailure) as caught:
            ask(pod(), url, TEXTS, min_success_ratio=1.0, concurrency=1)
    assert fake.url in caught.value.message
    assert "s3cret" not in caught.value.message + caplog.text


@pytest.mark.parametrize(
    ("query", "key"),
    [("?k=s3cret/s3cret==", None), ("?a=1&k=s3cret%2Fs3cret%3D%3D#x", None), ("?a=1", "s3cret/s3cret==")],
)
@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("bad key s3cret/s3cret==, try 8", "bad key ***, try 8"),
        ("bad key s3cret%2fs3cret%3d%3D", "bad key ***"),
        ("bad key s3cret&#x2F;s3cret&equals;&#61;", "bad key ***"),
        (r"bad key s3cret\/s3cret\u003d\u003D", "bad key ***"),
        ("POST /x?k=s3cret/s3cret==&amp;a=1", "POST /x?"),
        ("POST /x?a=1&amp;k=s3cret/s3cret==", "POST /x?"),
        (r"POST /x?a=1\u0026k=s3cret%2Fs3cret%3D%3D", "POST /x?"),
    ],
)
def test_a_key_is_masked_however_it_is_spelt(
    pod: Callable[[], Context], query: str, key: str | None, said: str, told: str
) -> None:
    with FakeTeacher(upper, lambda *_: Fault(404, said)) as fake, pytest.raises(RunFailure) as caught:
        ask(pod(), fake.url + query, TEXTS, key=key)
    assert told in caught.value.message
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://t:8443/a/v1", "https://t:8443/a/v1"),
        ("https://t/v1?key=k&api-version=1#k", "https://t/v1"),
        ("https://t/v1#k", "https://t/v1"),
        ("https://u:p@t/v1?mail=a@b", "https://t/v1"),
        ("https://u:p@p@t/v1", "https://t/v1"),
        ("https://t/@a/v1", "https://t/@a/v1"),
        ("https://u:p@t/@a/v1", "https://t/@a/v1"),
    ],
)
def test_a_url_is_shown_without_what_may_be_a_key(url: str, shown: str) -> None:
    assert teacher.shown(url) == shown


def test_a_password_that_ends_a_url_too_early_is_not_told(pod: Callable[[], Context]) -> None:
    with pytest.raises(RunFailure, match="without user and password") as caught:
        ask(pod(), "http://u:s3cret/s3cret@127.0.0.1/v1", TEXTS)
    assert caught.value.reason == "BadSpec"
    assert "s3cret" not in caught.value.message


def test_a_teacher_is_told_by_the_digest_of_its_model_and_without_one_by_its_revision() -> None:
    def key(revision: str, digest: str = "") -> str:
        lineage = [Ancestor(kind="model", uri="oci://r/m", digest=digest)] if digest else []
        return answers.teacher_key(TeacherEndpoint(url="http://t/v1", model="t", lineage=lineage, revision=revision))

    assert key("r1", "sha256:aa") == key("r2", "sha256:aa") != key("r1", "sha256:bb")
    assert len({key("r1"), key("r2"), key("")}) == 3
    assert key("") == '["http://t/v1", "t"]'  # that of earlier answers of an endpoint


def test_a_teacher_behind_a_ca_of_ones_own(pod: Callable[[], Context]) -> None:
    with FakeTeacher(upper, tls=TLS) as fake:
        endpoint = TeacherEndpoint(url=fake.url, model="big", secret="openai", key="token")
        with pytest.raises(RunFailure, match=r"not trusted here \(.+ca.crt into Secret openai") as caught:
            ask(pod(), fake.url, TEXTS, endpoint=endpoint)
        assert caught.value.reason == "AccessDenied"
        trust = trusted({"token": "s3cret", "ca.crt": (TLS / "ca.crt").read_text()})
        assert ask(pod(), fake.url, TEXTS, endpoint=endpoint, trust=trust)[1] == UPPER


@pytest.mark.parametrize("listed", ["['seed', 'top_p']", "{'seed': 12345, 'top_p': 0.9}"])
def test_a_gateway_that_names_all_it_does_not_support_is_asked_without(pod: Callable[[], Context], listed: str) -> None:
    said = f"litellm.UnsupportedParamsError: anthropic does not support parameters: {listed}, for model=claude. To drop"
    fault = Fault(400, json.dumps({"error": {"message": said, "code": "400"}}))
    with FakeTeacher(upper, lambda _, __, body: fault if "seed" in body else None) as fake:
        outcome, texts = ask(pod(), fake.url, TEXTS, min_success_ratio=1.0)
    assert (texts, outcome.rejected) == (UPPER, {})
    assert not {"seed", "top_p"} & set(fake.requests[-1])
    assert {"temperature", "max_tokens"} <= set(fake.requests[-1])


@pytest.mark.parametrize(("base", "query"), [("/openai/deployments/big", ""), ("/models", "?api-version=2024-10-21")])
def test_azure_takes_its_key_in_a_header_of_its_own_alone(pod: Callable[[], Context], base: str, query: str) -> None:
    with FakeTeacher(upper, base=base) as fake:
        assert ask(pod(), fake.url + query, TEXTS, key="s3cret")[1] == UPPER
        assert ask(pod(), fake.url + query, ["another"], key="eyJh.eyJz.c2ln")[1] == ["ANOTHER"]
    told = [(sent.get("api-key"), sent.get("authorization")) for sent in fake.sent]
    assert set(told[:-1]) == {("s3cret", None)}
    assert told[-1] == (None, "Bearer eyJh.eyJz.c2ln")  # of Entra ID


def test_what_is_in_flight_when_the_run_fails_is_kept(pod: Callable[[], Context], tmp_path: Path) -> None:
    four, refused = threading.Event(), threading.Event()

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        if number == 4:
            four.set()
            return Fault(402, "pay")
        four.wait(60)
        refused.wait(2)  # never set: they are answered after the verdict
        return None

    with FakeTeacher(upper, script) as fake:
        with pytest.raises(RunFailure, match="top it up"):
            ask(pod(), fake.url, TEXTS, concurrency=4)
        assert (len(fake.requests), saved(tmp_path)) == (4, 3)
