"""Clients that flood, dawdle or do not listen: each is told why or cut off, and nobody else notices."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from server_harness import Server, wait_for

Start = Callable[..., Server]
# 20 alternatives for each of 500 tokens: some megabytes, more than the machine's buffers for one socket hold
LARGE = {"prompt": [40, 41], "max_tokens": 500, "ignore_eos": True, "logprobs": 20, "n": 24, "stream": True}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with little patience."""
    running = Server(
        tmp_path_factory.mktemp("strict") / "log", "--slots", "4", "--receive-timeout", "0.5", "--send-timeout", "0.5"
    )
    yield running
    assert "Traceback" not in running.log.read_text()
    running.close()


def connect(server: Server, buffer: int = 0) -> socket.socket:
    """`buffer`: bytes that this end holds unread."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", server.port))
    return sock


def post(fields: dict[str, object], *headers: str) -> bytes:
    body = json.dumps({"model": "tiny", "prompt": [40], "temperature": 0, **fields}).encode()
    more = "".join(f"{header}\r\n" for header in headers)
    return f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{more}content-length: {len(body)}\r\n\r\n".encode() + body


def to_the_end(sock: socket.socket) -> bytes:
    data = b""
    with sock, contextlib.suppress(ConnectionError):
        while part := sock.recv(1 << 16):
            data += part
    return data


def refusal(data: bytes) -> tuple[int, str]:
    """Status and code of a raw answer."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert re.search(rb"\r\nx-request-id: [!-~]+", head)
    return int(head.split(b" ")[1]), json.loads(body)["error"]["code"]


HEADS = [
    ("one endless header", b"x-flood: " + b"a" * (1 << 20)),
    ("many headers", b"".join(b"x-%d: 1\r\n" % n for n in range(200)) + b"\r\n"),
    ("large ones that end", b"".join(b"x-%d: %s\r\n" % (n, b"a" * 900) for n in range(60)) + b"\r\n"),
]


@pytest.mark.parametrize(("what", "head"), HEADS, ids=[h[0] for h in HEADS])
def test_a_flood_of_headers_gets_431(strict: Server, what: str, head: bytes) -> None:
    before = strict.metric("slmops_rejected_requests_total", reason="headers_too_large")
    sock = connect(strict)
    with contextlib.suppress(ConnectionError):
        sock.sendall(b"GET /readyz HTTP/1.1\r\n" + head)
    assert refusal(to_the_end(sock)) == (431, "headers_too_large")
    assert strict.metric("slmops_rejected_requests_total", reason="headers_too_large") == before + 1


def test_a_refused_head_keeps_the_number_that_its_client_gave(strict: Server) -> None:
    for given, told in ((b"call-7", b"call-7"), (b"a" * 200, None)):
        sock = connect(strict)
        with contextlib.suppress(ConnectionError):
            sock.sendall(b"GET /readyz HTTP/1.1\r\nx-request-id: " + given + b"\r\n" + HEADS[1][1])
        number = re.search(rb"\r\nx-request-id: (\S+)", to_the_end(sock))
        assert number
        assert (number[1] == told) if told else (number[1] != given)


def test_headers_of_an_ordinary_size_pass(strict: Server) -> None:
    assert strict.http.get("/readyz", headers={f"x-{n}": "a" * 300 for n in range(80)}).status_code == 200


def test_a_long_url_gets_431(strict: Server) -> None:
    sock = connect(strict)
    sock.sendall(b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\n\r\n")
    assert refusal(to_the_end(sock)) == (431, "headers_too_large")


@pytest.mark.parametrize("head", [b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-a"])
def test_headers_that_do_not_end_get_408(strict: Server, head: bytes) -> None:
    sock = connect(strict)
    sock.sendall(head)
    assert refusal(to_the_end(sock)) == (408, "request_timeout")


def test_headers_that_come_byte_by_byte_have_the_same_time(strict: Server) -> None:
    sock = connect(strict)
    begin = time.monotonic()
    sock.settimeout(0.05)
    data = b""
    for byte in post({}, *(f"x-{n}: a" for n in range(100))):
        with contextlib.suppress(TimeoutError):
            data += sock.recv(1 << 16)
        if data:
            break
        sock.sendall(bytes([byte]))
    assert refusal(data) == (408, "request_timeout")
    assert time.monotonic() - begin < 5


def test_a_body_that_does_not_come_gets_408(strict: Server) -> None:
    sock = connect(strict)
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    wait_for(lambda: sock.recv(12) == b"HTTP/1.1 408", "the answer")
    sock.close()


def test_a_refused_body_is_not_read_for_ever(strict: Server) -> None:
    sock = connect(strict)
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
    assert b"413" in sock.recv(1 << 16)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            sock.sendall(b"x" * 1000)
        except ConnectionError:
            break
    assert time.monotonic() < end
    sock.close()


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"]
)
def test_what_is_not_http_gets_400(strict: Server, garbage: bytes) -> None:
    sock = connect(strict)
    sock.sendall(garbage)
    assert refusal(to_the_end(sock)) == (400, "invalid_http")


def test_a_client_that_does_not_read_is_cut_off_and_its_slots_are_free(strict: Server) -> None:
    before = strict.metric("slmops_rejected_requests_total", reason="slow_reader")
    sock = connect(strict, buffer=4096)
    sock.sendall(post(LARGE))
    wait_for(
        lambda: strict.metric("slmops_rejected_requests_total", reason="slow_reader") == before + 1, "it is cut off"
    )
    wait_for(lambda: strict.idle, "its slots are free")
    assert not to_the_end(sock).endswith(b"0\r\n\r\n")


def test_a_client_that_reads_slowly_gets_all(strict: Server) -> None:
    sock = connect(strict, buffer=16384)  # for some seconds there is always something that waits to be taken
    sock.sendall(post({**LARGE, "n": 12}, "connection: close"))
    assert to_the_end(sock).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_client_that_does_not_read_does_not_hold_up_the_end(start: Start) -> None:
    server = start("--slots", "4", "--send-timeout", "1", "--drain-grace", "0")
    stuck = connect(server, buffer=4096)
    stuck.sendall(post(LARGE))
    wait_for(lambda: server.metric("slmops_http_requests_total", code="200") == 1, "its answer has begun")
    server.terminate()
    assert server.process.wait(20) == 0
    stuck.close()


def test_an_unread_rest_does_not_hold_up_the_end(start: Start) -> None:
    """A little that waits to be sent stays below the mark where writing pauses."""
    server = start("--slots", "4", "--send-timeout", "1", "--drain-grace", "0")
    stuck = [connect(server, buffer=4096) for _ in range(3)]
    for number, sock in enumerate(stuck):  # whole answers: one write, then the connection is closed
        sock.sendall(post({**LARGE, "stream": False, "n": 3 - number}, "connection: close"))
    wait_for(lambda: server.metric("slmops_http_requests_total", code="200") == 3, "they are answered", 60)
    server.terminate()
    assert server.process.wait(20) == 0
    for sock in stuck:
        sock.close()


def test_beyond_the_limit_of_connections_only_probes_are_answered(start: Start) -> None:
    server = start("--max-connections", "5")
    idle = [connect(server) for _ in range(5)]
    with httpx.Client(base_url=server.url) as late:
        answer = late.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
        assert answer.headers["connection"] == "close"
        assert answer.headers["retry-after"]
        assert late.get("/livez").status_code == 200
    flood = [connect(server) for _ in range(100)]
    assert b"" in [to_the_end(sock) for sock in flood[-5:]]  # far beyond it there is no answer at all
    for sock in [*idle, *flood]:
        sock.close()
    wait_for(lambda: server.complete().status_code == 200, "there is room again")
    seen = server.metric("slmops_rejected_requests_total", reason="too_many_connections")
    assert seen >= 1 + 105 - 5 - 64  # those without an answer as well


def test_long_prompts_fill_the_queue_before_many_requests_do(start: Start) -> None:
    server = start("--slots", "1", "--max-queue", "50", "--max-queue-tokens", "500")
    held = [connect(server) for _ in range(3)]
    os.kill(server.engine_pid or 0, signal.SIGSTOP)  # so that nothing ends meanwhile
    try:
        for number, sock in enumerate(held):
            sock.sendall(post({"prompt": [40] * 200, "max_tokens": 5}))
            wait_for(lambda n=number: server.metric("vllm:num_requests_waiting") == n, "it is there")  # type: ignore[misc]
        refused = server.complete(prompt=[40] * 200)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert server.metric("slmops_rejected_requests_total", reason="queue_tokens") == 1
        held.append(connect(server))
        held[-1].sendall(post({"prompt": [40] * 50, "max_tokens": 5}))  # a short one still fits
        wait_for(lambda: server.metric("vllm:num_requests_waiting") == 3, "it waits")
    finally:
        os.kill(server.engine_pid or 0, signal.SIGCONT)
    for sock in held:
        assert b"HTTP/1.1 200" in sock.recv(100)
        sock.close()
    assert server.complete(prompt=[40] * 400, n=3).status_code == 200  # alone it may be longer than the limit


def test_a_full_queue_at_the_end_sends_clients_elsewhere(start: Start) -> None:
    server = start("--slots", "1", "--max-queue", "0", "--drain-grace", "30")
    sock = connect(server)
    os.kill(server.engine_pid or 0, signal.SIGSTOP)
    try:
        sock.sendall(post({}))
        wait_for(lambda: server.metric("vllm:num_requests_running") == 1, "it runs")
        assert server.complete().status_code == 503
        server.terminate()
        wait_for(lambda: server.probe("readyz") == 503, "it drains")
        refused = server.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    finally:
        os.kill(server.engine_pid or 0, signal.SIGCONT)
    sock.close()


def test_a_flood_of_answers_is_refused_before_any_work(start: Start) -> None:
    server = start("--slots", "2")
    before, slowest = server.most_memory, 0.0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        flood = pool.submit(server.complete, prompt=["a"] * 200_000, n=128)
        while not flood.done():
            probe = server.http.get("/livez")
            assert probe.status_code == 200
            slowest = max(slowest, probe.elapsed.total_seconds())
    refused = flood.result()
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert refused.elapsed.total_seconds() < 2
    assert slowest < 1
    assert server.most_memory - before < 200 << 20


def test_idle_connections_are_closed_before_and_after_a_request(start: Start) -> None:
    server = start("--keep-alive", "0.5")
    fresh, used, blank, then_blank = (connect(server) for _ in range(4))
    blank.sendall(b"\r\n")  # blank lines are no request
    for sock in (used, then_blank):
        sock.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
    then_blank.sendall(b"\r\n")
    for sock in (fresh, blank):
        assert to_the_end(sock) == b""
    for sock in (used, then_blank):
        assert b"HTTP/1.1" not in to_the_end(sock)


def test_blank_lines_that_keep_coming_do_not_keep_a_connection(start: Start) -> None:
    server = start("--keep-alive", "0.5")
    sock = connect(server)
    sock.settimeout(0.05)

    def closed() -> bool:
        try:
            sock.sendall(b"\r\n")
            return sock.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    wait_for(closed, "it is closed", 10)
    sock.close()


def test_what_comes_after_a_refusal_does_not_keep_a_connection(start: Start) -> None:
    """A body that is thrown away, in pieces: its end is no request either."""
    server = start("--keep-alive", "0.5", "--max-body-bytes", "10")
    sock = connect(server)
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 30\r\n\r\n")
    assert b"413" in sock.recv(1 << 16)
    for piece in (b"x" * 10, b"x" * 10, b"x" * 10):
        sock.sendall(piece)
    assert b"HTTP/1.1" not in to_the_end(sock)
