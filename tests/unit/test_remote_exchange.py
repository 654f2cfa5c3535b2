"""Workers, routers and Prometheus that say too much, or say it too slowly: none takes memory or a worker for that."""

import gzip
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

import httpx
import pytest

from slmops.remote import progress, prometheus, router
from slmops.remote.client import shared
from slmops.remote.errors import RemoteError
from slmops.remote.exchange import ask

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
SECONDS = 0.5  # the time limits of these tests; a server that is not cut off takes some minutes
HEAD = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(bytes(64 << 20))

Talk = Callable[[socket.socket, threading.Event], None]


def drip(first: bytes, byte: bytes) -> Talk:
    def talk(client: socket.socket, stop: threading.Event) -> None:
        client.sendall(first)
        while not stop.wait(SECONDS / 10):
            client.sendall(byte)

    return talk


def endless(client: socket.socket, stop: threading.Event) -> None:
    client.sendall(HEAD + b"\r\n")
    while not stop.is_set():
        client.sendall(b" " * 65_536)


def bomb(client: socket.socket, _: threading.Event) -> None:
    client.sendall(HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(BOMB) + BOMB)


SERVERS = {
    "headers": drip(HEAD + b"x: ", b"x"),
    "body": drip(HEAD + b"content-length: 1000\r\n\r\n", b" "),
    "body without a length": drip(HEAD + b"\r\n{}", b" "),
    "endless": endless,
    "packed": bomb,
}


@pytest.fixture
def serve() -> Iterator[Callable[[Talk], int]]:
    stop, sockets = threading.Event(), []

    def started(talk: Talk) -> int:
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def work() -> None:
            try:
                client, _ = listening.accept()
                with client:
                    client.recv(65_536)
                    talk(client, stop)
            except OSError:
                pass  # it was cut off, as it should be

        threading.Thread(target=work, daemon=True).start()
        return int(listening.getsockname()[1])

    yield started
    stop.set()
    for one in sockets:
        one.close()


def of_a_worker(port: int, _: Path) -> None:
    assert progress.ProgressReader(port=port)("127.0.0.1") is None


def of_a_router(port: int, _: Path) -> None:
    with pytest.raises(RemoteError):
        router.observe(f"http://127.0.0.1:{port}", "t")


def of_prometheus(port: int, folder: Path) -> None:
    said = prometheus.query(f"http://127.0.0.1:{port}", "up", NOW, folder=folder)
    assert isinstance(said, prometheus.Unreachable | prometheus.Inconclusive)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("read", [of_a_worker, of_a_router, of_prometheus])
def test_no_answer_takes_more_than_its_time_and_its_bytes(
    read: Callable[[int, Path], None],
    server: str,
    serve: Callable[[Talk], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, name in ((progress, "TOTAL_SECONDS"), (router, "READ_SECONDS"), (prometheus, "TIMEOUT_SECONDS")):
        monkeypatch.setattr(module, name, SECONDS)
    port = serve(SERVERS[server])
    shared()  # what making it costs is not counted
    tracemalloc.start()
    try:
        began = monotonic()
        read(port, tmp_path)
        took, most = monotonic() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < 4 * SECONDS
    assert most < 8 << 20


def test_half_an_answer_is_never_taken_for_a_whole_one(serve: Callable[[Talk], int]) -> None:
    port = serve(SERVERS["body without a length"])
    with pytest.raises(httpx.ReadTimeout, match="too long"):
        ask(shared(), "GET", f"http://127.0.0.1:{port}", seconds=SECONDS, connect=SECONDS, limit=1000)


def test_an_answer_of_just_the_limit_is_whole(serve: Callable[[Talk], int]) -> None:
    def talk(client: socket.socket, _: threading.Event) -> None:
        client.sendall(HEAD + b"\r\n" + b"x" * 1000)

    said = ask(shared(), "GET", f"http://127.0.0.1:{serve(talk)}", seconds=60, connect=60, limit=1000)
    assert (said.status, said.body) == (200, b"x" * 1000)
    assert not any(isinstance(one, threading.Timer) and not one.finished.is_set() for one in threading.enumerate())
