"""The servers that `make bench-serving` measures, each a process on this machine."""

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kit import asking, llama_build, serving_models
from kit.kubectl import ROOT

READY = 180  # seconds
TRY_EVERY = 0.05  # seconds


class Start(NamedTuple):
    """What a server is started with. program: Python, or the server itself. model: the folder in its form."""

    program: Path
    model: Path
    port: int
    threads: int
    slots: int


@dataclass(frozen=True)
class Kind:
    """How a server is started, and what it speaks: OpenAI's frames, or bare: one byte for each token."""

    command: Callable[[Start], list[str]]
    openai: bool = True
    form: str = "onnx"  # of the model, see serving_models
    ready: str = "/readyz"  # answers 200 when the model is loaded
    program: Callable[[], Path] = serving_models.python


def ours(engine: str) -> Callable[[Start], list[str]]:
    """slmops-server with that engine."""

    def command(at: Start) -> list[str]:
        words = [str(at.program), "-m", "slmops_server", "--model", str(at.model), "--served-name", "m"]
        words += ["--host", "127.0.0.1", "--port", str(at.port), "--engine", engine, "--log-level", "warning"]
        return [*words, "--threads", str(at.threads), "--slots", str(at.slots)]

    return command


def peer(name: str) -> Callable[[Start], list[str]]:
    """An engine behind the barest HTTP, see serving_peers."""

    def command(at: Start) -> list[str]:
        script = Path(__file__).with_name("serving_peers.py")
        return [str(at.program), str(script), name, str(at.model), str(at.port), str(at.threads), str(at.slots)]

    return command


def llama_server(at: Start) -> list[str]:
    """llama.cpp's own server, set as it is fastest here.

    Each slot has the whole context and a cache of its own: one for all makes every row look at all rows' cells. Prompts
    are not kept: those of the benchmark are all different.
    """
    context = json.loads((at.model / "config.json").read_text())["max_position_embeddings"]
    words = [str(at.program), "--model", str(next(at.model.glob("*.gguf"))), "--host", "127.0.0.1"]
    words += ["--port", str(at.port), "--threads", str(at.threads), "--threads-batch", str(at.threads)]
    words += ["--parallel", str(at.slots), "--ctx-size", str(at.slots * context), "--no-kv-unified"]
    return [*words, "--no-cache-prompt", "--cache-ram", "0", "--no-ui", "--log-verbosity", "0"]


KINDS = {
    "slmops-onnxruntime": Kind(ours("onnxruntime")),
    "slmops-openvino": Kind(ours("openvino")),
    "slmops-llamacpp": Kind(ours("llamacpp"), form="gguf"),
    "genai-serial": Kind(peer("genai-serial"), openai=False),
    "genai-static": Kind(peer("genai-static"), openai=False),
    "openvino-bare": Kind(peer("openvino"), openai=False, form="ir"),
    "llama-server": Kind(llama_server, form="gguf", ready="/health", program=llama_build.llama_server),
}


def environment() -> dict[str, str]:
    """Of a process that runs the server's code of this clone, with its operators as in the image. Raises Failure."""
    folders = [ROOT / "images/server", serving_models.kernels()]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "ORT_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Request:
    """What one request asks for: an answer of exactly `tokens` tokens."""

    prompt: list[int]
    tokens: int


class Server:
    """One server, ready. SystemExit when it does not start."""

    def __init__(self, kind: Kind, model: Path, threads: int, slots: int) -> None:
        env = environment()
        self._kind, self.port = kind, free_port()
        command = kind.command(Start(kind.program(), model, self.port, threads, slots))
        started = time.monotonic()
        self.process = subprocess.Popen(command, env=env)
        self._wait(started + READY, " ".join(command))
        self.ready_seconds = time.monotonic() - started

    def _wait(self, end: float, command: str) -> None:
        while time.monotonic() < end and self.process.poll() is None:
            link = http.client.HTTPConnection("127.0.0.1", self.port)
            try:
                link.request("GET", self._kind.ready)
                if link.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                link.close()
            time.sleep(TRY_EVERY)
        self.stop()
        raise SystemExit(f"failed: this does not get ready within {READY} s; its log is above:\n  {command}")

    def ask(self, request: Request) -> list[float]:
        """Times of CLOCK_MONOTONIC in seconds: of sending, then of each token that could be seen coming."""
        body: dict[str, object] = {"prompt": request.prompt, "max_tokens": request.tokens}
        if self._kind.openai:
            body |= {"model": "m", "temperature": 0, "ignore_eos": True, "stream": True}
        return asking.post(self.port, "/v1/completions", json.dumps(body).encode(), frames=self._kind.openai)

    @property
    def rss(self) -> int:
        """Bytes of the process and its children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in [self.process.pid, *children]]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
