"""Runs in a pod: asks the deployment without a pause until SIGTERM, counts every request, ends with the count.

    python3 -m demo.traffic http://assistant:8000/v1 assistant

One JSON line a second: {"sent", "lost", "median_ms", "reasons", "final"}; the last one has final = true.
"""

import json
import signal
import statistics
import sys
import threading

from demo.phrases import KNOWN
from demo.task import Writer
from kit.traffic import Traffic


def line(traffic: Traffic, *, final: bool) -> str:
    """What the runner reads."""
    tally = traffic.tally
    recent = tally.latencies[-200:]
    return json.dumps(
        {
            "sent": tally.sent,
            "lost": tally.lost,
            "median_ms": round(1000 * statistics.median(recent), 1) if recent else None,
            "reasons": tally.reasons[-5:],
            "final": final,
        }
    )


def main(url: str, model: str) -> None:
    """Ask until told to stop."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    writer = Writer(KNOWN, "traffic")
    prompts = [writer.example().text for _ in range(500)]
    with Traffic(url, model, prompts, clients=3, pause=0.05, max_tokens=48) as traffic:
        while not stop.wait(1):
            print(line(traffic, final=False), flush=True)
    print(line(traffic, final=True), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
