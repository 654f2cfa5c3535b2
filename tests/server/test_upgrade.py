"""Requests that ask for another protocol, as Java's HttpClient does on every fresh connection: answered as they are."""

import http.client
import json
import socket
from collections.abc import Iterator

import pytest
from server_harness import Server

ASKS = "connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
ASKS += "upgrade: h2c\r\n"
BODY = json.dumps({"model": "tiny", "prompt": [40], "temperature": 0, "max_tokens": 4}).encode()
OTHER = b"GET /v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n"  # a body that looks like a request


@pytest.fixture
def sock(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), 20) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield made


def head(more: str = "", method: str = "POST", path: str = "/v1/completions") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{ASKS}{more}\r\n".encode()


def sized(body: bytes) -> str:
    return f"content-length: {len(body)}\r\n"


def answer(sock: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    got = http.client.HTTPResponse(sock)
    got.begin()
    return got.status, got.read()


def is_well(got: tuple[int, bytes]) -> bool:
    return got[0] == 200 and json.loads(got[1])["usage"]["completion_tokens"] == 4


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


@pytest.mark.parametrize("piece", [1, 1 << 16], ids=["byte by byte", "in one piece"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_the_body_arrives(sock: socket.socket, framing: str, piece: int) -> None:
    chunks = chunked(BODY, 7)
    sent = head(sized(BODY)) + BODY if framing == "length" else head("transfer-encoding: chunked\r\n") + chunks
    for _ in range(2):  # over one connection
        for at in range(0, len(sent), piece):
            sock.sendall(sent[at : at + piece])
        assert is_well(answer(sock))


def test_a_body_that_comes_later_is_no_request(sock: socket.socket) -> None:
    """Expect lets the body come when the server has taken up the head."""
    for body, status in ((OTHER, 400), (BODY, 200)):
        sock.sendall(head("expect: 100-continue\r\n" + sized(body)))
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        sock.sendall(body)
        got = answer(sock)
        assert got[0] == status, got
    assert is_well(got)


def test_nothing_of_what_follows_is_lost(sock: socket.socket) -> None:
    """Several requests in one piece, with a body and without."""
    probe = head(method="GET", path="/livez")
    sock.sendall(head(sized(OTHER)) + OTHER + probe + head(sized(BODY) + "connection: close\r\n") + BODY)
    data = b""
    while part := sock.recv(1 << 16):
        data += part
    told = [int(answer.split(b" ")[0]) for answer in data.split(b"HTTP/1.1 ")[1:]]
    assert told == [400, 200, 200]


def test_a_head_is_limited_all_the_same(sock: socket.socket) -> None:
    sock.sendall(head("".join(f"x-{n}: {'a' * 900}\r\n" for n in range(60))))
    assert answer(sock)[0] == 431
