"""The agent: who may set routes, what it refuses, and what a restart keeps."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from router_world import ROOT, TOKEN, ask, eventually, routes

from slmops_router.main import newest
from slmops_router.routes import BadRoutesError, Routes


@contextlib.contextmanager
def held(port, count, said):
    """So many connections that say no more than this."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in connections:
            one.settimeout(1)
            with contextlib.suppress(OSError):  # refused or ended already
                one.connect(("127.0.0.1", port))
                one.send(said)
        yield connections


def test_only_the_bearer_of_the_token_sets_or_reads_routes(router, port):
    one = router(routes({"a": 100}, port))
    for token in (None, "", "wrong", "é"):
        headers = {"authorization": f"Bearer {token}".encode()} if token is not None else {}
        for method, path in (("PUT", "/routes"), ("GET", "/observed")):
            connection = http.client.HTTPConnection("127.0.0.1", one.agent_port, timeout=5)
            connection.request(method, path, json.dumps(routes({"b": 100}, port)), headers)
            assert connection.getresponse().status == 401
    assert one.get("/observed")[1]["routes"]["revisions"][0]["revision"] == "a"


def test_the_kubelet_needs_no_token(router, port):
    one = router()
    assert one.call("GET", "/livez", token=None)[0] == 200
    assert one.call("GET", "/readyz", token=None)[0] == 200


@pytest.mark.parametrize("said", [b"", b"GET /l", b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_whoever_holds_connections_keeps_neither_the_kubelet_nor_the_operator_away(router, port, said):
    one = router(routes({"a": 100}, port), reach=0)
    kept = http.client.HTTPConnection("127.0.0.1", one.agent_port, timeout=5)

    def observed():
        kept.request("GET", "/observed", headers={"authorization": f"Bearer {TOKEN}"})
        return kept.getresponse().read()

    assert observed()
    _, most = resource.prlimit(one.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(one.process.pid, resource.RLIMIT_NOFILE, (128, most))
    with held(one.agent_port, 200, said):
        assert one.call("GET", "/livez", token=None)[0] == 200
        assert one.call("GET", "/readyz", token=None)[0] == 200
        assert one.set(routes({"b": 100}, port))
        assert observed()  # who has shown the token stays
    assert "Traceback" not in (one.folder / "router.log").read_text()


def test_a_large_head_is_not_kept_in_memory(router, port):
    one = router()
    connection = http.client.HTTPConnection("127.0.0.1", one.agent_port, timeout=5)

    def ask(headers):
        connection.request("GET", "/livez", headers=headers)
        return connection.getresponse().read()

    with pytest.raises(ConnectionError):
        ask({f"x-{number}": "y" * 60_000 for number in range(50)})
    connection.close()
    for _ in range(8):  # over one connection, each with a head of its own
        assert ask({"x": "y" * 4000})
        assert connection.sock is not None


def test_bad_routes_are_refused_in_words_and_change_nothing(router, port):
    one = router(routes({"a": 100}, port))
    good = one.get("/observed")[1]["routes"]
    cases = [
        ({"revisions": [{"revision": "x", "host": "x", "weight": 7}]}, "add up to 100"),
        ({"revisions": [{"revision": "x\n    stats socket /tmp/y", "host": "x", "weight": 100}]}, "DNS label"),
        ({"revisions": [{"revision": "x", "host": "x; rm", "weight": 100}]}, "DNS name"),
        ({"revisions": [{"revision": "x", "host": "x", "weight": True}]}, "whole number"),
        ({"revisions": [{"revision": "x", "host": "x", "weight": 100}], "fallback": "y"}, "fallback"),
        ({"revisions": [{"revision": "x", "host": "x", "weight": 50}] * 2}, "each once"),
        ([], "object"),
    ]
    for body, words in cases:
        status, said = one.call("PUT", "/routes", body)
        assert status == 400, body
        assert words in said["error"]
    assert one.call("PUT", "/routes", {"pad": "x" * 70_000})[0] == 413
    assert one.get("/observed")[1]["routes"] == good


def test_a_restarted_container_goes_on_with_the_last_weights(pod, router, port):
    pod("a"), pod("b")
    one = router(routes({"a": 100, "b": 0}, port))
    one.ready("a"), one.ready("b")
    one.set(routes({"a": 30, "b": 70}, port))
    one.end()
    one.start()
    one.ready("a"), one.ready("b")
    assert sum(ask(one.port)[0] == "b" for _ in range(100)) == 70


def test_a_restarted_container_prefers_what_its_config_map_has_learned_since(pod, router, port):
    pod("b", chunks=1)
    one = router(routes({"a": 0}, port), reach=30)
    one.set(routes({"b": 100}, port))
    one.ready("b")
    one.end()
    pod("c", chunks=1)  # while it is away, c takes the place of b
    (one.folder / "routes.json").write_text(json.dumps(routes({"c": 100}, port)))
    one.start()
    assert ask(one.port) == ("c", "ok")


def test_the_newer_routes_are_those_that_were_written_later(tmp_path):
    """A mounted file is a link to a link, as the kubelet makes them; only the content's time counts."""
    saved, mounted, content = tmp_path / "saved", tmp_path / "routes.json", tmp_path / "..1" / "routes.json"
    assert newest(saved, mounted) == Routes()
    content.parent.mkdir()
    (tmp_path / "..data").symlink_to("..1")
    mounted.symlink_to("..data/routes.json")
    for file, name in ((saved, "s"), (content, "m")):
        file.write_text(json.dumps(routes({name: 100}, 8000)))

    def first(saved_at, mounted_at):
        os.utime(saved, (saved_at, saved_at))
        os.utime(content, (mounted_at, mounted_at))
        return newest(saved, mounted).revisions[0].revision

    assert first(saved_at=2000, mounted_at=1000) == "s"
    assert first(saved_at=1000, mounted_at=2000) == "m"
    content.write_text("{")
    assert first(saved_at=1000, mounted_at=2000) == "s"  # what cannot be read is no news
    saved.write_text("{")
    with pytest.raises(BadRoutesError, match="JSON"):
        newest(saved, mounted)


def test_a_new_pod_starts_with_the_weights_of_its_config_map(pod, router, port):
    pod("a"), pod("b")
    one = router(routes({"a": 60, "b": 40}, port, epoch="mounted"))
    one.ready("a"), one.ready("b")
    assert one.get("/observed")[1]["epoch"] == "mounted"
    assert sum(ask(one.port)[0] == "b" for _ in range(100)) == 40


def test_counts_begin_again_with_each_epoch(pod, router, port):
    pod("a")
    one = router(routes({"a": 100}, port, epoch="one"))
    one.ready("a")
    for _ in range(7):
        ask(one.port)
    assert one.seen("a")["requests"] == 7
    one.set(routes({"a": 100}, port, epoch="one"))
    assert one.seen("a")["requests"] == 7
    one.set(routes({"a": 100}, port, epoch="two"))
    assert one.seen("a")["requests"] == 0
    ask(one.port)
    seen = one.seen("a")
    assert (seen["requests"], seen["responses"]["2xx"], seen["chosen"]) == (1, 1, 1)


def test_prometheus_sees_every_revision_from_the_start(pod, router, port):
    pod("a")
    one = router(routes({"a": 100, "b": 0}, port))
    one.ready("a")
    ask(one.port)
    text = one.metrics()
    assert 'haproxy_backend_http_responses_total{proxy="a",code="2xx"} 1' in text
    assert 'haproxy_backend_http_responses_total{proxy="b",code="5xx"} 0' in text
    assert 'haproxy_backend_server_aborts_total{proxy="a"} 0' in text


def test_whoever_says_nothing_keeps_no_prometheus_away(router, port):
    """Without one, a rollout is neither promoted nor rolled back."""
    one = router()
    scrape = http.client.HTTPConnection("127.0.0.1", one.metrics_port, timeout=5, source_address=("127.0.0.9", 0))
    with held(one.metrics_port, 100, b"GET /m") as connections:
        scrape.request("GET", "/metrics")
        assert b"haproxy_process" in scrape.getresponse().read()
        for silent in connections:
            silent.settimeout(5)
            with contextlib.suppress(ConnectionError):
                while silent.recv(4096):
                    pass
        assert "haproxy_process" in one.metrics()  # and so it is for the same address after a while


def test_places_without_a_pod_cost_prometheus_nothing(pod, router, port):
    def scraped() -> set[str]:
        return {line.rpartition(" ")[0] for line in one.metrics().splitlines() if not line.startswith("#")}

    pod("a")
    one = router(routes({"a": 100}, port, a=8))
    one.ready("a")
    few = scraped()
    one.set(routes({"a": 100}, port, a=64))
    eventually(lambda: 'haproxy_server_status{proxy="a",server="pod-64",state="MAINT"} 1' in one.servers(), "64 places")
    one.ready("a")
    assert scraped() == few
    assert {name.partition("_")[2].partition("_")[0] for name in few} == {"process", "frontend", "backend"}


def test_a_dead_haproxy_ends_the_container(router, port):
    one = router(routes({"a": 100}, port))
    pid = one.process.pid
    master = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    os.kill(master, signal.SIGKILL)
    assert one.process.wait(20) == 1


def test_without_a_token_it_does_not_start(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "slmops_router"],
        env={"PYTHONPATH": str(ROOT / "images/router")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "SLMOPS_ROUTER_TOKEN" in done.stderr
