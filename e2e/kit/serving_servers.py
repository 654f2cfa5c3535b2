"""The servers that `make bench-serving` measures, each a process on this machine, and the model they serve."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kit import pods
from kit.chart import local_images
from kit.kubectl import LOCAL, ROOT, Kubectl

READY = 120  # seconds
SHAPE = {
    "precision": "int4", "vocab": 32000, "hidden": 896, "layers": 24, "heads": 14, "kv-heads": 2, "inter": 4864,
    "context": 1024, "std": 0.02,
}  # fmt: skip
NAMESPACE = "slmops-bench"


@dataclass(frozen=True)
class Request:
    """What one request asks for: an answer of exactly `tokens` tokens."""

    prompt: list[int]
    tokens: int


class Server:
    """One server. `name` is slmops-ENGINE, genai-serial or genai-static; SystemExit when it does not start."""

    def __init__(self, name: str, model: Path, threads: int, slots: int) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT / "images/server"), "ORT_DISABLE_TELEMETRY": "1"}
        self.ours = name.startswith("slmops-")
        if self.ours:
            self.port = free_port()
            command = ["-m", "slmops_server", "--model", str(model), "--served-name", "m", "--host", "127.0.0.1"]
            command += ["--engine", name.removeprefix("slmops-"), "--port", str(self.port)]
            command += ["--threads", str(threads), "--slots", str(slots), "--log-level", "warning"]
        else:
            command = [str(Path(__file__).with_name("serving_peers.py")), name.removeprefix("genai-")]
            command += [str(model), str(threads), str(slots)]
        started = time.monotonic()
        self.process = subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True)
        if self.ours:
            self._wait()
        else:
            assert self.process.stdout
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"failed: {name} does not start; its trace is above")
            self.port = int(line)
        self.ready_seconds = time.monotonic() - started

    def _wait(self) -> None:
        end = time.monotonic() + READY
        while time.monotonic() < end and self.process.poll() is None:
            link = http.client.HTTPConnection("127.0.0.1", self.port)
            try:
                link.request("GET", "/readyz")
                if link.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                link.close()
            time.sleep(0.05)
        self.stop()
        raise SystemExit("failed: slmops-server does not get ready; its log is above")

    def ask(self, request: Request) -> list[float]:
        """Times of CLOCK_MONOTONIC in seconds: of sending, then of each token that could be seen coming."""
        body: dict[str, object] = {"prompt": request.prompt, "max_tokens": request.tokens}
        if self.ours:
            body |= {"model": "m", "temperature": 0, "ignore_eos": True, "stream": True}
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        times = [time.monotonic()]
        link.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = link.getresponse()
        if answer.status != 200:
            raise SystemExit(f"failed: {answer.status} {answer.read().decode()}")
        while data := answer.readline() if self.ours else answer.read(1):
            if not self.ours or (data.startswith(b"data: {") and b'"finish_reason":null' in data):
                times.append(time.monotonic())
        link.close()
        return times

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


def make_model(block: int) -> Path:
    """The benchmark's model with int4 blocks of that size, made once by the trainer image on the local node."""
    folder = LOCAL / ("bench-model" if block == 128 else f"bench-model-{block}")
    if (folder / "genai_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)  # the pod is another user
    kube = Kubectl(NAMESPACE)
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    kube.delete("pod", "make-model")
    script = (ROOT / "tests/server/make_tiny_model.py").read_text(encoding="utf-8")
    shape = SHAPE | {"block": block}
    arguments = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
    spec = pods.spec(
        local_images()["trainer"],
        ["python", "-c", script, "/model", *arguments],
        mounts={"/model": {"hostPath": {"path": str(folder.resolve()), "type": "Directory"}}},
        imagePullPolicy="Never",
    )
    kube.apply(pods.pod("make-model", spec))
    pods.finish(kube, "make-model", 1200)
    kube.delete("pod", "make-model", wait=False)
    return folder
