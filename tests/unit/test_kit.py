"""The kit of the scenarios and the demo: kubectl's failures, traffic that counts what is lost, pods."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kit import chart, earlier, kubectl, load, pods, watching
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


@pytest.mark.parametrize("current", [True, False])
def test_kubectl_has_no_flags_of_the_users_own(tmp_path: Path, current: bool) -> None:
    kube = Kubectl("shop", current=current)
    kube.program = program(tmp_path, 'echo "$KUBECTL_KUBERC"').program
    assert kube.run("delete", "pod", "web") == "false\n"


@pytest.fixture
def _somebody_types() -> Iterator[None]:
    """This process's own standard input has a line, as a terminal's."""
    before, (reads, writes) = os.dup(0), os.pipe()
    os.write(writes, b"yes\n")
    os.dup2(reads, 0)
    yield
    os.dup2(before, 0)
    for each in (before, reads, writes):
        os.close(each)


@pytest.mark.usefixtures("_somebody_types")
def test_kubectl_asks_nobody_at_the_terminal(tmp_path: Path) -> None:
    asks = program(tmp_path, 'read -r said; echo "heard: $said"')
    assert asks.run("delete", "pod", "web", timeout=10) == "heard: \n"
    assert asks.run("apply", "-f", "-", stdin="this\n", timeout=10) == "heard: this\n"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, "|"),
        ({"no_proxy": "mine"}, "|mine"),
        ({"https_proxy": "http://proxy.test"}, f",{kubectl.NEAR}|,{kubectl.NEAR}"),
        ({"HTTP_PROXY": "http://proxy.test", "no_proxy": "mine"}, f"mine,{kubectl.NEAR}|mine,{kubectl.NEAR}"),
    ],
)
def test_a_shell_behind_a_proxy_is_told_to_pass_it_by(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], found: str
) -> None:
    for name in (*kubectl.PROXIES, "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kubectl, "CURRENT", False)
    script = f'set -e\n{kubectl.shell()}echo "$NO_PROXY|$no_proxy"'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=10).stdout == f"{found}\n"


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


class Pod(Kubectl):
    """A pod whose phases come one after the other, one for each look; None: no answer. Its log is `lines`."""

    def __init__(self, phases: list[str | None], lines: list[str]) -> None:
        super().__init__("shop", current=True)
        self.phases, self.lines = phases, lines

    def run(self, *args: str, stdin: str | None = None, timeout: float = 60.0) -> str:
        if args[0] == "logs":
            return "\n".join(self.lines)
        if args[0] == "exec":
            raise KubectlError("command terminated with exit code 137")
        phase = self.phases.pop(0) if len(self.phases) > 1 else self.phases[0]
        if phase is None:
            raise KubectlError("connection refused")
        return json.dumps({"status": {"phase": phase}}) if phase else ""


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pods, "wait_for", lambda what, probe, timeout: wait_for(what, probe, timeout, every=0.001))


@pytest.mark.usefixtures("_fast")
def test_a_pod_is_waited_for_through_questions_that_nobody_answers() -> None:
    assert pods.finish(Pod([None, "Running", None, "Succeeded"], ["a", "b"]), "seed", 10) == ["a", "b"]


@pytest.mark.usefixtures("_fast")
def test_a_pod_that_nobody_can_ask_about_is_given_up_in_time() -> None:
    with pytest.raises(TimedOut, match="pod/seed ends"):
        pods.finish(Pod([None], []), "seed", 0.05)


@pytest.mark.usefixtures("_fast")
def test_a_pod_that_somebody_removes_is_not_waited_for() -> None:
    with pytest.raises(TimedOut, match="pod/seed was removed"):
        pods.finish(Pod(["", "Running", None, ""], []), "seed", 60)


@pytest.mark.usefixtures("_fast")
def test_a_pod_that_takes_long_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pods, "TELL_SECONDS", 0)
    heard = list[str]()
    pods.finish(Pod(["Running", "Running", "Succeeded"], ["round 3"]), "bench", 10, tell=heard.append)
    assert "pod/bench Running: round 3" in heard


@pytest.mark.usefixtures("_fast")
def test_traffic_that_ends_before_its_end_is_confirmed_is_counted() -> None:
    line = Tally(sent=5, lost=0, reasons=[], latencies=[0.1]).line(final=True)
    assert load.Load(Pod(["Succeeded"], [line])).stop().sent == 5


def test_what_earlier_runs_left_is_told_from_the_users_own() -> None:
    names = ["default", "slmops-system", "slmops-image-tests", "slmops-demo", "e2e-chain", "bench-bare-1"]
    assert earlier.left(names) == ["slmops-demo", "e2e-chain", "bench-bare-1"]
    assert earlier.left(names, "slmops-demo") == ["e2e-chain", "bench-bare-1"]


class Node(Kubectl):
    """The local node by its namespaces; `done` is what was asked of it, whatever the namespace."""

    def __init__(self, names: list[str], done: list[str], namespace: str = "default") -> None:
        super().__init__(namespace, current=True)
        self.names, self.done = names, done

    def within(self, namespace: str) -> "Node":
        return Node(self.names, self.done, namespace)

    def run(self, *args: str, stdin: str | None = None, timeout: float = 60.0) -> str:
        if args[0] == "get" and "--ignore-not-found" in args:
            return ""
        if args[0] == "get":
            return json.dumps({"items": [{"metadata": {"name": name}} for name in self.names]})
        self.done.append(" ".join([self.namespace, *args]))
        return ""


@pytest.mark.parametrize("names", [["default"], ["default", "e2e-x", "slmops-demo"]])
def test_pods_of_earlier_runs_end_and_a_namespace_that_is_needed_stays(names: list[str]) -> None:
    done = list[str]()
    assert earlier.remove(Node(names, done)) == names[1:]
    pods_only = ["slmops-image-tests delete pods --all --wait=false"]
    gone = ["default delete namespace e2e-x slmops-demo --ignore-not-found --wait=false"] if names[1:] else []
    assert done == gone + pods_only


def test_pods_end_before_their_namespace_goes() -> None:
    """Or the namespace waits for half of the time that pods may take to end, and not for the pods."""
    done = list[str]()
    chart.fresh_namespace(Node([], done, "e2e-x"))
    deleted = [line.split()[2] for line in done if " delete " in line]
    assert deleted == ["slm", "deployments,jobs,pods", "namespace"]
