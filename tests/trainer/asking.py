"""What the tests of asking share: pods on one store, and waiting for what threads do."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmops_trainer.failure import RunFailure

TEXTS = [f"question {number}" for number in range(12)]
STORE = "pvc://store/checkpoint"


def upper(text: str) -> str:
    return text.upper()


def saved(tmp_path: Path) -> int:
    """Answers in the published checkpoint."""
    folder = tmp_path / "store/checkpoint/generation"
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl")) if folder.is_dir() else 0


def wait_until(true: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except RunFailure as failure:
            found.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found
