"""Whether slmops-server grows: 20,000 requests to a tiny model, its resident memory noted on the way.

python -m kit.bench_serving_memory [REQUESTS]

Prints bytes per request: the slope of the line through the samples of the second half. In the first half buffers,
slots and the allocator's pools reach their size.
"""

import http.client
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import linear_regression

from kit.kubectl import ROOT
from kit.serving_servers import KINDS, Server

MODEL = ROOT / "tests/server/data/tiny-int4"
VOCAB = 512
STREAMS = 4
SAMPLES = 40


def slope(samples: list[tuple[int, int]]) -> float:
    """Bytes per request, from (requests, bytes) of the second half."""
    later = samples[len(samples) // 2 :]
    return linear_regression([float(count) for count, _ in later], [float(size) for _, size in later]).slope


def some(server: Server, seed: str, count: int) -> None:
    """Requests over one connection: prompts of 1 to 60 tokens, answers of 1 to 8, streamed or not."""
    draw = random.Random(seed)
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(count):
        prompt = [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 60))]
        body = {"model": "m", "prompt": prompt, "max_tokens": draw.randint(1, 8), "stream": draw.random() < 0.5}
        link.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = link.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"failed: {answer.status} {text.decode()}")
    link.close()


def main() -> int:
    """Measure and print."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    server = Server(KINDS["slmops-onnxruntime"], MODEL, 1, STREAMS)
    samples, each, start = [], total // SAMPLES // STREAMS, time.monotonic()
    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            for sample in range(SAMPLES):
                list(pool.map(lambda one: some(server, one, each), [f"{sample}/{n}" for n in range(STREAMS)]))
                samples.append(((sample + 1) * each * STREAMS, server.rss))
    finally:
        server.stop()
    sizes = [size for _, size in samples]
    print(f"{samples[-1][0]} requests in {time.monotonic() - start:.0f} s; RSS {sizes[0] / 1e6:.1f} MB after "
          f"{samples[0][0]}, {sizes[len(sizes) // 2] / 1e6:.1f} halfway, {sizes[-1] / 1e6:.1f} at the end; "
          f"slope of the second half {slope(samples):.0f} bytes per request")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
