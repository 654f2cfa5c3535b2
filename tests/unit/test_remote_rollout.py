"""The two HTTP edges of a rollout: Prometheus, and a router's agent."""

from datetime import UTC, datetime

import httpx
import pytest

from slmops.remote import prometheus, router
from slmops.remote.errors import RemoteError
from slmops.remote.prometheus import Inconclusive, NoData, Unreachable, Value
from slmops.settings import Settings

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


def asked(answer, seen=None):
    """One query; `answer` is what Prometheus does."""

    def handle(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    with httpx.Client(transport=httpx.MockTransport(handle)) as client:
        return prometheus.query("http://p:9090/", "up", NOW, client=client)


def vector(*values):
    result = [{"metric": {"pod": str(n)}, "value": [1, value]} for n, value in enumerate(values)]
    return {"status": "success", "data": {"resultType": "vector", "result": result}}


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (vector("0.25"), Value, ""),
        ({"status": "success", "data": {"resultType": "scalar", "result": [1, "0.25"]}}, Value, ""),
        (vector(), NoData, "no series"),
        (vector("NaN"), NoData, "NaN"),
        (vector("+Inf"), NoData, "Inf"),
        (vector("-Inf"), NoData, "Inf"),
        (vector("1", "2"), Inconclusive, "2 series"),
        (vector("many"), Inconclusive, "not a number"),
        ({"status": "success", "data": [1]}, Inconclusive, "not one number"),
        ({"status": "success"}, Inconclusive, "not one number"),
        ({"status": "success", "data": {"resultType": "matrix", "result": []}}, Inconclusive, "matrix"),
        ({"status": "success", "data": {"resultType": "string", "result": [1, "x"]}}, Inconclusive, "string"),
        (
            {"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "histogram": [1, {}]}]}},
            Inconclusive,
            "histogram",
        ),
        ({"status": "success", "data": {"resultType": "scalar", "result": "x"}}, Inconclusive, "not a number"),
        (httpx.Response(400, json={"status": "error", "error": "parse error at char 3"}), Inconclusive, "char 3"),
        (httpx.Response(422, json={"status": "error", "error": "many-to-many"}), Inconclusive, "many-to-many"),
        (httpx.Response(503, json={"status": "error", "error": "query timed out"}), Unreachable, "503"),
        (httpx.Response(502, text="<html>bad gateway</html>"), Unreachable, "no usable answer"),
        (httpx.Response(401, json={"status": "error"}), Unreachable, "401"),
        (httpx.Response(200, text="[]"), Unreachable, "200"),
        (httpx.ConnectError("refused"), Unreachable, "refused"),
        (httpx.ReadTimeout("slow"), Unreachable, "slow"),
        (httpx.Response(200, text="x" * 1_000_001), Inconclusive, "more than 1000000 bytes"),
    ],
)
def test_answers_of_prometheus_are_told_apart(answer, kind, words):
    said = asked(answer)
    assert isinstance(said, kind), said
    assert words in getattr(said, "message", "")


def test_a_query_is_a_form_at_a_moment():
    seen: list[httpx.Request] = []
    assert asked(vector("1"), seen) == Value(1.0)
    assert str(seen[0].url) == "http://p:9090/api/v1/query"
    sent = dict(httpx.QueryParams(seen[0].content.decode()))
    assert sent == {"query": "up", "time": str(NOW.timestamp())}


def test_a_wrong_url_is_unreachable():
    assert isinstance(prometheus.query("http://[", "up", NOW), Unreachable)
    assert isinstance(prometheus.query("", "up", NOW), Unreachable)


def agent(answer):
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer t"
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.Client(transport=httpx.MockTransport(handle))


def test_an_agents_report_is_read():
    said = {
        "routes": {"fallback": "a"}, "epoch": "e", "turns": 7,
        "revisions": {"a": {"weight": 90, "ready": 2, "requests": 5, "chosen": 4, "responses": {"2xx": 5}}},
    }  # fmt: skip
    report = router.observe("http://10.0.0.1:9091", "t", client=agent(httpx.Response(200, json=said)))
    assert (report.epoch, report.turns, report.routes) == ("e", 7, {"fallback": "a"})
    assert (report.revisions["a"].weight, report.revisions["a"].ready) == (90, 2)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(401, json={"error": "Wrong token."}),
        httpx.Response(503, json={"error": "HAProxy did not take the configuration"}),
        httpx.Response(200, text="nonsense"),
        httpx.Response(200, json={"revisions": {"a": {"weight": "heavy"}}}),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
    ],
)
def test_what_an_agent_cannot_do_is_one_kind_of_error_without_the_token(answer):
    with pytest.raises(RemoteError) as caught:
        router.push("http://10.0.0.1:9091", "t", {}, client=agent(answer))
    assert "10.0.0.1" in str(caught.value)
    assert "Bearer" not in str(caught.value)


def test_tokens_differ_by_object_and_key():
    tokens = {router.token(key, uid) for key in ("k1", "k2") for uid in ("u1", "u2")}
    assert len(tokens) == 4
    assert all(len(token) == 64 for token in tokens)
    assert callable(router.pusher(Settings()))


def test_addresses_of_both_families():
    assert router.agent_url("10.0.0.1") == "http://10.0.0.1:9091"
    assert router.agent_url("fd00::1") == "http://[fd00::1]:9091"


def unanswered(observe, now, url="http://10.0.0.1:9091"):
    with pytest.raises(RemoteError, match=url):
        observe(url, "t", clock=lambda: now)


def silent(error):
    """A client to whom every agent does this, and what was asked of it."""
    calls = []

    def handle(request: httpx.Request) -> httpx.Response:
        calls.append(str(request.url))
        raise error

    return httpx.Client(transport=httpx.MockTransport(handle)), calls


def test_an_agent_that_takes_no_connection_is_left_alone_for_a_while():
    """Each of these waits takes a worker: behind a NetworkPolicy a few of them would take all there are."""
    client, calls = silent(httpx.ConnectTimeout("silence"))
    observe = router.Observer(client=client)
    for second in range(0, 20, 2):
        unanswered(observe, second)
    assert len(calls) == 2  # the first may be a lost packet
    unanswered(observe, 20, "http://10.0.0.2:9091")
    assert len(calls) == 3
    for second in range(3, 20, 2):
        unanswered(observe, router.CUT_OFF_SECONDS + second)
    assert len(calls) == 4


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
def test_an_agent_that_is_not_up_or_slow_is_asked_each_time(error):
    client, calls = silent(error)
    observe = router.Observer(client=client)
    for _ in range(3):
        unanswered(observe, 0)
    assert len(calls) == 3
