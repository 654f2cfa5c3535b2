"""`make bench-serving`: slmops-server beside others. Prints tables, writes .local/bench-serving.json.

python -m kit.bench_serving [--block 128|32] [--rounds N] [--each N] [--streams 1,2,4,8,16] [--servers A,B]

Closed loop: each of 1 to 16 streams sends its next request when its last answer is whole. Prompts of 32 to 512 random
tokens, answers of 32 to 128, the same for every server. The servers take turns, in changing order. Then prompts alone:
one after the other, each with an answer of one token. Then open loop: while two streams of short prompts run, a prompt
of 512 tokens arrives every few seconds, as it would in an office.
"""

import argparse
import json
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from kit.kubectl import LOCAL, KubectlError, TimedOut
from kit.serving_models import SHAPE, kernels, make
from kit.serving_servers import KINDS, Request, Server
from localkube.say import Failure

STREAMS = (1, 2, 4, 8, 16)
LEAST = 4  # requests of a round
PROMPTS = 6  # alone, of LONG tokens
ARRIVALS = 3  # long prompts
ARRIVAL_EVERY = 8.0  # seconds
LONG = 512  # tokens
ARRIVAL = (LONG, 8)  # tokens of prompt and answer
RUNNING = (32, 128)  # the same of what runs meanwhile, on two streams


@dataclass
class Measured:
    """Of one server at one number of streams: times in seconds."""

    tokens: int = 0
    wall: float = 0.0
    first: list[float] = field(default_factory=list)  # from sending to the first token
    gaps: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # tokens per second, by round
    rss: int = 0  # bytes, the most

    def note(self, answers: list[list[float]]) -> None:
        """Times as Server.ask gives them."""
        for times in answers:
            self.first.append(times[1] - times[0])
            self.gaps += [b - a for a, b in pairwise(times[1:])]

    def report(self) -> dict[str, float]:
        """The machine-readable row."""
        return {
            "tokens_per_second": self.tokens / self.wall,
            "tokens_per_second_min": min(self.speeds),
            "tokens_per_second_max": max(self.speeds),
            "ttft_p50": quantile(self.first, 0.5),
            "ttft_p95": quantile(self.first, 0.95),
            "itl_p50": quantile(self.gaps, 0.5),
            "itl_p99": quantile(self.gaps, 0.99),
            "rss_bytes": self.rss,
        }


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def prompt(draw: random.Random, tokens: int, vocab: int) -> list[int]:
    """Random tokens without the special ones: no two begin alike, so that no cache helps."""
    return [draw.randrange(3, vocab) for _ in range(tokens)]


def requests(streams: int, each: int, number: int, vocab: int) -> list[Request]:
    """Of a round, in the order of sending."""
    draw = random.Random(f"{streams}/{number}")
    count = max(LEAST, each * streams)
    return [Request(prompt(draw, draw.randint(32, LONG), vocab), draw.randint(32, 128)) for _ in range(count)]


def round_of(server: Server, streams: int, work: list[Request], into: Measured) -> None:
    """One round of closed loop."""
    left, turn = iter(work), threading.Lock()

    def stream() -> list[list[float]]:
        answers: list[list[float]] = []
        while True:
            with turn:
                request = next(left, None)
            if request is None:
                return answers
            answers.append(server.ask(request))

    start = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        running = [pool.submit(stream) for _ in range(streams)]
        into.note([times for one in running for times in one.result()])
    wall = time.monotonic() - start
    tokens = sum(request.tokens for request in work)
    into.tokens += tokens
    into.wall += wall
    into.speeds.append(tokens / wall)
    into.rss = max(into.rss, server.rss)


def prompts(server: Server, vocab: int) -> list[float]:
    """Tokens of a prompt per second, of each prompt alone: until the first token of its answer."""
    draw = random.Random("prompts")
    asked = (server.ask(Request(prompt(draw, LONG, vocab), 1)) for _ in range(PROMPTS))
    return sorted(LONG / (times[1] - times[0]) for times in asked)


@dataclass
class Arrivals:
    """What long prompts do to the answers that run: seconds."""

    gap_p50: float
    gap_p99: float
    ttft_max: float  # of the long prompts

    @property
    def ratio(self) -> float:
        """The 99th percentile of the gaps against their median."""
        return self.gap_p99 / self.gap_p50


def arrivals(server: Server, vocab: int) -> Arrivals:
    """The open loop."""
    ended = threading.Event()

    def runs(seed: int) -> list[float]:
        draw = random.Random(f"running {seed}")
        gaps: list[float] = []
        while not ended.is_set():
            times = server.ask(Request(prompt(draw, RUNNING[0], vocab), RUNNING[1]))
            gaps += [b - a for a, b in pairwise(times[1:])]
        return gaps

    def arrives(seed: int) -> float:
        time.sleep(ARRIVAL_EVERY * seed)  # the load itself, not a wait for anything
        times = server.ask(Request(prompt(random.Random(f"arrival {seed}"), ARRIVAL[0], vocab), ARRIVAL[1]))
        return times[1] - times[0]

    with ThreadPoolExecutor(2 + ARRIVALS) as pool:
        running = [pool.submit(runs, seed) for seed in range(2)]
        came = [pool.submit(arrives, seed) for seed in range(1, ARRIVALS + 1)]
        first = [one.result() for one in came]
        ended.set()
        gaps = [gap for one in running for gap in one.result()]
    return Arrivals(quantile(gaps, 0.5), quantile(gaps, 0.99), max(first))


def measure(args: argparse.Namespace, models: dict[str, Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Rows by server and number of streams; the other figures are printed as they come."""
    vocab, threads = int(SHAPE["vocab"]), len(os.sched_getaffinity(0))
    names, streams = args.servers, [int(text) for text in args.streams.split(",")]
    servers: dict[str, Server] = {}
    measured = {name: {count: Measured() for count in streams} for name in names}
    load = os.getloadavg()[0]
    print(f"blocks of {args.block}, load average {load:.1f}, {threads} threads, {args.rounds} rounds", flush=True)
    try:
        for name in names:
            servers[name] = Server(KINDS[name], models[KINDS[name].form], threads, max(streams))
            print(f"{name:20} ready after {servers[name].ready_seconds:.1f} s", flush=True)
            servers[name].ask(Request([5] * 64, 4))  # the first request of a process pays for buffers
        for number in range(args.rounds):
            for count in streams:
                work = requests(count, args.each, number, vocab)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    round_of(servers[name], count, work, measured[name][count])
                last = (f"{name} {measured[name][count].speeds[-1]:.1f}" for name in names)
                print(f"round {number + 1}, {count} streams, tokens/s: {', '.join(last)}", flush=True)
        table(rows := {n: {str(c): m.report() for c, m in by.items()} for n, by in measured.items()})
        print(f"prompts of {LONG} tokens alone: their tokens/s, median (range)")
        for name in names:
            speeds = prompts(servers[name], vocab)
            print(f"{name:20} {quantile(speeds, 0.5):.0f} ({speeds[0]:.0f}-{speeds[-1]:.0f})", flush=True)
        if args.arrivals:
            print("512-token prompts arriving: gap p50, p99, ratio; longest TTFT of an arrival")
            for name in names:
                seen = arrivals(servers[name], vocab)
                print(f"{name:20} {seen.gap_p50 * 1e3:.0f} ms {seen.gap_p99 * 1e3:.0f} ms {seen.ratio:.1f}; "
                      f"{seen.ttft_max:.1f} s", flush=True)  # fmt: skip
    finally:
        for server in servers.values():
            server.stop()
    return rows


def table(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """For people."""
    print(f"{'':20} streams   tokens/s (range)       TTFT p50    p95   gap p50    p99   RSS MB")
    for name, by_number in rows.items():
        for number_of_streams, row in by_number.items():
            low, high = row["tokens_per_second_min"], row["tokens_per_second_max"]
            speed = f"{row['tokens_per_second']:.1f} ({low:.1f}-{high:.1f})"
            times = [f"{row[key] * 1e3:7.0f}" for key in ("ttft_p50", "ttft_p95", "itl_p50", "itl_p99")]
            print(f"{name:20} {number_of_streams:>7}   {speed:20} {' '.join(times)} {row['rss_bytes'] / 1e6:8.0f}")
    sys.stdout.flush()


def known(text: str) -> list[str]:
    """Names of servers, separated by commas. ArgumentTypeError when there is no such server."""
    names = text.split(",")
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"no such server: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return names


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m kit.bench_serving")
    parser.add_argument("--block", type=int, default=128, choices=(128, 32), help="of the benchmark's int4 weights")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--each", type=int, default=2, help="requests of each stream in a round")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)))
    parser.add_argument("--servers", type=known, default=list(KINDS), help=",".join(KINDS))
    parser.add_argument("--no-arrivals", dest="arrivals", action="store_false", help="leave the open loop out")
    args = parser.parse_args()
    try:
        models = {form: make(form, args.block) for form in dict.fromkeys(KINDS[name].form for name in args.servers)}
        kernels()
        for name in args.servers:
            KINDS[name].program()
    except (KubectlError, TimedOut) as error:
        print(f"failed: the model was not made: {error}\n  next: make up images", file=sys.stderr)
        return 1
    except Failure as failure:
        print(failure.report(), file=sys.stderr)
        return 1
    rows = measure(args, models)
    LOCAL.mkdir(exist_ok=True)
    (LOCAL / "bench-serving.json").write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
