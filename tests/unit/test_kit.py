"""The kit of the scenarios and the demo: kubectl's failures, traffic that counts what is lost, pods."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kit import load, pods, watching
from kit.bench import gaps
from kit.kubectl import Kubectl, KubectlError, TimedOut, wait_for
from kit.traffic import Tally, Traffic


def program(folder: Path, script: str) -> Kubectl:
    """kubectl that is a shell script."""
    file = folder / "kubectl"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    kube = Kubectl("shop", current=True)
    kube.program = str(file)
    return kube


def test_a_refusal_names_the_command_and_has_kubectls_words(tmp_path: Path) -> None:
    with pytest.raises(KubectlError, match="kubectl -n shop get pod web: Forbidden: not you"):
        program(tmp_path, "echo 'Forbidden: not you' >&2; exit 1").run("get", "pod", "web")


def test_the_client_librarys_log_is_not_repeated(tmp_path: Path) -> None:
    noise = "echo 'E1128 04:16:25.742111    7197 memcache.go:265] \"Unhandled Error\"' >&2; echo 'refused' >&2; exit 1"
    with pytest.raises(KubectlError, match=r"kubectl -n shop get pods: refused$"):
        program(tmp_path, noise).run("get", "pods")


def test_a_kubectl_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    with pytest.raises(KubectlError, match="kubectl -n shop get pods: no answer within 0 s dialling"):
        program(tmp_path, "echo dialling >&2; exec sleep 60").run("get", "pods", timeout=0.3)


def test_a_missing_kubectl_is_named() -> None:
    kube = Kubectl("shop", current=True)
    kube.program = "/no/such/kubectl"
    with pytest.raises(KubectlError, match="there is no program /no/such/kubectl"):
        kube.run("version")


def test_port_forward_survives_more_output_than_a_pipe_holds(tmp_path: Path) -> None:
    noisy = "echo 'Forwarding from 127.0.0.1:40123 -> 8000'\nyes Handling | head -c 200000; echo; touch done; sleep 60"
    kube = program(tmp_path, f"cd {tmp_path}\n{noisy}")
    with kube.port_forward("service/web", 8000) as url:
        assert url == "http://127.0.0.1:40123"
        wait_for("all is written", (tmp_path / "done").exists, 10)


def test_port_forward_that_ends_says_why(tmp_path: Path) -> None:
    kube = program(tmp_path, "echo 'error: services \"web\" not found' >&2; exit 1")
    with pytest.raises(KubectlError, match="service/web ended with 1: error: services"):
        kube.port_forward("service/web", 8000).__enter__()


def test_what_fails_inside_a_port_forward_is_not_taken_for_its_failure(tmp_path: Path) -> None:
    kube = program(tmp_path, "echo 'Forwarding from 127.0.0.1:40123 -> 8000'; exec sleep 60")
    with pytest.raises(TimedOut, match="mine"), kube.port_forward("service/web", 8000):
        raise TimedOut("mine")


ANSWER = json.dumps({"choices": [{"finish_reason": "stop"}]}).encode()
Reply = Callable[[bool, int], tuple[int, bytes] | None]


class World:
    """A chat endpoint that replies by script: (streaming, number of the request) -> (status, body); None cuts."""

    def __init__(self, reply: Reply) -> None:
        world = self
        self.connections = self.requests = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                world.connections += 1
                super().setup()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                world.requests += 1
                found = reply(body["stream"], world.requests)
                if found is None:
                    self.close_connection = True
                    return
                self.send_response(found[0])
                self.send_header("Content-Length", str(len(found[1])))
                self.end_headers()
                self.wfile.write(found[1])

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def world() -> Iterator[Callable[[Reply], World]]:
    made: list[World] = []

    def make(reply: Reply) -> World:
        made.append(World(reply))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


def good(stream: bool, _number: int) -> tuple[int, bytes]:
    return 200, b"data: {}\n\ndata: [DONE]\n\n" if stream else ANSWER


def ask(found: World, requests: int = 6) -> Tally:
    with Traffic(found.url, "m", ["a", "b"], clients=1) as traffic:
        wait_for("requests", lambda: traffic.tally.sent >= requests, 20, every=0.01)
    return traffic.tally


def test_clients_keep_their_connection_and_lose_nothing(world: Callable[[Reply], World]) -> None:
    found = world(good)
    tally = ask(found)
    assert (tally.lost, found.connections) == (0, 1)
    assert tally.sent == found.requests


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ((503, b"busy"), "status 503"),
        ((204, b""), "status 204"),
        ((200, b"half"), "not an answer|stream cut"),
        ((200, b'{"choices": [{"finish_reason": null}]}'), "no finish_reason|stream cut"),
        (None, "RemoteDisconnected"),
    ],
)
def test_each_kind_of_loss_is_counted_once_and_asked_once(
    world: Callable[[Reply], World], bad: tuple[int, bytes] | None, why: str
) -> None:
    found = world(lambda stream, number: bad if number in (3, 4) else good(stream, number))
    tally = ask(found)
    assert tally.lost == 2
    assert tally.sent == found.requests
    assert all(re.search(why, reason) for reason in tally.reasons), tally.reasons


def test_nobody_listens_is_a_loss() -> None:
    with Traffic("http://127.0.0.1:1/v1", "m", ["a"], clients=1) as traffic:
        wait_for("a request", lambda: traffic.tally.sent, 20, every=0.01)
    assert traffic.tally.lost == traffic.tally.sent


def test_the_count_survives_the_way_through_the_log() -> None:
    line = Tally(sent=5, lost=1, reasons=["x"], latencies=[0.1, 0.2, 0.3]).line(final=True)
    assert load.parse(["noise", line, ""]) == load.Count(5, 1, 200.0, ("x",), final=True)
    assert load.parse(["noise"]) == load.Count()


def test_pods_meet_restricted() -> None:
    made = pods.spec("image", ["true"], mounts={"/data": {"emptyDir": {}}})
    container = made["containers"][0]
    assert made["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/data"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in made["volumes"]}


def test_a_watch_is_cut_into_objects() -> None:
    lines = ["{\n", '    "a": {\n', "    }\n", "}\n", "{\n", '    "b": 1\n', "}\n", "{\n"]
    assert list(watching.objects(iter(lines))) == [{"a": {}}, {"b": 1}]


def test_gaps_are_measured_between_the_first_events_that_tell() -> None:
    def pod(owner: str, phase: str) -> dict[str, object]:
        return {"metadata": {"labels": {"slmops.dev/owner": owner}}, "status": {"phase": phase}}

    told = [("a", "Pending"), ("a", "Succeeded"), ("a", "Succeeded"), ("b", "Pending"), ("b", "Succeeded")]
    events = [(float(at), pod(*each)) for at, each in enumerate([*told, ("c", "Pending"), ("c", "Running")])]
    assert gaps(events) == [2.0, 1.0]
