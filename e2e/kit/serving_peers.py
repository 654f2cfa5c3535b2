"""What slmops-server is measured against: engines of others behind the barest HTTP.

python serving_peers.py genai-serial|genai-static|openvino MODEL PORT THREADS SLOTS
loads the model, then answers POST {"prompt": [ids], "max_tokens": n} with one byte for each token, and GET with 200.

genai-serial: onnxruntime-genai's Generator, for one request at a time. genai-static: its Engine, which batches
statically on CPUs: requests that come while a batch runs wait for the longest answer of it. openvino: OpenVINO GenAI's
ContinuousBatchingPipeline, over IR.
"""

import json
import os
import queue
import sys
import threading
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BLOCK = 32  # tokens of a block of OpenVINO's cache on CPUs


class Peer(Protocol):
    """A loaded model."""

    def answer(self, prompt: list[int], count: int) -> Iterator[None]:
        """Yields at each of `count` tokens. Called by many threads."""


def genai(path: str, threads: int, slots: int) -> tuple[Any, Any]:
    """onnxruntime-genai, and a model with all the threads that ours gets: by itself it takes half of the machine's."""
    import onnxruntime_genai as og  # each peer's process holds its own engine only

    config = og.Config(path)
    session = {"intra_op_num_threads": threads}
    batching = {"static_batching": {"max_batch_size": slots}}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}, "engine": batching}))
    return og, og.Model(config)


class Serial:
    """One Generator at a time."""

    def __init__(self, path: str, threads: int, slots: int) -> None:
        self._og, self._model = genai(path, threads, slots)
        self._turn = threading.Lock()

    def answer(self, prompt: list[int], count: int) -> Iterator[None]:
        with self._turn:
            params = self._og.GeneratorParams(self._model)
            length = len(prompt) + count
            params.set_search_options(max_length=length, min_length=length, do_sample=False)
            generator = self._og.Generator(self._model, params)
            generator.append_tokens(np.asarray(prompt, np.int32))
            for _ in range(count):
                generator.generate_next_token()
                yield


Told = queue.Queue[bool]  # True: a token, False: the end


class Owned:
    """An engine that one thread makes and drives; the process ends with it."""

    def __init__(self, path: str, threads: int, slots: int) -> None:
        self._jobs: queue.Queue[tuple[list[int], int, Told]] = queue.Queue()
        self._loaded = threading.Event()
        threading.Thread(target=self._own, args=(path, threads, slots), daemon=True).start()
        self._loaded.wait()

    def answer(self, prompt: list[int], count: int) -> Iterator[None]:
        told: Told = queue.Queue()
        self._jobs.put((prompt, count, told))
        while told.get():
            yield

    def _own(self, path: str, threads: int, slots: int) -> None:
        try:
            self.load(path, threads, slots)
            self._loaded.set()
            running: dict[Any, Told] = {}
            while True:
                while not running or not self._jobs.empty():
                    prompt, count, told = self._jobs.get()
                    running[self.begin(prompt, count)] = told
                self.step(running)
        except Exception:  # noqa: BLE001 - whatever it is, requests would wait for ever
            traceback.print_exc()
            os._exit(1)

    @abstractmethod
    def load(self, path: str, threads: int, slots: int) -> None:
        """Make the engine."""

    @abstractmethod
    def begin(self, prompt: list[int], count: int) -> Any:
        """Hand a request to the engine; what stands for it."""

    @abstractmethod
    def step(self, running: dict[Any, Told]) -> None:
        """One step; what has ended is taken out of `running`."""


class Static(Owned):
    """The Engine."""

    def load(self, path: str, threads: int, slots: int) -> None:
        self._og, model = genai(path, threads, slots)
        self._engine = self._og.Engine(model)
        self._events = self._engine.create_event_buffer(64)

    def begin(self, prompt: list[int], count: int) -> Any:
        options = self._og.RequestOptions()
        options.set_max_session_tokens(len(prompt) + count)
        request = self._engine.create_request(options=options)
        turn = self._og.TurnOptions(request)
        turn.set_max_generated_tokens(count)
        turn.set_min_generated_tokens(count)
        request.begin_turn(np.asarray(prompt, np.int32), turn)
        return request

    def step(self, running: dict[Any, Told]) -> None:
        flags = self._og.EngineEventFlags
        for event in self._engine.run(self._events):
            if event.flags & flags.TOKEN:
                running[event.request].put(True)
            if event.flags & flags.TURN_FINISHED:
                running.pop(event.request).put(False)
                event.request.close()


class Openvino(Owned):
    """The pipeline with its own choice of cache and arithmetic, without a prefix cache."""

    def load(self, path: str, threads: int, slots: int) -> None:
        import openvino as ov
        import openvino_genai as ovg

        self._ov, self._ovg = ov, ovg
        context = json.loads((Path(path) / "config.json").read_text())["max_position_embeddings"]
        config = ovg.SchedulerConfig()
        config.max_num_seqs = slots
        config.num_kv_blocks = slots * -(-context // BLOCK)
        properties = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": "NO"}  # five servers share the machine
        self._pipeline = ovg.ContinuousBatchingPipeline(path, config, "CPU", properties)
        self._number = 0

    def begin(self, prompt: list[int], count: int) -> Any:
        self._number += 1
        config = self._ovg.GenerationConfig(max_new_tokens=count, min_new_tokens=count, ignore_eos=True)
        ids = self._ov.Tensor(np.asarray([prompt], np.int64))
        return self._pipeline.add_request(self._number, ids, config)

    def step(self, running: dict[Any, Told]) -> None:
        self._pipeline.step()
        for handle, told in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    for _ in output.generated_ids:
                        told.put(True)
            if handle.get_status() != self._ovg.GenerationStatus.RUNNING:
                del running[handle]
                told.put(False)


KINDS: dict[str, Callable[[str, int, int], Peer]] = {
    "genai-serial": Serial,
    "genai-static": Static,
    "openvino": Openvino,
}


def handler(peer: Peer) -> type[BaseHTTPRequestHandler]:
    """The HTTP side."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # the end of the connection is the end of the answer

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

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


class Http(ThreadingHTTPServer):
    """Its clients may all come at once: the 5 of the standard library are reset at 16 streams."""

    request_queue_size = 128


def main() -> None:
    """Serve until killed."""
    kind, path, port, threads, slots = sys.argv[1:6]
    peer = KINDS[kind](path, int(threads), int(slots))
    Http(("127.0.0.1", int(port)), handler(peer)).serve_forever()


if __name__ == "__main__":
    main()
