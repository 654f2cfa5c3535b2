"""Leaving clients, a full queue, a killed engine, SIGTERM under load, models that cannot be served."""

import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from server_harness import Server, free_ports, wait_for

Start = Callable[..., Server]
LONG = {"prompt": [40, 41], "max_tokens": 500, "ignore_eos": True}


def raw_request(server: Server, **fields: object) -> socket.socket:
    """A request on a socket of one's own, to leave whenever one likes."""
    body = json.dumps({"model": "tiny", "temperature": 0, **fields}).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def test_clients_that_leave_are_forgotten_and_harm_nobody(start: Start) -> None:
    server = start("--slots", "2", "--max-queue", "100")
    expected = server.complete(**LONG).json()["choices"][0]["text"]
    draw = random.Random(3)
    leaving = []
    for number in range(60):
        sock = raw_request(server, **LONG, stream=number % 2 == 0)
        if draw.random() < 0.5:
            sock.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                sock.recv(draw.choice([1, 100, 5000]))
        leaving.append(sock)
        if draw.random() < 0.5:
            leaving.pop(draw.randrange(len(leaving))).close()
    while leaving:
        leaving.pop().close()
    wait_for(lambda: server.idle, "nothing runs for clients that left")
    assert server.complete(**LONG).json()["choices"][0]["text"] == expected
    assert server.metric("vllm:request_success_total", finished_reason="abort") > 0
    assert server.metric("gen_ai_server_request_duration_seconds_count", error_type="client_left") > 0
    assert server.metric("slmops_engine_restarts_total") == 0
    assert "Traceback" not in server.log.read_text()


def test_sigterm_is_heard_before_the_server_has_begun(start: Start) -> None:
    server = start(ready=False)
    status = Path(f"/proc/{server.process.pid}/status")

    def caught() -> bool:  # a handler stands: process 1 of a container is told by one only
        line = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    wait_for(caught, "SIGTERM has a handler")
    server.terminate()
    assert server.process.wait(30) == 0
    assert "Started" not in server.log.read_text()  # so it did not wait for the one that drains


def test_a_full_queue_says_come_again(start: Start) -> None:
    server = start("--slots", "1", "--max-queue", "2")
    os.kill(server.engine_pid or 0, signal.SIGSTOP)  # so that nothing ends meanwhile
    held = [raw_request(server, **LONG, stream=True) for _ in range(3)]
    try:
        wait_for(lambda: server.metric("vllm:num_requests_waiting") == 2, "the queue is full")
        answer = server.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    finally:
        os.kill(server.engine_pid or 0, signal.SIGCONT)
    for sock in held:
        assert read_all(sock).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def read_all(sock: socket.socket) -> bytes:
    """Until the end of the chunked response, or of the connection."""
    data = b""
    with sock:
        while not data.endswith(b"0\r\n\r\n"):
            part = sock.recv(1 << 16)
            if not part:
                break
            data += part
    return data


def test_a_killed_engine_is_reported_and_started_again(start: Start) -> None:
    server = start("--slots", "2")
    before = server.complete().json()["choices"][0]["text"]
    old = server.engine_pid
    assert old
    os.kill(old, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.complete)
        wait_for(lambda: server.metric("vllm:num_requests_running") == 1, "a request is with the engine")
        os.kill(old, signal.SIGKILL)
        answer = whole.result(30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_restarted")
    wait_for(lambda: server.probe("readyz") == 200, "ready again")
    assert server.engine_pid not in (None, old)
    assert (server.probe("livez"), server.probe("startupz")) == (200, 200)
    assert server.metric("slmops_engine_restarts_total") == 1
    assert server.complete().json()["choices"][0]["text"] == before


@pytest.mark.usefixtures("many_files")
def test_an_engine_comes_back_beside_many_connections(start: Start) -> None:
    """What is opened then has numbers above 1023, which select does not take."""
    server = start("--slots", "1")
    with contextlib.ExitStack() as held:
        for _ in range(1100):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
        wait_for(lambda: server.open_files > 1100, "all are connected")
        old = server.engine_pid
        assert old
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: server.engine_pid not in (None, old) and server.probe("readyz") == 200, "ready again")
        assert server.complete().status_code == 200
        assert server.metric("slmops_engine_restarts_total") == 1


def test_a_stream_that_loses_its_engine_ends_with_an_error_frame(start: Start) -> None:
    server = start("--slots", "1")
    body = {"model": "tiny", **LONG, "stream": True, "n": 8}  # one after the other: longer than the signal takes
    assert 'slmops_streams_cut_total{model_name="tiny"} 0.0' in server.http.get("/metrics").text  # a rate begins there
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        os.kill(server.engine_pid or 0, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1][6:])["error"]["code"] == "engine_restarted"
    assert server.metric("slmops_streams_cut_total") == 1
    ended = {"error_type": "engine_restarted", "gen_ai_request_model": "tiny"}
    assert server.metric("gen_ai_server_request_duration_seconds_count", **ended) == 1
    assert server.metric("gen_ai_server_request_duration_seconds_count") == 1
    assert server.metric("slmops_http_requests_total", code="200") == 1  # which is all that a router sees
    wait_for(lambda: server.probe("readyz") == 200, "ready again")


def test_not_ready_while_there_is_no_engine(start: Start) -> None:
    server = start(ready=False)
    seen, refused = set(), set()

    def ready() -> bool:
        answer = server.http.get("/readyz")
        seen.add((answer.status_code, answer.json()["phase"] == "ready"))
        if answer.status_code == 503:
            early = server.complete()
            if early.status_code != 200:  # the engine may be there by now
                refused.add((early.status_code, early.json()["error"]["code"]))
        return answer.status_code == 200

    wait_for(ready, "ready")
    assert seen == {(503, False), (200, True)}
    assert refused == {(503, "not_ready")}


def takes_nobody(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
    except OSError:
        return True
    return False


def test_sigterm_under_load_loses_nothing(start: Start) -> None:
    server = start("--slots", "2", "--max-queue", "200", "--drain-grace", "1")
    expected = server.complete(**LONG).json()["choices"][0]["text"]
    results: list[str] = []
    refused = threading.Event()

    def work(number: int) -> None:
        body = {"model": "tiny", "temperature": 0, **LONG, "stream": number % 2 == 0}
        while not refused.is_set():
            begun = False
            try:
                with (
                    httpx.Client(base_url=server.url, timeout=60) as http,
                    http.stream("POST", "/v1/completions", json=body) as answer,
                ):
                    begun = True
                    answer.read()
            except httpx.ConnectError:
                refused.set()
                return
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                if begun or not takes_nobody(server):
                    raise
                refused.set()  # it waited to be accepted when the door was closed
                return
            assert answer.status_code == 200
            if number % 2:
                results.append(answer.json()["choices"][0]["text"])
            else:
                assert answer.text.endswith("data: [DONE]\n\n")
                frames = [f[6:] for f in answer.text.split("\n\n") if f.startswith("data: {")]
                results.append("".join(json.loads(f)["choices"][0]["text"] for f in frames))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(work, number) for number in range(6)]
        wait_for(lambda: len(results) >= 6, "load runs")
        server.terminate()
        wait_for(lambda: server.probe("readyz") == 503, "readiness is taken away")
        during = len(results)
        assert server.complete().status_code == 200  # still serving in the grace
        for worker in workers:
            worker.result(60)
    assert server.process.wait(30) == 0
    assert len(results) > during
    assert set(results) == {expected}
    assert "Traceback" not in server.log.read_text()


def stop_in_a_stream(server: Server) -> tuple[socket.socket, bytes, int]:
    """A stream of several answers whose engine is stopped: its socket, what came of it, and the engine's pid."""
    engine = server.engine_pid or 0
    sock = raw_request(server, **LONG, stream=True, n=8)  # one after the other: longer than the signal takes
    first = sock.recv(1)
    os.kill(engine, signal.SIGSTOP)
    return sock, first, engine


def test_a_drain_waits_for_the_last_stream(start: Start) -> None:
    server = start("--slots", "1", "--drain-grace", "0")
    sock, first, engine = stop_in_a_stream(server)
    server.terminate()
    wait_for(lambda: takes_nobody(server), "no new connections")
    assert server.process.poll() is None
    os.kill(engine, signal.SIGCONT)
    assert (first + read_all(sock)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert server.process.wait(30) == 0
    wait_for(lambda: not Path(f"/proc/{engine}").exists(), "the engine process is gone")


def test_a_stuck_engine_is_ended_and_started_again(start: Start) -> None:
    server = start("--slots", "1", "--step-timeout", "1.5")
    sock, first, old = stop_in_a_stream(server)
    *_, last = (first + read_all(sock)).split(b"data: ")
    assert b'"code":"engine_restarted"' in last
    wait_for(lambda: server.probe("readyz") == 200, "ready again")
    assert server.engine_pid not in (None, old)
    assert server.probe("livez") == 200
    assert server.metric("slmops_engine_restarts_total") == 1
    assert "the engine process said nothing for 1.5 seconds while ready" in server.log.read_text()
    assert server.complete().status_code == 200


def test_a_drain_does_not_wait_for_a_stuck_engine(start: Start) -> None:
    server = start("--slots", "1", "--step-timeout", "1.5", "--drain-grace", "0")
    sock, first, _ = stop_in_a_stream(server)
    server.terminate()
    assert b'"code":"engine_restarted"' in first + read_all(sock)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_keys_and_a_metrics_port(start: Start, tmp_path: Path) -> None:
    keys, (port, metrics) = tmp_path / "keys", free_ports(2)
    keys.mkdir()
    (keys / "key").write_text("sesame\n")
    server = start("--api-keys-dir", str(keys), "--metrics-port", str(metrics), port=port)
    refused = server.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    server.http.headers["authorization"] = "Bearer sesame"
    assert server.complete().status_code == 200
    assert server.http.get("/metrics").status_code == 404  # it is not for everybody who reaches the API
    assert server.probe("readyz") == server.probe("livez") == 200
    with httpx.Client(base_url=f"http://127.0.0.1:{metrics}") as other:
        assert 'slmops_http_requests_total{code="401",model_name="tiny"} 1.0' in other.get("/metrics").text
        assert other.get("/readyz").status_code == 200
        assert other.post("/v1/completions", content=b"{}").status_code == 404
        with socket.create_connection(("127.0.0.1", metrics), timeout=30) as scanner:
            scanner.sendall(b"\x16\x03\x01\x02\x00\x01")
            assert scanner.recv(1 << 16).startswith(b"HTTP/1.1 400")
        assert 'code="400"' not in other.get("/metrics").text  # no client of the model
        assert "invalid_http" not in other.get("/metrics").text


def last_line(server: Server) -> str:
    """Of the log: by it Kubernetes tells why a container ended."""
    return server.log.read_text().splitlines()[-1]


def test_a_folder_that_is_no_model_ends_with_a_sentence(start: Start, tmp_path: Path) -> None:
    server = start(model=tmp_path, ready=False)
    assert server.process.wait(30) == 1
    assert "genai_config.json is missing" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_a_graph_that_is_broken_ends_with_a_sentence(start: Start, tmp_path: Path, tiny: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.onnx").write_bytes(b"nonsense")
    server = start(model=tmp_path / "model", ready=False)
    assert server.process.wait(60) == 1
    assert "Gave up problem=InvalidProtobuf" in last_line(server)


def test_a_memory_that_cannot_hold_the_cache_is_refused_with_numbers(start: Start) -> None:
    server = start("--slots", "100000000", ready=False)
    assert server.process.wait(60) == 1
    assert "Raise the memory limit or lower --slots" in last_line(server)


def test_all_addresses_are_those_of_both_families(start: Start) -> None:
    port, metrics = free_ports(2)
    server = start("--host", "", "--metrics-port", str(metrics), port=port)
    for host in ("127.0.0.1", "[::1]"):
        assert server.http.get(f"http://{host}:{server.port}/readyz").status_code == 200
        assert server.http.get(f"http://{host}:{metrics}/metrics").status_code == 200


def test_guesses_end_where_a_stop_string_ends_the_answer(start: Start) -> None:
    server = start("--speculate", "4", "--slots", "2")
    same = {"max_tokens": 40, "logit_bias": {"300": 100}, "temperature": 0}  # one token again and again
    text = server.complete(**same).json()["choices"][0]["text"]
    got = server.complete(**same, stop=text[:7]).json()
    assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("", "stop")
    frames = server.complete(**same, stream=True).text.split("\n\n")
    assert "".join(json.loads(f[6:])["choices"][0]["text"] for f in frames if f.startswith("data: {")) == text
    wait_for(lambda: server.metric("vllm:spec_decode_num_accepted_tokens_total") > 30, "the guesses that were right")
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") >= 30
    assert server.metric("slmops_engine_steps_total") < 80


def test_an_engine_that_cannot_guess_says_so(start: Start) -> None:
    server = start("--speculate", "4", "--engine", "genai", ready=False)
    assert server.process.wait(60) == 1
    assert "--speculate" in last_line(server)
