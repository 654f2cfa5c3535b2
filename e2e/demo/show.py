"""What the chain is doing, on a terminal as a table that redraws itself, elsewhere as a line for each change."""

import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

from kit.kubectl import Object

# The order in which they become ready.
CHAIN = (
    ("FineTuneJob", "teacher", "train the teacher, 10 M parameters, from right answers"),
    ("QuantizedModel", "teacher-fp32", "teacher to ONNX, fp32"),
    ("ModelDeployment", "teacher", "serve the teacher"),
    ("DistillationJob", "student", "teacher answers, student of 1 M learns"),
    ("QuantizedModel", "student-fp32", "student to ONNX, fp32"),
    ("FineTuneJob", "student-tuned", "LoRA: a label that the teacher never saw"),
    ("QuantizedModel", "student-tuned-fp32", "tuned student to ONNX, fp32"),
    ("QuantizedModel", "student-int4", "tuned student to ONNX, int4, behind a gate"),
    ("ModelDeployment", "assistant", "serve the student; later the int4 canary"),
)
PLAIN_SECONDS = 20.0  # off a terminal: say where a run stands at least so often


def clock(seconds: float) -> str:
    """m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def flat(text: str) -> str:
    """One line without control characters: what messages and logs hold must not move the cursor."""
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text)).rstrip()


@dataclass(frozen=True)
class Row:
    """One object as people read it. `seconds`: how long its work has taken, None before it began."""

    kind: str
    name: str
    what: str
    ready: bool
    stalled: bool
    phase: str
    detail: str
    seconds: float | None
    uid: str = ""

    @property
    def moving(self) -> bool:
        """A run in progress, whose detail tells something new every few seconds."""
        return self.seconds is not None and not (self.ready or self.stalled)


def condition(found: Object, name: str) -> Object:
    """One condition of an object; empty if it is absent or speaks of an older generation."""
    status = found.get("status") or {}
    if status.get("observedGeneration") != found["metadata"].get("generation"):
        return {}
    return next((c for c in status.get("conditions") or [] if c["type"] == name), {})


def _instant(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def row(kind: str, name: str, what: str, found: Object | None, now: float) -> Row:
    """Describe one object; `found` is None while the API server does not have it."""
    if found is None:
        return Row(kind, name, what, ready=False, stalled=False, phase="absent", detail="", seconds=None)
    status = found.get("status") or {}
    ready, stalled = condition(found, "Ready"), condition(found, "Stalled")
    began, ended = _instant(status.get("startTime")), _instant(status.get("completionTime"))
    return Row(
        kind,
        name,
        what,
        ready=ready.get("status") == "True",
        stalled=stalled.get("status") == "True",
        phase=status.get("phase") or "Pending",
        detail=_detail(kind, status, ready, stalled),
        seconds=None if began is None else (ended or now) - began,
        uid=found["metadata"].get("uid", ""),
    )


def _detail(kind: str, status: Object, ready: Object, stalled: Object) -> str:
    if stalled.get("status") == "True":
        return str(stalled.get("message", ""))
    if kind == "ModelDeployment":
        rollout = status.get("rollout") or {}
        parts = [f"ready {status['ready']}"] if status.get("ready") else []
        if status.get("candidate") and status.get("weight") is not None:
            parts.append(f"candidate gets {status['weight']} %")
        parts += [rollout["hold"]] if rollout.get("hold") else []
        return ", ".join(parts) or str(ready.get("message", ""))
    if ready.get("status") == "True":
        return ", ".join(str(status[key]) for key in ("quality", "size", "delta") if status.get(key))
    progress = status.get("progress")
    if not progress:
        return str(ready.get("message", ""))
    left = progress.get("etaSeconds")
    steps = f" {progress['step']}/{progress['totalSteps']}" if progress.get("totalSteps") else ""
    rest = f", {clock(left)} left" if left else ""
    return f"{progress['percent']} % {progress.get('stage', '')}{steps}{rest}  {progress.get('message', '')}".rstrip()


def holding(rows: list[Row]) -> list[Row]:
    """Those that the others wait for; the first of the unready ones if all wait."""
    unready = [each for each in rows if not each.ready]
    return [each for each in unready if each.phase != "Waiting"] or unready[:1]


class Board:
    """Shows rows: `show(rows, footer)` as often as you like."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self.stream = stream
        self.live = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.lines = 0
        self.began = self.said = time.monotonic()
        self.told: dict[str, tuple[str, float]] = {}
        self.footer = ""

    def say(self, text: str) -> None:
        """One line that stays."""
        self.lines, self.said = 0, time.monotonic()
        print(f"[{clock(time.monotonic() - self.began)}] {flat(text)}", file=self.stream, flush=True)

    def show(self, rows: list[Row], footer: str = "", key: str = "") -> None:
        """Redraw, or tell what changed. `key`: the part of the footer whose change is worth a line."""
        if self.live:
            self._draw(rows, footer)
        else:
            self._tell(rows, footer, key or footer)

    def _draw(self, rows: list[Row], footer: str) -> None:
        lines = [f"[{clock(time.monotonic() - self.began)}] {flat(footer)}"] if footer else []
        for each in rows:
            mark = "ok" if each.ready else "!!" if each.stalled else ".." if each.seconds is not None else "  "
            spent = clock(each.seconds) if each.seconds is not None else ""
            lines.append(
                f" {mark} {each.kind + '/' + each.name:36} {each.phase:12} {spent:>6}  {flat(each.detail or each.what)}"
            )
        # One column stays free: a full line would wrap on some terminals, and a wrapped one moves all below it.
        width, height = shutil.get_terminal_size()
        shown = [line[: width - 1] for line in lines[: height - 1]]
        up = f"\x1b[{self.lines}F" if self.lines else ""
        self.stream.write(up + "\x1b[J" + "".join(f"{line}\n" for line in shown))
        self.stream.flush()
        self.lines = len(shown)

    def _tell(self, rows: list[Row], footer: str, key: str) -> None:
        now = time.monotonic()
        if footer and key != self.footer:
            self.say(footer)
        self.footer = key
        held = holding(rows) if now - self.said >= PLAIN_SECONDS else []
        for each in rows:
            name, state = f"{each.kind}/{each.name}", each.phase + str(each.ready)
            before, at = self.told.get(name, ("", 0.0))
            if state == before and each not in held and not (each.moving and now - at >= PLAIN_SECONDS):
                continue
            self.told[name] = (state, now)
            spent = f" ({clock(each.seconds)})" if each.seconds is not None else ""
            self.say(f"{name} {each.phase}{spent} {each.detail}")
