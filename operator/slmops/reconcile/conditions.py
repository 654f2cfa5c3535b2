"""Conditions as kstatus reads them: Ready is always there, beside it Reconciling or Stalled or neither, never both.

Ready=True: done. Reconciling=True: in progress. Stalled=True: the only "failed", for good or until somebody has mended
something. So `kubectl wait`, Flux and Helm 4's `--wait` are right without help. Batch kinds add Complete, Failed and
Suspended, absent where they are not true.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from slmops.api.meta import Condition
from slmops.api.times import parse, stamp

READY, RECONCILING, STALLED = "Ready", "Reconciling", "Stalled"
AVAILABLE = "Available"  # of a ModelDeployment: its stable revision answers, be it Ready or not
COMPLETE, FAILED, SUSPENDED = "Complete", "Failed", "Suspended"

PATIENCE_MAX = 60.0  # seconds
MESSAGE_MAX = 1024  # an object stays small; the API server's own limit is 32,768


def cut(message: str, limit: int = MESSAGE_MAX) -> str:
    """`message` on one line, at most `limit` characters, with an ellipsis where it had to be cut."""
    line = " ".join(message.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def set_condition(
    conditions: Iterable[Condition],
    kind: str,
    status: bool,
    reason: str,
    message: str,
    *,
    generation: int,
    now: datetime,
) -> list[Condition]:
    """The list with condition `kind` set; its transition time moves only where its status changes."""
    kept = list(conditions)
    word = "True" if status else "False"
    old = next((c for c in kept if c.type == kind), None)
    since = old.last_transition_time if old and old.status == word else stamp(now)
    new = Condition(
        type=kind,
        status="True" if status else "False",
        reason=reason,
        message=cut(message),
        last_transition_time=since,
        observed_generation=generation,
    )
    if old is None:
        return [*kept, new]
    return [new if c.type == kind else c for c in kept]


def without(conditions: Iterable[Condition], *kinds: str) -> list[Condition]:
    """The list without the conditions of these types."""
    return [c for c in conditions if c.type not in kinds]


def find(conditions: Iterable[Condition], kind: str) -> Condition | None:
    """The condition of this type, or None."""
    return next((c for c in conditions if c.type == kind), None)


def is_true(conditions: Iterable[Condition], kind: str) -> bool:
    """Whether the condition is there and True."""
    found = find(conditions, kind)
    return found is not None and found.status == "True"


def patiently(after: float, conditions: Iterable[Condition], now: datetime) -> float:
    """Seconds until something missing is looked for again: `after`, and up to a minute once it was long missed.

    Without it a thousand objects that nobody has wanted for days would ask as often as the one that was just made.
    """
    found = find(conditions, READY)
    if found is None or found.status == "True":
        return after
    waited = (now - parse(found.last_transition_time)).total_seconds()
    return max(after, min(waited / 20, PATIENCE_MAX))


def ready(
    conditions: Sequence[Condition], reason: str, message: str, *, generation: int, now: datetime
) -> list[Condition]:
    """Done: Ready=True, neither Reconciling nor Stalled."""
    kept = without(conditions, RECONCILING, STALLED)
    return set_condition(kept, READY, True, reason, message, generation=generation, now=now)


def reconciling(
    conditions: Sequence[Condition],
    reason: str,
    message: str,
    *,
    generation: int,
    now: datetime,
    still_ready: bool = False,
) -> list[Condition]:
    """In progress: Reconciling=True. Ready=False, unless what stood before still serves (`still_ready`)."""
    kept = without(conditions, STALLED)
    kept = set_condition(kept, READY, still_ready, reason, message, generation=generation, now=now)
    return set_condition(kept, RECONCILING, True, reason, message, generation=generation, now=now)


def stalled(
    conditions: Sequence[Condition],
    reason: str,
    message: str,
    *,
    generation: int,
    now: datetime,
    still_ready: bool = False,
) -> list[Condition]:
    """Failed until somebody changes something: Stalled=True. Ready=False, unless what stood before still serves."""
    kept = without(conditions, RECONCILING)
    kept = set_condition(kept, READY, still_ready, reason, message, generation=generation, now=now)
    return set_condition(kept, STALLED, True, reason, message, generation=generation, now=now)
