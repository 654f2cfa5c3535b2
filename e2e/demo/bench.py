"""Runs in the server image: serves the models on this pod's CPUs, asks all of them the same, and counts.

    python3 -m demo.bench '{"teacher": "oci://...", "int4": "oci://..."}'

Every model is pulled from the registry and served by the image's own slmops-server on the loopback; answers come over
HTTP, greedily. Latency is measured one request at a time on the same held-out messages, in ROUNDS rounds through all
models whose order alternates; the last line printed is the result as JSON.
"""

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from demo import task

SEED = 7
ROUNDS = 10
TIMED = 20  # messages of one round, of each model
CLIENTS = 8  # for accuracy, where time does not count
MAX_TOKENS = 48
FLOAT_BYTES = 4  # the KV cache is fp32 on a CPU, whatever the weights are
WORK = Path("/tmp/models")


class Server:
    """slmops-server with one model while the block runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def __enter__(self) -> "Server":
        program = [
            "slmops-server",
            "--model",
            str(self.folder),
            "--served-name",
            "model",
            "--host",
            "127.0.0.1",
            "--log-level",
            "warning",
        ]
        self.process = subprocess.Popen([*program, "--port", str(self.port), "--drain-grace", "0"], stdout=sys.stderr)
        deadline = time.monotonic() + 120
        while not self._ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"slmops-server ended with {self.process.returncode} on {self.folder.name}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"slmops-server was not ready within 120 s on {self.folder.name}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


class Client:
    """One kept connection."""

    def __init__(self, server: Server) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)

    def ask(self, text: str, max_tokens: int = MAX_TOKENS) -> tuple[str, dict[str, int], float]:
        """(answer, usage, seconds) of one message."""
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        payload = json.dumps(body)
        began = time.perf_counter()
        self.connection.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        raw = answer.read()
        took = time.perf_counter() - began
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {raw[:300]!r}")
        value = json.loads(raw)
        return value["choices"][0]["message"]["content"], value["usage"], took


def accuracy(server: Server, sets: dict[str, list[task.Example]]) -> dict[str, float]:
    """Share of answers equal to the right one, by set."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [Client(server) for _ in range(CLIENTS)]

        def work(index: int, examples: list[task.Example]) -> int:
            return sum(clients[index].ask(example.text)[0] == example.answer for example in examples[index::CLIENTS])

        return {
            name: sum(pool.map(lambda index, found=examples: work(index, found), range(CLIENTS))) / len(examples)
            for name, examples in sets.items()
        }


def sizes(folder: Path, tokens: float) -> dict[str, float]:
    """Bytes: `file_bytes` all files, `model_memory_bytes` the graph with its weights and the KV cache of one answer."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    weights = sum(path.stat().st_size for path in files if ".onnx" in path.name)
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    kv = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * tokens * FLOAT_BYTES
    return {
        "file_bytes": sum(path.stat().st_size for path in files),
        "weight_bytes": weights,
        "kv_bytes": round(kv),
        "model_memory_bytes": round(weights + kv),
    }


def measure(models: dict[str, Path], sets: task.Sets) -> dict[str, dict[str, Any]]:
    """All figures by model. The servers stand side by side and one of them is asked at a time: a round is over in
    seconds, so that what disturbs the machine for longer disturbs all models alike.
    """
    held_out = sets.known + sets.new
    graded = {name: getattr(sets, name) for name in ("known", "new", "security_known", "security_new")}
    found: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in models}
    tokens: dict[str, list[int]] = {name: [] for name in models}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(Server(folder)) for name, folder in models.items()}
        for name, server in servers.items():
            print(f"accuracy: {name}", file=sys.stderr, flush=True)
            found[name]["accuracy"] = accuracy(server, graded)
        clients = {name: Client(server) for name, server in servers.items()}
        for turn in range(ROUNDS):
            print(f"latency: round {turn + 1} of {ROUNDS}", file=sys.stderr, flush=True)
            texts = [example.text for example in held_out[turn :: len(held_out) // TIMED][:TIMED]]
            for name in list(models) if turn % 2 == 0 else list(reversed(models)):
                client = clients[name]
                client.ask(texts[0])  # warm
                answers = [client.ask(text) for text in texts]
                shortest = [client.ask(text, max_tokens=1) for text in texts]
                found[name]["rounds"].append(
                    {
                        "latency_seconds": statistics.median(seconds for _, _, seconds in answers),
                        "one_token_seconds": statistics.median(seconds for _, _, seconds in shortest),
                        "tokens_per_second": sum(usage["completion_tokens"] for _, usage, _ in answers)
                        / sum(seconds for _, _, seconds in answers),
                    }
                )
                tokens[name] += [usage["total_tokens"] for _, usage, _ in answers]
    for name, folder in models.items():
        rounds = found[name]["rounds"]
        found[name] |= {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        found[name]["tokens"] = statistics.mean(tokens[name])
        found[name] |= sizes(folder, found[name]["tokens"])
    return found


def main(argv: list[str]) -> int:
    """Pull, measure, print."""
    from slmops_artifacts import pull

    models = {}
    for name, uri in json.loads(argv[0]).items():
        models[name] = WORK / name
        pull(uri, models[name])
    found = measure(models, task.make_sets(SEED))
    print(json.dumps({"cpus": len(os.sched_getaffinity(0)), "models": found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
