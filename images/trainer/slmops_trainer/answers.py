"""The teacher's answers on disk: append-only JSONL chunks in the run's checkpoint, so that nothing is asked twice."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from slmops_trainer.teacher import Reply, Sampling

PART = "generation"  # the checkpoint's subfolder
OPEN = ".open.jsonl"  # hidden, so that no checkpoint takes it along half written
SMALL_CHUNKS = 32  # this many are merged into one, so that a long run does not end in ten thousand files


def answer_key(messages: Sequence[dict[str, str]], sample: int, model: str, sampling: Sampling) -> str:
    """Identity of an answer: the question as asked, the number of the sample, and how it was drawn."""
    text = json.dumps([list(messages), sample, model, asdict(sampling)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Answers:
    """Answers by key. `add` writes through to an open chunk; `seal` makes it part of the next checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._replies: dict[str, Reply] = {}
        self._open: IO[str] | None = None
        for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
            self._read(path)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        """The saved answer, if there is one."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Keep an answer."""
        if self._open is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open = (self._folder / OPEN).open("w", encoding="utf-8")
        self._open.write(json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n")
        self._open.flush()
        self._replies[key] = reply

    def seal(self) -> bool:
        """Close the open chunk, on the disk and under its final name. False when nothing is new."""
        if self._open is None:
            return False
        os.fsync(self._open.fileno())
        self._open.close()
        self._open = None
        (self._folder / OPEN).rename(self._folder / f"small-{self._next():06d}.jsonl")
        small = sorted(self._folder.glob("small-*.jsonl"))
        if len(small) >= SMALL_CHUNKS:
            self._merge(small)
        return True

    def _next(self) -> int:
        """A number that no chunk has had: chunks never change once they have a name."""
        return 1 + max((int(path.stem.rpartition("-")[2]) for path in self._folder.glob("*-*.jsonl")), default=0)

    def _merge(self, small: Sequence[Path]) -> None:
        target = self._folder / OPEN
        with target.open("wb") as stream:
            for path in small:
                stream.write(path.read_bytes())
            stream.flush()
            os.fsync(stream.fileno())
        target.rename(self._folder / f"large-{self._next():06d}.jsonl")
        for path in small:
            path.unlink()

    def _read(self, path: Path) -> None:
        with path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                row = json.loads(line)
                self._replies[row["key"]] = Reply(row["text"], row["finish"], row["tokens"])
