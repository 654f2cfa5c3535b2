"""The teacher's answers on disk, so that nothing is asked twice: not by the next pod, not by the next object.

A run keeps its answers in append-only JSONL chunks in its checkpoint. Once it has asked, or failed in asking, it leaves
all of them beside its output, where a later object with that output finds them: a spec that turned out wrong is
corrected by a new object, and the teacher's answers are the dear part of the old one.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from slmops.api.run import TeacherEndpoint
from slmops_artifacts import ArtifactError
from slmops_artifacts.uris import OciRef, parse
from slmops_trainer.checkpoints import DAMAGED, Checkpoints
from slmops_trainer.failure import RunFailure
from slmops_trainer.replies import CUT_OFF, Reply
from slmops_trainer.teacher import Sampling

if TYPE_CHECKING:
    from slmops_trainer.context import Context

PART = "generation"  # the checkpoint's subfolder
SPENT = "spent "  # begins the key of a row that is no answer
SHARED, SHARED_TAG = "answers.jsonl", "slmops-answers"
OPEN = ".open.jsonl"  # hidden, so that no checkpoint takes it along half written
SIZES = ("small", "large", "huge")  # of chunks
MERGED = 32  # this many of a size become one of the next, so that a long run does not end in ten thousand files

log = logging.getLogger("slmops")


def teacher_key(endpoint: TeacherEndpoint) -> str:
    """Identity of a teacher: where it is, what it is called there, and the model behind it, if it is ours.

    A model without a digest, named by a URI, is told by its revision.
    """
    behind = [row.digest for row in endpoint.lineage[:1]] or [endpoint.revision] * bool(endpoint.revision)
    return json.dumps([endpoint.url, endpoint.model, *behind])


def answer_key(
    messages: Sequence[dict[str, str]], sample: int, teacher: str, sampling: Sampling, seed: int, *, limit: bool = True
) -> str:
    """Identity of an answer: the question as asked, the number of the sample, who is asked, and how it is drawn.

    `limit`: its longest length is a part of that. An answer that came to its own end is the same with another.
    """
    drawn = asdict(sampling)
    if not limit:
        del drawn["max_tokens"]
    text = json.dumps([list(messages), sample, teacher, drawn, seed], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _Row(NamedTuple):
    """A line of a file.

    whole     the key without the limit, of an answer that came to its own end; else empty
    recalled  an earlier object has paid for it
    """

    key: str
    reply: Reply
    whole: str = ""
    recalled: bool = False


class Answers:
    """Answers by key. `add` writes through to an open chunk; `seal` makes it part of the next checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[str, _Row] = {}
        # Of earlier objects there may be many more than this run asks for: they stay on the disk.
        self._earlier: dict[str, int] = {}  # where the line of each begins, by both keys, in this file:
        self._earlier_file = folder
        self._open: IO[bytes] | None = None
        for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
            self._rows |= {row.key: row for row, _ in _rows(path)}

    def __len__(self) -> int:
        return sum(not key.startswith(SPENT) for key in self._rows)

    @property
    def recalled(self) -> int:
        """How many were found among the answers of earlier objects, over all pods of the run."""
        return sum(row.recalled for row in self._rows.values())

    @property
    def empty(self) -> bool:
        """Whether there is nothing to save: no answer, and nothing that was spent in vain."""
        return not self._rows

    def get(self, key: str, whole: str = "", limit: int = 0) -> Reply | None:
        """The saved answer, if there is one; an earlier object's becomes one of this run.

        `whole`: the key without the limit, by which an earlier answer is found that ended by itself and has no more
        than `limit` tokens.
        """
        start = self._earlier.get(key, self._earlier.get(whole))
        if key not in self._rows and start is not None:
            row = _parse(_line_at(self._earlier_file, start))
            if row.key == key or row.reply.tokens <= limit:
                self.add(key, row.reply, whole, recalled=True)
        return self._rows[key].reply if key in self._rows else None

    def add(self, key: str, reply: Reply, whole: str = "", *, recalled: bool = False) -> None:
        """Keep an answer. `whole`: its key without the limit; `recalled`: an earlier object has paid for it."""
        if self._open is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open = (self._folder / OPEN).open("wb", buffering=0)
        end = self._open.tell()
        row = _Row(key, reply, "" if reply.finish in CUT_OFF else whole, recalled)
        line = _line(row)
        try:
            while line:
                line = line[self._open.write(line) :]
        except OSError:
            # A full disk takes a part of a line, which would spoil all that came before it.
            self._open.truncate(end)
            raise
        self._rows[key] = row

    def spend(self, key: str, tokens: int) -> None:
        """Keep what a question cost that got no answer, or got it once more."""
        self.add(SPENT + key, Reply("", "", self.spent(key) + tokens))

    def spent(self, key: str) -> int:
        """Tokens that a question cost beside its answer, over all pods of the run."""
        row = self._rows.get(SPENT + key)
        return row.reply.tokens if row else 0

    def cost(self, key: str) -> int:
        """Tokens that a question cost, with its answer, over all pods of the run."""
        row = self._rows.get(key)
        return self.spent(key) + (row.reply.tokens if row and not row.recalled else 0)

    def seal(self) -> bool:
        """Close the open chunk, on the disk and under its final name. False when nothing is new."""
        if self._open is None:
            return False
        os.fsync(self._open.fileno())
        self._open.close()
        self._open = None
        (self._folder / OPEN).rename(self._folder / f"small-{self._next():06d}.jsonl")
        for size, larger in pairwise(SIZES):
            chunks = sorted(self._folder.glob(f"{size}-*.jsonl"))
            if len(chunks) >= MERGED:
                self._merge(chunks, larger)
        return True

    def _next(self) -> int:
        """A number that no chunk has had: chunks never change once they have a name."""
        return 1 + max((int(path.stem.rpartition("-")[2]) for path in self._folder.glob("*-*.jsonl")), default=0)

    def _merge(self, chunks: Sequence[Path], larger: str) -> None:
        target = self._folder / OPEN
        with target.open("wb") as stream:
            for path in chunks:
                stream.write(path.read_bytes())
            stream.flush()
            os.fsync(stream.fileno())
        target.rename(self._folder / f"{larger}-{self._next():06d}.jsonl")
        for path in chunks:
            path.unlink()

    def recall(self, shared: Checkpoints) -> None:
        """Look among the answers of earlier objects, too; not if the store has damaged them, for it is a saving only.

        Raises the failures of a store that is away: what lies there has been paid for.
        """
        self._earlier_file = shared.folder / SHARED
        if not _loads(shared) or not self._earlier_file.is_file():
            return
        try:
            self._earlier = {key: at for row, at in _rows(self._earlier_file) for key in (row.key, row.whole) if key}
        except (ValueError, KeyError, TypeError):
            log.warning("Ignored answers that another version of this program left")

    def share(self, shared: Checkpoints, patience: float | None = None) -> None:
        """Leave all answers to later objects. This run has its own already: a failure is told, not raised.

        `shared`: not loaded yet, for other objects may have left theirs since this one looked.
        `patience`: seconds for which a store that is away is waited for.
        """
        ours = {key: row for key, row in self._rows.items() if not key.startswith(SPENT)}
        if ours.keys() <= self._earlier.keys():
            return
        try:
            path = shared.folder / SHARED
            known = _keys(path) if _loads(shared, patience) else set()
            fresh = [row for key, row in ours.items() if key not in known]
            if fresh:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab" if known else "wb") as stream:
                    stream.writelines(map(_line, fresh))
                shared.save(patience=patience)
        except (RunFailure, OSError) as error:
            log.warning("The answers were not left for later objects: %s", error)


def shared(ctx: "Context", folder: str) -> Checkpoints:
    """Where the answers for one output lie, whatever the object that asks; a copy of them is put into `work/folder`."""
    ref = parse(ctx.spec.output)
    if isinstance(ref, OciRef):
        uri = f"oci://{ref.host}/{ref.repository}:{SHARED_TAG}"
    else:
        uri = f"{ctx.spec.output.rstrip('/')}-answers"
    return Checkpoints(uri, ctx.work / folder, "", ctx.started)  # of no one run: all of them may read it


def _loads(shared: Checkpoints, patience: float | None = None) -> bool:
    """Whether there is something, and whole. Raises the failures of a store that is away."""
    try:
        return shared.load(patience) is not None
    except RunFailure as failure:
        cause = failure.__cause__
        if not (isinstance(cause, ArtifactError) and cause.reason in DAMAGED):
            raise
        log.warning("Ignored the answers of earlier objects: %s", failure.message)
        return False


def _line(row: _Row) -> bytes:
    more = {name: value for name, value in (("whole", row.whole), ("recalled", row.recalled)) if value}
    return (json.dumps({"key": row.key, **more, **asdict(row.reply)}, ensure_ascii=False) + "\n").encode()


def _line_at(path: Path, start: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.readline()


def _parse(line: bytes) -> _Row:
    row = json.loads(line)
    reply = Reply(row["text"], row["finish"], row["tokens"])
    return _Row(row["key"], reply, row.get("whole", ""), row.get("recalled", False))


def _rows(path: Path) -> Iterator[tuple[_Row, int]]:
    """Each line and its first byte. Raises ValueError, KeyError or TypeError for what is none of ours."""
    start = 0
    with path.open("rb") as stream:
        for line in stream:
            yield _parse(line), start
            start += len(line)


def _keys(path: Path) -> set[str]:
    """Those in a file; none if it is not there, or of another version of this program."""
    try:
        return {row.key for row, _ in _rows(path)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()
