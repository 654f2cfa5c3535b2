"""The time that a client gives its request: kept, or told at once that it cannot be."""

import concurrent.futures
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from server_harness import Server, wait_for

Start = Callable[..., Server]
LONG = {"prompt": [40, 41], "max_tokens": 500, "ignore_eos": True}


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """The engine does nothing meanwhile."""
    pid = server.engine_pid or 0
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ask(server: Server, headers: dict[str, str], **fields: object) -> tuple[int, str, dict[str, str]]:
    body = {"model": "tiny", "temperature": 0, **LONG, **fields}
    answer = server.http.post("/v1/completions", json=body, headers=headers)
    return answer.status_code, answer.json().get("error", {}).get("code"), dict(answer.headers)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
@pytest.mark.parametrize("name", ["x-request-timeout", "x-envoy-expected-rq-timeout-ms"])
def test_what_is_no_time_is_refused(server: Server, name: str, value: str) -> None:
    status, code, _ = ask(server, {name: value})
    assert (status, code) == (400, "invalid_header")


def test_enough_time_changes_nothing(server: Server) -> None:
    assert ask(server, {"x-request-timeout": "30", "x-envoy-expected-rq-timeout-ms": "30000"})[0] == 200


def test_time_that_passes_before_the_first_token_is_a_504(start: Start) -> None:
    server = start()  # nothing is measured yet, so nothing is refused at once
    short = (
        {"x-request-timeout": "0.4"},
        {"x-envoy-expected-rq-timeout-ms": "400"},
        {"x-request-timeout": "60", "x-envoy-expected-rq-timeout-ms": "400"},
    )
    with stopped(server):
        for headers in short:
            for stream in (False, True):
                status, code, told = ask(server, headers, stream=stream)
                assert (status, code, told["x-should-retry"]) == (504, "deadline_exceeded", "false")
        wait_for(lambda: server.idle, "its slot is free")
    assert server.complete().status_code == 200


def test_time_that_passes_in_mid_stream_ends_it_with_an_error_frame(start: Start) -> None:
    server = start("--slots", "1")
    body = {"model": "tiny", **LONG, "stream": True, "n": 8}  # one after the other: longer than the signal takes
    with server.http.stream("POST", "/v1/completions", json=body, headers={"x-request-timeout": "2"}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        with stopped(server):
            rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert server.metric("slmops_streams_cut_total") == 0  # no fault of the server
    assert server.metric("slmops_rejected_requests_total", reason="deadline_exceeded") == 1
    wait_for(lambda: server.idle, "its slot is free")
    assert server.complete().status_code == 200
    assert "Traceback" not in server.log.read_text()


def test_time_that_cannot_be_met_is_refused_at_once(start: Start) -> None:
    server = start("--slots", "1")
    for _ in range(3):
        server.complete(**LONG)
    alone = server.metric("vllm:e2e_request_latency_seconds_sum") / 3
    half = {"x-request-timeout": str(10 * alone)}  # of what twenty answers take, one after the other
    with stopped(server):
        refused = ask(server, {"x-request-timeout": "0.000001"})
        assert refused[:2] == (504, "deadline_exceeded")  # over before it was read
        refused = ask(server, half, n=20)
        assert refused[:2] == (503, "deadline_unreachable")
        assert int(refused[2]["retry-after"]) >= 1
        assert refused[2]["x-slmops-deadline"] == "unreachable"  # for the router: no failure of the server
        assert server.metric("slmops_rejected_requests_total", reason="deadline_unreachable") == 1
        assert server.idle
    assert ask(server, half)[0] == 200


def test_the_queue_counts(start: Start) -> None:
    server = start("--slots", "1", "--max-queue", "2000")
    server.complete(**LONG)
    alone = server.metric("vllm:e2e_request_latency_seconds_sum")
    seconds = str(6 * alone)
    assert ask(server, {"x-request-timeout": seconds})[0] == 200
    with stopped(server), concurrent.futures.ThreadPoolExecutor(1) as pool:
        many = pool.submit(ask, server, {}, n=20)
        wait_for(lambda: server.metric("vllm:num_requests_waiting") == 19, "a queue of twenty answers")
        assert ask(server, {"x-request-timeout": seconds})[:2] == (503, "deadline_unreachable")
        os.kill(server.engine_pid or 0, signal.SIGCONT)
        assert many.result(60)[0] == 200
