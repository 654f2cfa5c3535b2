"""The data plane, for real: HAProxy, HTTP servers that stream, clients that count what they lose."""

import http.client
import json
import time
from collections import Counter
from itertools import pairwise

import pytest
from router_world import Load, ask, eventually, routes

CLIENTS = 8


def shares(port, count):
    """How many of so many requests each revision answered, asked one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    return Counter(ask(port, connection=connection)[0] for _ in range(count))


def on(port, revision, names):
    """Which of these conversations the revision answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    return {name for name in names if ask(port, name, connection)[0] == revision}


def test_every_hundred_requests_are_split_exactly(pod, router, port):
    pod("a", chunks=0), pod("b", chunks=0)
    one = router(routes({"a": 90, "b": 10}, port))
    one.ready("a"), one.ready("b")
    for weight in (10, 1, 37, 50, 99, 100, 0):
        one.set(routes({"a": 100 - weight, "b": weight}, port, epoch=str(weight)))
        got = shares(one.port, 100)
        assert got["b"] == weight
        assert got["a"] == 100 - weight
        assert one.seen("b")["chosen"] == weight


def test_probes_preflights_and_lists_of_models_are_no_evidence_and_take_no_turns(pod, router, port):
    pod("a", chunks=0), pod("b", chunks=0)
    one = router(routes({"a": 50, "b": 50}, port, epoch="step"))
    one.ready("a"), one.ready("b")
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    got = Counter[str]()
    for _ in range(100):
        for method, path in (("GET", "/health"), ("OPTIONS", "/v1/chat/completions"), ("GET", "/v1/models")):
            connection.request(method, path, headers={"x-session-id": "of-b"} if path == "/v1/models" else {})
            answer = connection.getresponse()
            assert answer.headers["x-slmops-revision"] == "a"
            answer.read()
        got[ask(one.port, connection=connection)[0]] += 1
    assert got == {"a": 50, "b": 50}
    assert (one.get("/observed")[1]["turns"], one.seen("b")["requests"]) == (100, 50)


def test_turns_are_spread_evenly_and_do_not_come_in_blocks(pod, router, port):
    pod("a"), pod("b")
    one = router(routes({"a": 80, "b": 20}, port))
    one.ready("a"), one.ready("b")
    got = [ask(one.port)[0] for _ in range(100)]
    gaps = [i for i, revision in enumerate(got) if revision == "b"]
    assert max(b - a for a, b in pairwise(gaps)) <= 8  # 5 on average


def test_weights_change_under_streaming_load_and_nothing_is_lost(pod, router, port):
    for _ in range(2):
        pod("a"), pod("b")
    one = router(routes({"a": 100, "b": 0}, port))
    one.ready("a", 2), one.ready("b", 2)
    with Load(one.port, CLIENTS) as load:
        for weight in (10, 50, 25, 100, 0, 60):
            before = Counter(load.by_revision)
            one.set(routes({"a": 100 - weight, "b": weight}, port, epoch=str(weight)))
            load.more(300)
            seen = one.get("/observed")[1]
            # Exact, but for the clients that had been given their turn before the change.
            assert abs(seen["revisions"]["b"]["chosen"] - seen["turns"] * weight / 100) <= CLIENTS + 2
            assert sum((Counter(load.by_revision) - before).values()) >= 300
    assert load.lost == []


def test_revisions_come_and_go_under_load_and_nothing_is_lost(pod, router, port):
    pod("a")
    one = router(routes({"a": 100}, port))
    one.ready("a")
    with Load(one.port) as load:
        for name in ("b", "c", "d"):
            load.more(100)
            pod(name)
            one.set(routes({"a": 100, name: 0}, port))
            one.ready(name)
            one.set(routes({"a": 50, name: 50}, port))
            load.more(100)
            one.set(routes({"a": 100, name: 0}, port))
            load.more(50)
            one.set(routes({"a": 100}, port))
    assert load.lost == []
    assert {"a", "b", "c", "d"} <= set(load.by_revision)


def test_a_reload_keeps_the_counts_and_long_answers(pod, router, port):
    slow = pod("a", chunks=40, pause=0.05)
    one = router(routes({"a": 100}, port, epoch="one"))
    one.ready("a")
    slow.chunks = 1
    assert shares(one.port, 20)["a"] == 20
    slow.chunks = 40
    with Load(one.port, clients=4) as load:
        eventually(lambda: slow.answered >= 24, "long answers run")
        one.set(routes({"a": 100, "b": 0}, port, epoch="one"))
        assert one.seen("a")["requests"] >= 20
    assert load.lost == []


def test_a_killed_pod_costs_no_request(pod, router, port, dns):
    first, _ = pod("a"), pod("a")
    one = router(routes({"a": 100}, port))
    one.ready("a", 2)
    with Load(one.port) as load:
        load.more(100)
        first.kill()
        load.more(300)
        dns.records["a.test"].remove(first.host)
        load.more(100)
    assert load.lost == []


def test_the_only_pod_of_a_candidate_dies_and_the_stable_revision_takes_over(pod, router, port):
    pod("a")
    bad = pod("b")
    one = router(routes({"a": 50, "b": 50}, port))
    one.ready("a"), one.ready("b")
    with Load(one.port) as load:
        load.more(100)
        bad.kill()
        load.more(300)
        one.ready("b", 0)
        load.more(100)
    assert load.lost == []


def test_a_draining_pod_gets_no_new_requests_and_costs_none(pod, router, port):
    first, second = pod("a"), pod("a")
    one = router(routes({"a": 100}, port))
    one.ready("a", 2)
    with Load(one.port) as load:
        load.more(50)
        first.drain()
        down = 'haproxy_server_status{proxy="a",server="pod-%d",state="DOWN"} 1'
        eventually(lambda: any(down % n in one.servers() for n in (1, 2)), "the router knows")
        before = first.answered
        load.more(200)
        assert first.answered <= before + 8  # at most what was on its way
        first.kill()
        load.more(100)
    assert load.lost == []
    assert second.answered > 200


def test_a_candidate_that_answers_500_loses_nobodys_request_but_is_counted(pod, router, port):
    pod("a")
    pod("b", status=500)
    one = router(routes({"a": 50, "b": 50}, port, epoch="step"))
    one.ready("a"), one.ready("b")
    assert [ask(one.port) for _ in range(100)] == [("a", "ok")] * 100
    seen = one.seen("b")
    assert seen["responses"]["5xx"] == 50
    assert seen["chosen"] == 50
    assert one.seen("a")["responses"]["2xx"] == 100


def test_a_stable_revision_without_pods_is_replaced_by_the_candidate(pod, router, port):
    last, _ = pod("a"), pod("b")
    one = router(routes({"a": 80, "b": 20}, port, epoch="step"))
    one.ready("a"), one.ready("b")
    last.kill()
    eventually(lambda: 'haproxy_server_status{proxy="a",server="pod-1",state="DOWN"} 1' in one.servers(), "noticed")
    assert shares(one.port, 50) == {"b": 50}
    assert (one.get("/observed")[1]["turns"], one.seen("b")["chosen"]) == (0, 0)  # nothing is wrong with the split
    pod("a")
    one.ready("a")
    assert shares(one.port, 100) == {"a": 80, "b": 20}
    assert (one.get("/observed")[1]["turns"], one.seen("b")["chosen"], one.seen("b")["requests"]) == (100, 20, 70)


def test_what_the_stable_revision_cannot_answer_is_not_held_against_the_candidate(pod, router, port):
    pod("a", status=500)
    pod("b")
    one = router(routes({"a": 90, "b": 10}, port, epoch="step"))
    one.ready("a"), one.ready("b")
    got = [ask(one.port)[1] for _ in range(100)]
    assert sum(how.startswith("500") for how in got) == 90
    assert one.seen("b")["requests"] == 10


def test_a_conversation_stays_with_its_revision_while_the_weight_rises(pod, router, port):
    pod("a", chunks=0), pod("b", chunks=0)
    one = router(routes({"a": 90, "b": 10}, port))
    one.ready("a"), one.ready("b")
    names = [f"conversation-{n}" for n in range(150)]
    on_b: set[str] = set()
    for weight in (10, 30, 60, 100):
        one.set(routes({"a": 100 - weight, "b": weight}, port))
        now = on(one.port, "b", names)
        assert on_b <= now
        assert abs(len(now) / len(names) * 100 - weight) <= 15  # hashes of 150 fixed names
        on_b = now


def test_events_arrive_one_by_one(pod, router, port):
    pod("a", chunks=4, pause=0.3)
    one = router(routes({"a": 100}, port))
    one.ready("a")
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", "{}")
    answer = connection.getresponse()
    times = []
    while answer.readline().startswith(b"data: a"):
        times.append(time.monotonic())
        answer.readline()
    assert len(times) == 4
    assert all(later - earlier > 0.1 for earlier, later in pairwise(times))


def test_a_long_prompt_passes_whole(pod, router, port):
    server = pod("a", chunks=1)
    one = router(routes({"a": 100}, port))
    one.ready("a")
    prompt = json.dumps({"messages": [{"role": "user", "content": "x" * 1_000_000}]})
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", prompt)
    assert connection.getresponse().read().endswith(b"[DONE]\n\n")
    assert server.read == len(prompt)


def test_a_client_that_leaves_frees_its_model_server(pod, router, port):
    server = pod("a", chunks=200, pause=0.05)
    one = router(routes({"a": 100}, port))
    one.ready("a")
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", "{}")
    connection.getresponse().readline()
    connection.close()
    eventually(lambda: server.cut == 1, "the server notices", 5)


def test_without_a_ready_pod_the_error_is_openais_and_says_when_to_come_back(router, port):
    one = router(routes({"a": 100}, port))
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", "{}")
    answer = connection.getresponse()
    body = json.loads(answer.read())
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["content-type"] == "application/json"
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_the_inner_probe_is_not_for_clients(pod, router, port):
    pod("a")
    one = router(routes({"a": 100}, port))
    one.ready("a")
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    connection.request("GET", "/.slmops/ready")
    assert connection.getresponse().status == 404


def test_pods_are_followed_in_dns(pod, router, port, dns):
    pod("a")
    one = router(routes({"a": 100}, port))
    one.ready("a", 1)
    pod("a"), pod("a")
    one.ready("a", 3)
    dns.records["a.test"].pop()
    one.ready("a", 2)


def test_a_deaf_dns_loses_nothing(pod, router, port, dns):
    pod("a")
    one = router(routes({"a": 100}, port))
    one.ready("a")
    dns.close()
    with Load(one.port, clients=2) as load:
        end = time.monotonic() + 4
        eventually(lambda: time.monotonic() > end, "four polls of DNS")
    assert load.lost == []


def test_more_pods_than_places_makes_room(pod, router, port):
    for _ in range(3):
        pod("a")
    one = router(routes({"a": 100}, port, a=1))
    one.ready("a", 1)
    with Load(one.port) as load:
        one.set(routes({"a": 100}, port, a=4))
        one.ready("a", 3)
        load.more(50)
    assert load.lost == []


@pytest.mark.parametrize(
    ("status", "told", "tries"),
    [
        (504, {"x-should-retry": "false"}, 1),
        (503, {"x-slmops-deadline": "unreachable", "retry-after": "7"}, 3),  # first another pod is tried
    ],
)
@pytest.mark.parametrize("weight", [100, 0])
def test_a_refusal_for_the_clients_own_time_is_no_answer_and_no_error(pod, router, port, weight, status, told, tries):
    stable, candidate = pod("a", chunks=0), pod("b", chunks=0)
    one = router(routes({"a": 100 - weight, "b": weight}, port, fallback="a"))
    one.ready("a"), one.ready("b")
    asked, other, name = (candidate, stable, "b") if weight else (stable, candidate, "a")
    assert ask(one.port)[0] == name
    asked.status, asked.told = status, told
    for _ in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", "{}")
        answer = connection.getresponse()
        assert answer.status == status
        assert told.items() <= dict(answer.headers).items()
        connection.close()
    assert (asked.answered, other.answered) == (1 + 5 * tries, 0)  # nobody waits for another revision's answer
    seen = one.seen(name)
    assert (seen["requests"], seen["responses"]["5xx"], seen["responses"]["other"]) == (1, 0, 5)
    other.status, asked.told = 500, {}  # of a server that cannot say whose time it was
    ask(one.port)
    assert one.seen(name)["responses"]["5xx"] == 1


def test_a_client_that_leaves_before_the_answer_begins_is_no_answer_and_no_error(pod, router, port):
    pod("a", chunks=0)
    candidate = pod("b", status=400)
    one = router(routes({"a": 0, "b": 100}, port, fallback="a"))
    one.ready("a"), one.ready("b")
    assert ask(one.port)[1].startswith("400 ")  # the model server's own is an answer
    candidate.thought.clear()
    for number in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", "{}")
        eventually(lambda asked=number + 2: candidate.answered == asked, "the candidate has the request")
        connection.close()
    eventually(lambda: sum(one.seen("b")["responses"].values()) == 6, "all ends are counted")
    seen = one.seen("b")
    assert (seen["requests"], seen["responses"]["4xx"], seen["aborted"]) == (1, 1, 0)
    assert one.seen("a")["requests"] == 0


@pytest.mark.parametrize("size", [10, 100_000])  # the latter is too large to be sent again
def test_a_pod_that_dies_under_a_request_is_an_answer_of_502_and_an_error(pod, router, port, size):
    server = pod("a", chunks=0)
    one = router(routes({"a": 100}, port))
    one.ready("a")
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    assert ask(one.port, connection=connection) == ("a", "ok")  # from here on connections are kept
    server.dies = True
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": "x" * size}))
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (502, "bad_gateway")
    seen = one.seen("a")
    assert (seen["requests"], seen["responses"]["5xx"], seen["aborted"]) == (2, 1, 0)
