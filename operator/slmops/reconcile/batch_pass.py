"""What a decision about a batch object is made of, and how its status is put together. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from slmops.api.batch import BatchSpec
from slmops.api.meta import STAGE_STARTING, BatchStatus, Condition, Failure, Progress
from slmops.api.times import parse, stamp
from slmops.cluster.port import Key, Object
from slmops.reconcile import conditions
from slmops.reconcile.state import Event, Plan

ANNOTATION_INPUTS = "slmops.dev/inputs"  # on the Job: hashes of the ConfigMaps and Secrets it was made with
ANNOTATION_IMAGE = "slmops.dev/image"  # on the Job: the operator's image it was made with; webhooks may rewrite its own

PROGRESS_GAP = timedelta(seconds=10)  # between two writes; a run of seconds has none
PROGRESS_PERCENT = 5  # a smaller move is not worth a write
# Unless the last write is older than a twentieth of the run, within these: a run of a day is not written every minute.
PROGRESS_SHARE, PROGRESS_AGE, PROGRESS_AGE_MAX = 20, timedelta(seconds=30), timedelta(minutes=5)


@dataclass(frozen=True)
class Blocked:
    """Why the Job cannot be made now; `after`: when to look again, None where an event will tell."""

    reason: str
    message: str
    after: float | None


@dataclass(frozen=True)
class Seen:
    """The world of one object, as far as its state asks for it."""

    job: Object | None = None
    pods: tuple[Object, ...] = ()  # of this Job, oldest first
    former: tuple[Object, ...] = ()  # pods of earlier Jobs that have not ended
    wanted: Object | None = None  # the Job as it would be made now, where one may be wanted
    blocked: Blocked | None = None  # why `wanted` is None
    inputs: str = ""  # hashes of the inputs as they are now (needs.check); empty where they were not looked at
    events: tuple[Object, ...] = ()  # about the Job, or its pod, oldest first, where a pod is missed
    progress: Progress | None = None
    image: str = ""  # the operator's, for pods whose spec names none


@dataclass(frozen=True)
class Pass:
    """One decision's arguments."""

    obj: Object
    spec: BatchSpec
    status: BatchStatus
    seen: Seen
    now: datetime

    @property
    def generation(self) -> int:
        """The generation that is decided on."""
        return int(self.obj["metadata"].get("generation", 0))

    @property
    def job_key(self) -> Key:
        """The Job's key."""
        job = self.seen.job or self.seen.wanted or {}
        return Key("Job", self.obj["metadata"]["namespace"], job["metadata"]["name"])

    def stamp(self) -> str:
        """The present, for status."""
        return stamp(self.now)

    def until(self, time: str) -> float:
        """Seconds until `time`; 0 where it is past."""
        return max(0.0, (parse(time) - self.now).total_seconds())


def going_on(p: Pass, phase: str, reason: str, message: str, *, suspended: bool = False, **fields: Any) -> BatchStatus:
    """Put together the status of an object that is on its way: Reconciling=True."""
    kept = conditions.without(p.status.conditions, conditions.COMPLETE, conditions.FAILED, conditions.SUSPENDED)
    said = conditions.reconciling(kept, reason, message, generation=p.generation, now=p.now)
    if suspended:
        before = [c for c in p.status.conditions if c.type == conditions.SUSPENDED]
        said = [*said, *_one(before, conditions.SUSPENDED, reason, message, p)]
    return _status(p, phase, said, fields)


def complete(p: Pass, message: str, **fields: Any) -> BatchStatus:
    """Put together the status of an object that has reached its end."""
    before = [c for c in p.status.conditions if c.type == conditions.COMPLETE]
    said = conditions.ready([], "Succeeded", message, generation=p.generation, now=p.now)
    return _status(p, "Succeeded", [*said, *_one(before, conditions.COMPLETE, "Succeeded", message, p)], fields)


def failed(p: Pass, failure: Failure, **fields: Any) -> BatchStatus:
    """Put together the status of an object that has failed."""
    kept = [c for c in p.status.conditions if c.type in (conditions.READY, conditions.STALLED)]
    before = [c for c in p.status.conditions if c.type == conditions.FAILED]
    said = conditions.stalled(kept, failure.reason, failure.message, generation=p.generation, now=p.now)
    said = [*said, *_one(before, conditions.FAILED, failure.reason, failure.message, p)]
    return _status(p, "Failed", said, {"last_failure": failure, **fields})


def plan(status: BatchStatus, *events: Event, requeue: float | None = None, **more: Any) -> Plan:
    """Make the plan that leads to `status`."""
    return Plan(status=status.wire(), events=tuple(events), requeue=requeue, **more)


def progress(p: Pass) -> Progress | None:
    """Progress to be written: what was read, if it moved enough to be worth a write, else what stands there."""
    new, old = p.seen.progress, p.status.progress
    if new is None or (old is None and new.stage == STAGE_STARTING):
        return old  # that the pod runs is told already
    last = (old and old.time) or p.status.start_time
    if last and p.now - parse(last) < PROGRESS_GAP:
        return old
    fresh = new.model_copy(update={"time": p.stamp()})
    if old is None or old.time is None or new.stage != old.stage:
        return fresh
    if abs(new.percent - old.percent) >= PROGRESS_PERCENT:
        return fresh
    same = new.model_copy(update={"time": old.time}) == old
    run = p.now - parse(p.status.start_time) if p.status.start_time else timedelta()
    age = min(max(run / PROGRESS_SHARE, PROGRESS_AGE), PROGRESS_AGE_MAX)
    return old if same or p.now - parse(old.time) < age else fresh


def _one(before: Sequence[Condition], kind: str, reason: str, message: str, p: Pass) -> list[Condition]:
    return conditions.set_condition(before, kind, True, reason, message, generation=p.generation, now=p.now)


def _status(p: Pass, phase: str, said: Sequence[Condition], fields: dict[str, Any]) -> BatchStatus:
    update = {"observed_generation": p.generation, "conditions": list(said), "phase": phase, **fields}
    return p.status.model_copy(update=update)
