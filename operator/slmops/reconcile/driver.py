"""The one driver: get -> observe -> decide -> apply -> routes -> delete -> one status write -> events.

Level-triggered: a pass asks nobody what changed. Running it twice does no more than running it once, so it may be
killed anywhere and started again; the status is written last and says only what has been done.

Where a rollout is given up, it is written first as well (Plan.status_first). What a measurement found is known to this
pass alone: killed between the routers and the status, the next one would give the requests back and measure anew.

Errors, and what becomes of them:
  Retry             Ready=False and Reconciling=True with its reason; the pass comes again
  Terminal          Stalled=True with its reason; nothing more happens until an event or the resync
  ClusterError      403, denied: Retry (a quota, a missing right, a policy); of a child 400, 413, 422: Terminal,
                    500: Retry (a webhook); all else goes up: the API server is ill, and the queue backs off
  RemoteError       Retry
  ValidationError   Terminal InvalidSpec: the object was stored under an older schema
  anything else     a bug: goes up, is logged with its trace and backs off this object alone

A plan that keeps going (Plan.keep_going) is carried out past what is refused, and its status is written: the outcome
of the first refusal is then told in that status. What was refused is tried again, at the latest when the plan wants the
next pass: its status is not all that is to be done.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from pydantic import ValidationError

from slmops.api.meta import Condition, Status
from slmops.api.times import parse
from slmops.cluster.port import Cluster, ClusterError, Key, Object
from slmops.reconcile import conditions, refusals
from slmops.reconcile.ownership import NOT_OURS, check_ours, is_ours
from slmops.reconcile.protocol import Reconciler, World
from slmops.reconcile.state import Count, Event, Plan, Retry, Routes, Terminal
from slmops.remote.errors import RemoteError
from slmops.settings import Settings

ENDS = ("Succeeded", "Failed")

log = logging.getLogger(__name__)

PushRoutes = Callable[[Routes], None]
"""Brings one router to the wanted weights and returns once it has them. Raises RemoteError."""


OnEnd = Callable[[str, str, float], None]
"""Told once of every run that ends: kind, outcome (Succeeded, Failed), seconds from its first pod to its end."""

OnCounts = Callable[[tuple[Count, ...]], None]
"""Told of a plan's counts, once its status has been written."""


def utc_now() -> datetime:
    """The clock of production."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Driver:
    """Runs passes; holds no state of its own, so any number of threads may use it, for different objects."""

    cluster: Cluster
    settings: Settings
    reconcilers: Mapping[str, Reconciler]
    push_routes: PushRoutes
    on_end: OnEnd = field(default=lambda _kind, _outcome, _seconds: None)
    on_counts: OnCounts = field(default=lambda _counts: None)
    circular: Callable[[Key], bool] = field(default=lambda _key: True)  # where nobody knows, passes look
    clock: Callable[[], datetime] = field(default=utc_now)

    def run(self, key: Key) -> float | None:
        """One pass over one of our objects.

        Returns the seconds after which it wants the next one, None to wait for an event, inf where the object is
        gone. Raises ClusterError where the API server does not do its part, and whatever a bug raises.
        """
        obj = self.cluster.get(key)
        if obj is None or obj["metadata"].get("deletionTimestamp"):
            return math.inf  # children go by owner reference; nothing of ours is outside the cluster
        reconciler = self.reconcilers[key.kind]
        now = self.clock()
        try:
            observed = reconciler.observe(obj, World(self.cluster, self.settings, now, self.circular))
            plan = reconciler.decide(obj, observed, now)
            stored = self._said_first(obj, plan) if plan.status_first else obj
            refused = self._carry_out(obj, plan)
        except (Retry, Terminal, ClusterError, RemoteError, ValidationError) as error:
            match refusals.outcome(error):
                case Retry() as retry:
                    return self._not_yet(obj, retry, now)
                case Terminal() as terminal:
                    self._give_up(obj, terminal, now)
                    return None
            raise
        if refused is not None:
            return self._in_spite(stored, plan, refused, now)
        try:
            written = self.cluster.patch_status(stored, plan.status)
        except ClusterError as error:
            if error.retryable:
                raise
            # Something that a pod said does not fit the schema; what stood before does, and the user is told.
            self._give_up(obj, Terminal("InternalError", f"The status cannot be written: {error.message}"), now)
            return None
        self._tell_end(obj, plan.status)
        self._tell(written, plan)
        return plan.requeue

    def _tell_end(self, obj: Object, status: Object) -> None:
        """The status says it: it has been written, so that no later pass tells it again."""
        before = obj.get("status") or {}
        began, ended = status.get("startTime"), status.get("completionTime")
        if began and ended and status.get("phase") in ENDS and not before.get("completionTime"):
            self.on_end(obj["kind"], status["phase"], max(0.0, (parse(ended) - parse(began)).total_seconds()))

    def _said_first(self, obj: Object, plan: Plan) -> Object:
        """The object, with the plan's status where it could be written: what is given up needs no leave for that."""
        try:
            return self.cluster.patch_status(obj, plan.status)
        except ClusterError as error:  # the write at the end tells what becomes of it
            log.warning("Could not write status first", extra={"error": error.message})
            return obj

    def _carry_out(self, obj: Object, plan: Plan) -> Exception | None:
        """Carry the plan out. Returns the first refusal past which it went on; raises it where the plan stops there."""
        refused: Exception | None = None
        keys = (*map(_key, plan.apply), *plan.delete)
        if any(key.namespace != obj["metadata"]["namespace"] for key in keys):
            # Cannot be. Were it so, by a bug, then who may write one namespace could reach all of them.
            raise AssertionError(f"a child in another namespace: {keys}")
        skip: set[str] = set()
        foreign: set[str] = set()  # names of Secrets and ConfigMaps that are another one's still
        none = Key("", "", "")
        actions = [("apply", _key(child), partial(self._apply, obj, child)) for child in plan.apply]
        actions += [("push", none, partial(self._push, routes)) for routes in plan.routes]
        actions += [("delete", key, partial(self._delete, obj, key)) for key in plan.delete]
        for verb, key, action in actions:
            if verb in skip or (key.kind == "Deployment" and verb == "apply" and key.name in foreign):
                continue  # a pod that starts with the Secret of a former namesake keeps its token
            try:
                action()
            except (Retry, Terminal, ClusterError, RemoteError) as error:
                if not plan.keep_going:
                    raise
                refused = refused or error
                if isinstance(error, ClusterError) and error.status == 0:
                    skip |= {"apply", "delete"}  # the API server does not answer: routers are reached without it
                if isinstance(error, Retry) and error.reason in NOT_OURS and key.kind in ("Secret", "ConfigMap"):
                    foreign.add(key.name)
                if verb == "delete":
                    skip.add(verb)  # in their order only: by what goes last the rest is found again
        return refused

    def _push(self, routes: Routes) -> None:
        try:
            self.push_routes(routes)
        except RemoteError:
            if not routes.leaving:
                raise

    def _in_spite(self, obj: Object, plan: Plan, refused: Exception, now: datetime) -> float | None:
        """Write the plan's status with the outcome of what was refused. Raises ClusterError where that backs off."""
        outcome = refusals.outcome(refused)
        status = plan.status
        if outcome is not None:
            lost = self._unreached(obj, plan)
            if any(service["spec"].get("clusterIP") != "None" for service in lost):  # the one that clients use
                status = _unanswered(obj, status, now)
            status = _told(obj, status, outcome, now, reached=not lost)
        written = self.cluster.patch_status(obj, status)
        self._tell(written, plan)
        match outcome:
            case Retry() as retry:
                after = retry.after if _serves(obj) else conditions.patiently(retry.after, _stands(obj), now)
                return after if plan.requeue is None else min(plan.requeue, after)
            case Terminal() as terminal:
                self._post_once(obj, written, terminal)
                return plan.requeue
        raise refused

    def _unreached(self, owner: Object, plan: Plan) -> list[Object]:
        """The Services by which nobody reaches what serves: they are not there, or somebody else's."""
        services = [child for child in plan.apply if child["kind"] == "Service"]
        found = [self.cluster.get(_key(child)) for child in services]
        return [s for s, one in zip(services, found, strict=True) if one is None or not is_ours(owner, one)]

    def _apply(self, owner: Object, child: Object) -> None:
        key = _key(child)
        current = self.cluster.get(key)
        if current is not None:
            check_ours(owner, current)
            if current["metadata"].get("deletionTimestamp"):
                raise Retry("ChildTerminating", f"{key.kind} {key.name} of before is still being deleted.", after=2.0)
        try:
            self.cluster.apply(child, current=current)
        except ClusterError as error:
            refusals.explain(error, f"{key.kind} {key.name}")

    def _delete(self, owner: Object, key: Key) -> None:
        current = self.cluster.get(key)
        if current is None or current["metadata"].get("deletionTimestamp") or not is_ours(owner, current):
            return  # what merely has the name is in nobody's way: nothing of ours shall be there
        self.cluster.delete(key, uid=current["metadata"]["uid"])

    def _not_yet(self, obj: Object, retry: Retry, now: datetime) -> float:
        generation = obj["metadata"].get("generation", 0)
        before = _stands(obj)
        if _over(before):
            log.warning("Could not look after finished object", extra={"reason": retry.reason, "error": str(retry)})
            return retry.after  # what has been reached is not taken back
        marked = conditions.reconciling(
            before,
            retry.reason,
            retry.message,
            generation=generation,
            now=now,
            still_ready=_still_ready(obj, before),
        )
        status = _merged(obj, marked, generation)
        if _serves(obj):
            self.cluster.patch_status(obj, status)
            return retry.after
        reached = status.get("phase")
        if reached in (None, "Failed") or (reached == "Suspended" and not _suspended(obj)):
            status["phase"] = "Waiting"  # else what earlier passes have reached is kept
        self.cluster.patch_status(obj, status)
        return conditions.patiently(retry.after, before, now)

    def _give_up(self, obj: Object, terminal: Terminal, now: datetime) -> None:
        generation = obj["metadata"].get("generation", 0)
        before = _stands(obj)
        if _over(before):
            log.warning("Could not look after finished object", extra={"reason": terminal.reason})
            return
        marked = conditions.stalled(
            before,
            terminal.reason,
            terminal.message,
            generation=generation,
            now=now,
            still_ready=_still_ready(obj, before),
        )
        status = _merged(obj, marked, generation) | ({} if _serves(obj) else {"phase": "Failed"})
        try:
            self.cluster.patch_status(obj, status)
        except ClusterError as error:
            if error.retryable:
                raise
            # Not even its status can be written: the object does not fit the schema of today. An Event can be.
            self._post(obj, (Event(terminal.reason, terminal.message, warning=True),))
            return
        self._post_once(obj, obj, terminal)

    def _post_once(self, before: Object, obj: Object, terminal: Terminal) -> None:
        """Post an Event about `obj`, unless its status of `before` said the same already."""
        said = Status.model_validate(before.get("status") or {}).conditions
        known = conditions.find(said, conditions.STALLED)
        if known is None or known.reason != terminal.reason:
            self._post(obj, (Event(terminal.reason, terminal.message, warning=True),))

    def _tell(self, obj: Object, plan: Plan) -> None:
        """What the status that has just been written says: no later pass tells it again."""
        self.on_counts(plan.counts)
        self._post(obj, plan.events)

    def _post(self, obj: Object, events: tuple[Event, ...]) -> None:
        for event in events:
            try:
                self.cluster.post_event(obj, event.reason, conditions.cut(event.message), warning=event.warning)
            except ClusterError as error:  # an Event is a courtesy: the status has said it already
                log.warning("Could not post Event", extra={"reason": event.reason, "error": error.message})


def _key(child: Object) -> Key:
    return Key(child["kind"], child["metadata"]["namespace"], child["metadata"]["name"])


def _unanswered(obj: Object, status: Object, now: datetime) -> Object:
    """The wanted status of a ModelDeployment at whose address it is not the one that answers."""
    wanted = Status.model_validate(status).conditions
    before = Status.model_validate(obj.get("status") or {}).conditions
    said = conditions.set_condition(
        [c for c in before if c.type == conditions.AVAILABLE],  # for the time at which it changed
        conditions.AVAILABLE,
        False,
        "NotAnswering",
        "Its Service is not there, or somebody else's.",
        generation=obj["metadata"].get("generation", 0),
        now=now,
    )
    return {**status, "conditions": [c.wire() for c in (*conditions.without(wanted, conditions.AVAILABLE), *said)]}


def _told(obj: Object, status: Object, outcome: Retry | Terminal, now: datetime, *, reached: bool) -> Object:
    """The wanted status with a refusal in its conditions. A failure that it tells itself is the more important one.

    That something is late is none by itself: what was refused may be why, and is told with it. Of a run the message
    says both, how it gets on first.
    """
    wanted = Status.model_validate(status).conditions
    failed = conditions.find(wanted, conditions.STALLED)
    if failed is not None and failed.reason == "ProgressDeadlineExceeded":
        late, _, _ = failed.message.partition(outcome.message.partition(":")[0])  # the last pass may have told it
        outcome = Terminal(failed.reason, f"{late.rstrip()} {outcome.message}")
    elif failed is not None:
        return status
    before = Status.model_validate(obj.get("status") or {}).conditions
    ours = (conditions.READY, conditions.RECONCILING, conditions.STALLED)
    generation = obj["metadata"].get("generation", 0)
    goes = None if _serves(obj) else conditions.find(wanted, conditions.READY)
    mark = conditions.stalled if isinstance(outcome, Terminal) else conditions.reconciling
    marked = mark(
        [c for c in before if c.type in ours],  # for the times at which they changed
        outcome.reason,
        f"{goes.message} {outcome.message}" if goes else outcome.message,
        generation=generation,
        now=now,
        still_ready=reached and conditions.is_true(wanted, conditions.READY),
    )
    return {**status, "conditions": [c.wire() for c in (*marked, *conditions.without(wanted, *ours))]}


def _merged(obj: Object, marked: list[Condition], generation: int) -> Object:
    """The status as it stands, with these conditions: what was reached by earlier passes is kept."""
    return {
        **(obj.get("status") or {}),
        "observedGeneration": generation,
        "conditions": [condition.wire() for condition in marked],
    }


def _stands(obj: Object) -> list[Condition]:
    """The conditions of before, as far as they still hold: a run is suspended while its spec says so."""
    said = Status.model_validate(obj.get("status") or {}).conditions
    return said if _serves(obj) or _suspended(obj) else conditions.without(said, conditions.SUSPENDED)


def _suspended(obj: Object) -> bool:
    return bool(obj["spec"].get("suspend"))


def _over(said: list[Condition]) -> bool:
    """Whether a run has ended, well or not: trouble in looking after it does not take that back."""
    return conditions.is_true(said, conditions.COMPLETE) or conditions.is_true(said, conditions.FAILED)


def _still_ready(obj: Object, said: list[Condition]) -> bool:
    """Whether what serves is what the spec asks for: of a spec that no pass has seen through, nobody knows."""
    known = conditions.find(said, conditions.READY)
    if not _serves(obj) or known is None or known.status != "True":
        return False
    return bool(known.observed_generation == obj["metadata"].get("generation", 0))


def _serves(obj: Object) -> bool:
    """A ModelDeployment goes on serving while it cannot be changed; a batch object is Ready at its end or never."""
    return bool(obj["kind"] == "ModelDeployment")
