"""What the front costs: HTTP, SSE, text and the way between the two processes.

python -m kit.bench_serving_front [--engines onnxruntime,openvino,llamacpp] [--streams 1,8] [--pairs N]

Each pair is one short round of the same requests to the engine alone, in a process of its own (kit.serving_bare), and
to the whole server over HTTP, streamed; which of them begins changes from pair to pair. Many short pairs, because the
speed of a rented machine drifts within seconds. Greedy, the same threads and slots. Prompts are short (16 tokens),
because the front's work is with the tokens of answers (48, all equal, so that no round ends with a lone straggler). The
client runs on the same CPUs: its CPU time for each token is printed, and is not the front's.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

from kit.bench_serving import Measured, prompt, round_of
from kit.kubectl import LOCAL, KubectlError, TimedOut
from kit.serving_models import SHAPE, make, python
from kit.serving_servers import KINDS, Request, Server, environment

PROMPT, ANSWER = 16, 48  # tokens


class Bare:
    """The engine without a front. SystemExit when it does not start."""

    def __init__(self, engine: str, interpreter: Path, model: Path, threads: int, slots: int) -> None:
        script = Path(__file__).with_name("serving_bare.py")
        self._process = subprocess.Popen(
            [str(interpreter), str(script), engine, str(model), str(threads), str(slots)],
            env=environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self._line() != "ready":
            raise SystemExit(f"failed: the engine {engine} does not start; its trace is above")

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def round_of(self, streams: int, work: list[Request]) -> float:
        """Tokens of answers per second."""
        assert self._process.stdin
        asked = {"streams": streams, "work": [(one.prompt, one.tokens) for one in work]}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return sum(one.tokens for one in work) / float(self._line())

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def requests(streams: int, number: int) -> list[Request]:
    """Of a pair: one for each stream."""
    draw, vocab = random.Random(f"front {streams}/{number}"), int(SHAPE["vocab"])
    return [Request(prompt(draw, PROMPT, vocab), ANSWER) for _ in range(streams)]


def measure(bare: Bare, server: Server, streams: int, pairs: int) -> dict[str, list[float]]:
    """Of the rounds: tokens per second by `bare` and `server`, seconds of the client's CPU time a token by `client`."""
    speeds: dict[str, list[float]] = {"bare": [], "server": [], "client": []}
    for number in range(pairs):
        work = requests(streams, number)
        for who in ("bare", "server") if number % 2 else ("server", "bare"):
            if who == "bare":
                speeds[who].append(bare.round_of(streams, work))
            else:
                used = time.process_time()
                round_of(server, streams, work, seen := Measured())
                speeds[who] += seen.speeds
                speeds["client"].append((time.process_time() - used) / seen.tokens)
    return speeds


def line(engine: str, streams: int, speeds: dict[str, list[float]]) -> str:
    """For people: medians and quarters."""
    ratios = [served / bare for bare, served in zip(speeds["bare"], speeds["server"], strict=True)]
    parts = [f"{name} {median(speeds[name]):.1f} ({spread(speeds[name], 1)})" for name in ("bare", "server")]
    return (f"{engine:12} {streams:>3} streams  {'  '.join(parts)} tokens/s; "
            f"server / bare {median(ratios):.3f} ({spread(ratios, 3)}); "
            f"client {median(speeds['client']) * 1e6:.0f} us a token")  # fmt: skip


def spread(values: list[float], digits: int) -> str:
    """The first and the third quarter."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{low:.{digits}f}-{high:.{digits}f}"


def main() -> int:
    """Measure, print, write .local/bench-serving-front.json."""
    parser = argparse.ArgumentParser(prog="python -m kit.bench_serving_front")
    parser.add_argument("--engines", default="onnxruntime,openvino,llamacpp")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--pairs", type=int, default=16)
    args = parser.parse_args()
    threads, streams = len(os.sched_getaffinity(0)), [int(text) for text in args.streams.split(",")]
    rows: dict[str, dict[int, dict[str, list[float]]]] = {}
    for engine in args.engines.split(","):
        kind = KINDS[f"slmops-{engine}"]
        try:
            model = make(kind.form, 128)
        except (KubectlError, TimedOut) as error:
            print(f"failed: the model was not made: {error}\n  next: make up images", file=sys.stderr)
            return 1
        server = Server(kind, model, threads, max(streams))
        bare = Bare(engine, python(), model, threads, max(streams))
        try:
            warm = [Request([5] * 64, 4)]
            bare.round_of(1, warm)
            server.ask(warm[0])
            for count in streams:
                rows.setdefault(engine, {})[count] = measure(bare, server, count, args.pairs)
                print(line(engine, count, rows[engine][count]), flush=True)
        finally:
            bare.stop()
            server.stop()
    (LOCAL / "bench-serving-front.json").write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
