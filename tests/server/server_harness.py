"""A real slmops-server process for tests, and waiting for the state of the world."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

REPO = Path(__file__).parents[2]
TINY = Path(__file__).parent / "data" / "tiny-int4"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30) -> object:
    """Poll a condition about the world; fails with `what` when it never holds."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError, OSError):
            if result := condition():
                return result
        if time.monotonic() > end:
            pytest.fail(f"never happened within {seconds} s: {what}")
        time.sleep(0.01)


def free_ports(count: int) -> list[int]:
    """All held until all are chosen, so that they differ."""
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in socks]


class Server:
    """A real slmops-server process with a real model."""

    def __init__(self, log: Path, *args: str, model: Path = TINY, ready: bool = True, port: int = 0) -> None:
        self.port = port or free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        env = {**os.environ, "PYTHONPATH": str(REPO / "images" / "server")}
        if (installed := Path("/opt/slmops")).is_dir():  # inside the image the installed package is the one to test
            env["PYTHONPATH"] = str(installed)
        with log.open("wb") as out:
            where = ["--model", str(model), "--served-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)]
            command = [sys.executable, "-m", "slmops_server", *where, "--threads", "1", *args]
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        self.http = httpx.Client(base_url=self.url, timeout=30)
        if ready:
            wait_for(lambda: self.process.poll() is not None or self.probe("readyz") == 200, "the server is ready")
            assert self.process.poll() is None, log.read_text()

    def probe(self, name: str) -> int:
        return self.http.get(f"/{name}").status_code

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all series of that name with these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
                total += float(value)
        return total

    @property
    def idle(self) -> bool:
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0

    @property
    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def most_memory(self) -> int:
        """Of the front so far, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))

    @property
    def engine_pid(self) -> int | None:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def complete(self, **fields: object) -> httpx.Response:
        body = {"model": "tiny", "prompt": "The printer", "temperature": 0, "max_tokens": 8, **fields}
        return self.http.post("/v1/completions", content=json.dumps(body))

    def chat(self, text: str = "hi", **fields: object) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
        return self.http.post("/v1/chat/completions", content=json.dumps({**body, **fields}))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def check_sampling_formats_and_leaving(server: Server) -> None:
    """What no engine refuses: sampling with logprobs, a schema, a client that leaves."""
    chosen = server.complete(logprobs=2, seed=3, temperature=0.9, min_p=0.01, logit_bias={"40": 2.0})
    assert chosen.status_code == 200
    assert len(chosen.json()["choices"][0]["logprobs"]["token_logprobs"]) == 8
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    kept = server.chat(
        max_tokens=200, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    assert isinstance(json.loads(kept.json()["choices"][0]["message"]["content"])["a"], bool)
    long = {"model": "tiny", "prompt": "The printer", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 32}
    with server.http.stream("POST", "/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert not server.idle
    wait_for(lambda: server.idle, "the slot of a client that left is free")
    assert server.metric("vllm:request_success_total", finished_reason="abort") == 1
