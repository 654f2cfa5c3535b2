"""What slmops-server is measured against: onnxruntime-genai behind the barest HTTP.

python serving_peers.py serial|static MODEL THREADS SLOTS
prints its port, then answers POST {"prompt": [ids], "max_tokens": n} with one byte for each token.

serial: a Generator for one request at a time. static: the Engine, which batches statically on CPUs: requests that come
while a batch runs wait for the longest answer of it.
"""

import json
import queue
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import numpy as np
import onnxruntime_genai as og


class Peer(Protocol):
    """A loaded model."""

    def answer(self, prompt: list[int], count: int) -> Iterator[None]:
        """Yields at each of `count` tokens. Called by many threads."""


def load(path: str, threads: int, slots: int) -> Any:
    """The model with all the threads that ours gets; genai would take half of the machine's."""
    config = og.Config(path)
    session = {"intra_op_num_threads": threads}
    batching = {"static_batching": {"max_batch_size": slots}}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}, "engine": batching}))
    return og.Model(config)


class Serial:
    """One Generator at a time."""

    def __init__(self, path: str, threads: int, slots: int) -> None:
        self._model = load(path, threads, slots)
        self._turn = threading.Lock()

    def answer(self, prompt: list[int], count: int) -> Iterator[None]:
        with self._turn:
            params = og.GeneratorParams(self._model)
            length = len(prompt) + count
            params.set_search_options(max_length=length, min_length=length, do_sample=False)
            generator = og.Generator(self._model, params)
            generator.append_tokens(np.asarray(prompt, np.int32))
            for _ in range(count):
                generator.generate_next_token()
                yield


class Static:
    """The Engine, owned by one thread."""

    def __init__(self, path: str, threads: int, slots: int) -> None:
        self._jobs: queue.Queue[tuple[list[int], int, queue.Queue[bool]]] = queue.Queue()
        threading.Thread(target=self._own, args=(path, threads, slots), daemon=True).start()

    def answer(self, prompt: list[int], count: int) -> Iterator[None]:
        told: queue.Queue[bool] = queue.Queue()
        self._jobs.put((prompt, count, told))
        while told.get():
            yield

    def _own(self, path: str, threads: int, slots: int) -> None:
        engine = og.Engine(load(path, threads, slots))
        events = engine.create_event_buffer(64)
        running: dict[Any, queue.Queue[bool]] = {}  # by request: turns are numbered anew in each
        while True:
            while not running or not self._jobs.empty():
                prompt, count, told = self._jobs.get()
                options = og.RequestOptions()
                options.set_max_session_tokens(len(prompt) + count)
                request = engine.create_request(options=options)
                turn = og.TurnOptions(request)
                turn.set_max_generated_tokens(count)
                turn.set_min_generated_tokens(count)
                request.begin_turn(np.asarray(prompt, np.int32), turn)
                running[request] = told
            for event in engine.run(events):
                told = running[event.request]
                if event.flags & og.EngineEventFlags.TOKEN:
                    told.put(True)
                if event.flags & og.EngineEventFlags.TURN_FINISHED:
                    del running[event.request]
                    event.request.close()
                    told.put(False)


def handler(peer: Peer) -> type[BaseHTTPRequestHandler]:
    """The HTTP side."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # the end of the connection is the end of the answer

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()
            for _ in peer.answer(body["prompt"], body["max_tokens"]):
                self.wfile.write(b".")
                self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
            """Nothing: it is a measurement."""

    return Handler


def main() -> None:
    """Serve until killed."""
    kind, path, threads, slots = sys.argv[1:5]
    made: type[Serial] | type[Static] = Serial if kind == "serial" else Static
    peer: Peer = made(path, int(threads), int(slots))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(peer))
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
