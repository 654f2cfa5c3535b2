"""The benchmark's client: it takes as little of the CPUs that the servers need as Python lets it.

http.client parses every chunk of a stream, which costs as much CPU time as the server spends on making it. This one
takes what the socket has and counts tokens in it.
"""

import socket
import time
from collections.abc import Iterable, Iterator

PIECE = 1 << 16  # bytes
TOKEN = b'"finish_reason":null'  # once in each frame with text


def post(port: int, path: str, body: bytes, *, frames: bool) -> list[float]:
    """Times of CLOCK_MONOTONIC in seconds: of sending, then of each token that could be seen coming.

    frames: the answer is OpenAI's stream, else it is one byte for each token until the connection ends.
    SystemExit for another status than 200.
    """
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=900) as link:
        times = [time.monotonic()]
        link.sendall(head.encode() + body)
        for count in tokens(received(link), frames=frames):
            times += [time.monotonic()] * count
    return times


def received(link: socket.socket) -> Iterator[bytes]:
    """What comes, as it comes, until the other side closes."""
    while piece := link.recv(PIECE):
        yield piece


def tokens(pieces: Iterable[bytes], *, frames: bool) -> Iterator[int]:
    """How many tokens each piece of an HTTP answer completes. SystemExit for another status than 200."""
    head, kept, body = b"", b"", False
    for piece in pieces:
        if not body:
            head += piece
            body = b"\r\n\r\n" in head
            if not body:
                continue
            head, _, piece = head.partition(b"\r\n\r\n")
        if head.split(None, 2)[1] != b"200":
            line = head.partition(b"\r\n")[0]
            raise SystemExit(f"failed: {line.decode()} {piece.decode(errors='replace')}")
        if not frames:
            yield len(piece)
            continue
        kept += piece
        yield kept.count(TOKEN)
        kept = kept[kept.rfind(TOKEN) + len(TOKEN) if TOKEN in kept else 0 :][-len(TOKEN) + 1 :]
