"""`make bench-serving`: slmops-server beside onnxruntime-genai. Prints a table, writes .local/bench-serving.json.

python -m kit.bench_serving [MODEL] [ROUNDS]

A closed loop of 1, 2, 4 and 8 streams: each sends its next request when the last answer is whole. Prompts of 32 to 512
random tokens, answers of 32 to 128, the same for every server. The servers take turns, round by round, in changing
order. Without MODEL, Qwen2 shapes of 0.43 B random int4 weights are made once, in the trainer image.
"""

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from kit import pods
from kit.chart import local_images
from kit.kubectl import LOCAL, ROOT, Kubectl, KubectlError, TimedOut

STREAMS = (1, 2, 4, 8)
EACH = 3  # requests of a stream in a round
SLOTS = max(STREAMS)
MODEL = LOCAL / "bench-model"
SHAPE = {
    "precision": "int4", "vocab": 32000, "hidden": 896, "layers": 24, "heads": 14, "kv-heads": 2, "inter": 4864,
    "context": 1024, "block": 128, "std": 0.02,
}  # fmt: skip
NAMESPACE = "slmops-bench"


@dataclass
class Measured:
    """Of one server at one number of streams: times in seconds."""

    tokens: int = 0
    wall: float = 0.0
    first: list[float] = field(default_factory=list)  # from sending to the first token
    gaps: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # tokens per second, by round

    def report(self, rss: int) -> dict[str, float]:
        """The machine-readable row."""
        return {
            "tokens_per_second": self.tokens / self.wall,
            "tokens_per_second_min": min(self.speeds),
            "tokens_per_second_max": max(self.speeds),
            "ttft_p50": quantile(self.first, 0.5),
            "ttft_p95": quantile(self.first, 0.95),
            "itl_p50": quantile(self.gaps, 0.5),
            "itl_p99": quantile(self.gaps, 0.99),
            "rss_bytes": rss,
        }


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Request:
    """What one request asks for."""

    prompt: list[int]
    tokens: int


def requests(streams: int, number: int, vocab: int) -> list[list[Request]]:
    """For each stream of a round; no two prompts begin alike, so that no cache helps."""
    draw = random.Random(f"{streams}/{number}")

    def one() -> Request:
        return Request([draw.randrange(3, vocab) for _ in range(draw.randint(32, 512))], draw.randint(32, 128))

    return [[one() for _ in range(EACH)] for _ in range(streams)]


class Server:
    """A server process on this machine."""

    def __init__(self, name: str, model: Path, threads: int) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT / "images/server"), "ORT_DISABLE_TELEMETRY": "1"}
        self.ours = name.startswith("slmops")
        if self.ours:
            self._port = free_port()
            options = ["--port", str(self._port), "--threads", str(threads), "--slots", str(SLOTS)]
            command = ["-m", "slmops_server", "--model", str(model), "--served-name", "m", "--host", "127.0.0.1"]
            command += [*options, "--log-level", "warning"]
        else:
            command = [str(Path(__file__).with_name("serving_peers.py")), name.removeprefix("genai-")]
            command += [str(model), str(threads), str(SLOTS)]
        self.process = subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True)
        if self.ours:
            self._wait()
        else:
            assert self.process.stdout
            self._port = int(self.process.stdout.readline())

    def _wait(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            link = http.client.HTTPConnection("127.0.0.1", self._port)
            try:
                link.request("GET", "/readyz")
                if link.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise SystemExit("failed: slmops-server does not get ready; its log is above")

    def ask(self, request: Request) -> list[float]:
        """Seconds from sending to each token that could be seen coming."""
        body: dict[str, object] = {"prompt": request.prompt, "max_tokens": request.tokens}
        if self.ours:
            body |= {"model": "m", "temperature": 0, "ignore_eos": True, "stream": True}
        link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        start = time.perf_counter()
        link.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = link.getresponse()
        if answer.status != 200:
            raise SystemExit(f"failed: {answer.status} {answer.read().decode()}")
        times = []
        while data := answer.readline() if self.ours else answer.read(1):
            if not self.ours or (data.startswith(b"data: {") and b'"finish_reason":null' in data):
                times.append(time.perf_counter() - start)
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
        self.process.terminate()
        self.process.wait()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def round_of(server: Server, work: list[list[Request]], into: Measured) -> None:
    """One round of load."""

    def stream(mine: list[Request]) -> list[list[float]]:
        return [server.ask(request) for request in mine]

    start = time.perf_counter()
    with ThreadPoolExecutor(len(work)) as pool:
        answers = [times for stream_times in pool.map(stream, work) for times in stream_times]
    wall = time.perf_counter() - start
    tokens = sum(request.tokens for mine in work for request in mine)
    into.tokens += tokens
    into.wall += wall
    into.speeds.append(tokens / wall)
    for times in answers:
        into.first.append(times[0])
        into.gaps += [b - a for a, b in pairwise(times)]


def make_model() -> Path:
    """The benchmark's model, made once by the trainer image on the local node."""
    if (MODEL / "genai_config.json").exists():
        return MODEL
    MODEL.mkdir(parents=True, exist_ok=True)
    MODEL.chmod(0o777)  # the pod is another user
    kube = Kubectl(NAMESPACE)
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    kube.delete("pod", "make-model")
    script = (ROOT / "tests/server/make_tiny_model.py").read_text(encoding="utf-8")
    arguments = [text for name, value in SHAPE.items() for text in (f"--{name}", str(value))]
    spec = pods.spec(
        local_images()["trainer"],
        ["python", "-c", script, "/model", *arguments],
        mounts={"/model": {"hostPath": {"path": str(MODEL), "type": "Directory"}}},
        imagePullPolicy="Never",
    )
    kube.apply(pods.pod("make-model", spec))
    pods.finish(kube, "make-model", 1200)
    kube.delete("pod", "make-model", wait=False)
    return MODEL


def main() -> int:
    """Measure, print, write."""
    names = ["slmops-onnxruntime", "genai-serial", "genai-static"]
    try:
        model = Path(sys.argv[1]) if len(sys.argv) > 1 else make_model()
    except (KubectlError, TimedOut) as error:
        print(f"failed: the model was not made: {error}\n  next: `make up images`, or name a model", file=sys.stderr)
        return 1
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    vocab = int(json.loads((model / "genai_config.json").read_text())["model"]["vocab_size"])
    threads = len(os.sched_getaffinity(0))
    servers = {name: Server(name, model, threads) for name in names}
    measured = {name: {streams: Measured() for streams in STREAMS} for name in names}
    try:
        for server in servers.values():  # the first request of a process pays for buffers
            server.ask(Request([5] * 64, 4))
        for number in range(rounds):
            for streams in STREAMS:
                work = requests(streams, number, vocab)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    round_of(servers[name], work, measured[name][streams])
        rows = {
            name: {str(streams): one.report(servers[name].rss) for streams, one in by_streams.items()}
            for name, by_streams in measured.items()
        }
    finally:
        for server in servers.values():
            server.stop()
    LOCAL.mkdir(exist_ok=True)
    (LOCAL / "bench-serving.json").write_text(json.dumps(rows, indent=1))
    print(f"load average {os.getloadavg()[0]:.1f}, {threads} threads, {rounds} rounds of {EACH} requests a stream")
    print(f"{'':20} streams   tokens/s (range)       TTFT p50    p95   gap p50    p99   RSS MB")
    for name, by_number in rows.items():
        for number_of_streams, row in by_number.items():
            low, high = row["tokens_per_second_min"], row["tokens_per_second_max"]
            speed = f"{row['tokens_per_second']:.1f} ({low:.1f}-{high:.1f})"
            times = [f"{row[key] * 1e3:7.0f}" for key in ("ttft_p50", "ttft_p95", "itl_p50", "itl_p99")]
            print(f"{name:20} {number_of_streams:>7}   {speed:20} {' '.join(times)} {row['rss_bytes'] / 1e6:8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
