"""The engine process's loop, over a socket as the front has it."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from tokenizers import Tokenizer

from slmops_server import model_folder
from slmops_server.detok import DetokenizerFactory
from slmops_server.engines import adapters, choose
from slmops_server.engines.adapters import Tensors
from slmops_server.engines.base import Sampling
from slmops_server.guide import Guides
from slmops_server.worker import Channel, Worker

DATA = Path(__file__).parent / "data" / "tiny-lora"


class Front:
    """The other end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._lines = sock.makefile("rwb", 0)

    def ask(self, **message: object) -> None:
        self._lines.write(orjson.dumps(message) + b"\n")

    def answer(self, number: int, adapter: str) -> None:
        """Ask for four tokens."""
        flags = {"ignore_eos": True, "stream": False, "score_prompt": False, "continues": False}
        job = {"prompt": [5, 6, 7], "max_tokens": 4, "sampling": Sampling(), "stop": [], "grammar": None, **flags}
        self.ask(op="run", id=number, adapter=adapter, **job)

    def told(self) -> Any:
        """The next message."""
        return orjson.loads(self._lines.readline())

    def ended(self) -> tuple[int, int, str]:
        """Which answer, with how many tokens and why, by the next message."""
        [[number, _text, tokens, finish, _times, _scores]] = self.told()["ev"]
        return number, tokens, finish


@pytest.fixture
def front() -> Iterator[Front]:
    """Of a worker whose engine takes adapters."""
    folder = model_folder.read(DATA / "fp32")
    engine = choose.load(folder, choose.EngineOptions(engine="onnxruntime", threads=1, slots=2, loaded=[]))
    tokenizer = DATA / "fp32" / "tokenizer.json"
    factory, guides = DetokenizerFactory(Tokenizer.from_file(str(tokenizer))), Guides(tokenizer, 512, [2])
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    worker = Worker(engine, factory, guides, Channel(theirs))

    def run() -> None:
        with contextlib.suppress(EOFError):
            worker.run()

    running = threading.Thread(target=run)
    running.start()
    yield Front(ours)
    ours.shutdown(socket.SHUT_RDWR)
    running.join(60)
    assert not running.is_alive()


def test_answers_go_on_while_an_adapter_is_read(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    read, come = adapters.read, threading.Event()

    def slowly(path: Path) -> Tensors:
        come.wait(60)
        return read(path)

    monkeypatch.setattr(adapters, "read", slowly)
    front.ask(op="load", id=1, name="all", path=str(DATA / "all"))
    front.answer(2, "")
    assert front.ended() == (2, 4, "length")
    come.set()
    assert front.told() == {"loaded": 1, "problem": None}
    front.answer(3, "all")
    assert front.ended() == (3, 4, "length")


def test_an_adapter_that_cannot_be_used_is_told(front: Front) -> None:
    front.ask(op="load", id=1, name="none", path=str(DATA / "none"))
    assert front.told() == {"loaded": 1, "problem": f"{DATA / 'none'} is not a folder"}
