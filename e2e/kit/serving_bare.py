"""An engine of slmops-server without its front, driven by one thread: what the server is measured against.

python serving_bare.py ENGINE MODEL THREADS SLOTS
loads the model and prints "ready"; then for each line {"streams": n, "work": [[[ids], tokens], ...]} keeps n answers
running until all are made, and prints the seconds that took.
"""

import json
import sys
import time
from pathlib import Path

from slmops_server import model_folder
from slmops_server.engines import choose
from slmops_server.engines.base import Engine, Job, Sampling


def closed_loop(engine: Engine, streams: int, work: list[tuple[list[int], int]]) -> float:
    """Seconds from the first request to the last token of the last one."""
    waiting = [
        Job(number, prompt, count, Sampling(temperature=0.0), ignore_eos=True)
        for number, (prompt, count) in enumerate(work)
    ]
    waiting.reverse()
    start = time.monotonic()
    for _ in range(min(streams, len(waiting))):
        engine.submit(waiting.pop())
    while engine.busy:
        for token in engine.step():
            if token.finish and waiting:
                engine.submit(waiting.pop())
    return time.monotonic() - start


def main() -> None:
    """Answer until the input ends."""
    name, path, threads, slots = sys.argv[1:5]
    options = choose.EngineOptions(name, int(threads), int(slots))
    engine = choose.load(model_folder.read(Path(path)), options)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(closed_loop(engine, asked["streams"], asked["work"]), flush=True)


if __name__ == "__main__":
    main()
