"""Latency of one answer, and where the time goes: bare session, engine in this process, server over HTTP.

    python tests/server/bench_latency.py teacher=/tmp/teacher student=/tmp/student [--prompt 24] [--tokens 40]

All measurements alternate round by round, so that a noisy moment hits all of them. Milliseconds; p50 (min).
"""

import argparse
import http.client
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "images" / "server"))

from server_harness import Server

from slmops_server import model_folder
from slmops_server.engines import choose
from slmops_server.engines.base import Engine, Job, Sampling


def in_process(engine: Engine, prompt: list[int], count: int) -> None:
    engine.submit(Job(id=1, prompt=prompt, max_tokens=count, sampling=Sampling(temperature=0), ignore_eos=True))
    while engine.busy:
        engine.step()


def over_http(server: Server, connection: http.client.HTTPConnection, body: dict[str, object]) -> None:
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    prompt = list(range(3, 3 + args.prompt))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
    runs: dict[str, Callable[[], None]] = {}
    servers = []
    for text in args.models:
        name, _, path = text.partition("=")
        folder = model_folder.read(Path(path))
        for kind in ("onnxruntime", "genai"):
            engine = choose.load(folder, choose.EngineOptions(engine=kind, threads=args.threads, slots=1))
            runs[f"{name}: engine {kind}"] = lambda e=engine: in_process(e, prompt, args.tokens)  # type: ignore[misc]
        log = Path(tempfile.mkdtemp()) / "log"
        server = Server(log, "--threads", str(args.threads), model=Path(path))
        servers.append(server)
        link = http.client.HTTPConnection("127.0.0.1", server.port)
        runs[f"{name}: server, JSON"] = lambda s=server, c=link: over_http(s, c, body)  # type: ignore[misc]
        runs[f"{name}: server, SSE"] = lambda s=server, c=link: over_http(s, c, body | {"stream": True})  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    print(f"load average {os.getloadavg()[0]:.1f}, {args.prompt} tokens in, {args.tokens} out")
    for name, values in times.items():
        values.sort()
        print(f"{name:32} {values[len(values) // 2] * 1e3:7.2f} ({values[0] * 1e3:.2f})")
    for server in servers:
        print(
            "threads",
            server.metric("slmops_engine_threads"),
            "engine RSS MB",
            rss(server.engine_pid),
            "front",
            rss(server.process.pid),
        )
        server.close()


def rss(pid: int | None) -> int:
    """Megabytes of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000


if __name__ == "__main__":
    main()
