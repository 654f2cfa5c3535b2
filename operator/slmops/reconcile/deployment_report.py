"""A rollout's decision -> the status that users and tools read: conditions, phase, columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from slmops.api.deployment import ModelDeploymentSpec, ModelDeploymentStatus, RolloutStatus
from slmops.api.meta import Condition
from slmops.reconcile import conditions
from slmops.rollout.phases import DRAINING, PREPARING, PROMOTING, ROLLED_BACK, ROLLING_BACK, ROLLING_OUT, STABLE, STEP
from slmops.rollout.seen import Decision, Problem, Seen

HUMAN = ("Paused", "Approval")  # holds that only a person ends
LATE = "ProgressDeadlineExceeded"  # of the first revision: nothing to go back to, so it goes on trying

_PHASES = {PREPARING: "Progressing", STEP: "Canary"}


@dataclass(frozen=True)
class Facts:
    """What the status is made from, apart from the decision."""

    spec: ModelDeploymentSpec
    before: ModelDeploymentStatus
    seen: Seen
    generation: int
    waiting: Problem | None  # why there is no target yet
    now: datetime


def report(facts: Facts, decision: Decision) -> ModelDeploymentStatus:
    """Make the status; endpoint, selector and lineage are the caller's."""
    serving = decision.stable or decision.candidate
    pods = facts.seen.pods.get(serving.revision) if serving else None
    ready, wanted = (pods.ready if pods else 0), facts.spec.replicas
    return facts.before.model_copy(
        update={
            "observed_generation": facts.generation,
            "conditions": _conditions(facts, decision, ready),
            "phase": _phase(facts, decision),
            "replicas": pods.wanted if pods else 0,
            "ready_replicas": ready,
            "stable": decision.stable,
            "candidate": decision.candidate,
            "weight": decision.weight if decision.candidate else None,
            "ready": f"{ready}/{wanted}",
            "rollout": decision.rollout,
        }
    )


def _phase(facts: Facts, decision: Decision) -> str:
    roll = decision.rollout
    if decision.stable is None and decision.candidate is None:
        return "Pending"
    if facts.spec.replicas == 0 and roll.phase in (STABLE, DRAINING, PREPARING):
        return "ScaledToZero"
    reason = roll.hold.partition(": ")[0]
    if reason == LATE:
        return "Failed"
    if roll.hold and (roll.phase in (STEP, PROMOTING) or reason in HUMAN):
        return "Holding"
    return _PHASES.get(roll.phase, roll.phase)


def _conditions(facts: Facts, decision: Decision, ready: int) -> list[Condition]:
    """Ready is True only for the revision that the spec asks for, with all its pods; Available wherever one answers."""
    before: Sequence[Condition] = facts.before.conditions
    at = {"generation": facts.generation, "now": facts.now}
    available = decision.stable is not None and ready > 0 and bool(facts.seen.routers)
    kind, reason, message = _said(facts, decision, ready)
    match kind:
        case "ready":
            marked = conditions.ready(before, reason, message, **at)  # type: ignore[arg-type]
        case "stalled":
            marked = conditions.stalled(before, reason, message, **at)  # type: ignore[arg-type]
        case _:
            marked = conditions.reconciling(before, reason, message, **at)  # type: ignore[arg-type]
    marked = conditions.set_condition(
        marked,
        conditions.AVAILABLE,
        available,
        "Answering" if available else "NotAnswering",
        f"{ready} pods of the stable revision are ready." if facts.seen.routers else "No router pod is ready.",
        generation=facts.generation,
        now=facts.now,
    )
    marked = conditions.without(marked, conditions.SUSPENDED)
    if kind == "reconciling" and reason in HUMAN:
        marked = conditions.set_condition(
            marked, conditions.SUSPENDED, True, reason, message, generation=facts.generation, now=facts.now
        )
    return marked


def _said(facts: Facts, decision: Decision, ready: int) -> tuple[str, str, str]:
    """Kind of state, reason and sentence."""
    roll, spec = decision.rollout, facts.spec
    rolling = decision.candidate is not None and roll.phase in (*ROLLING_OUT, ROLLING_BACK)
    if spec.replicas == 0 and roll.phase not in (ROLLING_BACK, ROLLED_BACK):
        return "ready", "ScaledToZero", "spec.replicas is 0: no pod runs, as wanted."
    if facts.waiting and not rolling:
        return "reconciling", facts.waiting.reason, facts.waiting.message
    if roll.phase == ROLLED_BACK and decision.candidate is not None:
        serves = "The stable revision serves on. " if ready else "No pod of the stable revision is ready. "
        rest = serves if decision.stable else ""
        retry = f"{rest}Change the spec, or annotate slmops.dev/retry={decision.candidate.revision}."
        return "stalled", "RolledBack", f"{roll.outcome} {retry}"
    if rolling:
        return _rolling(roll, decision)
    return _steady(facts, decision, ready)


def _rolling(roll: RolloutStatus, decision: Decision) -> tuple[str, str, str]:
    assert decision.candidate is not None
    name = decision.candidate.revision
    if roll.phase == ROLLING_BACK:
        return "reconciling", "RollingBack", f"{roll.outcome} {roll.hold}".strip()
    reason, _, message = roll.hold.partition(": ")
    if reason == LATE:
        return "stalled", reason, message
    if reason:
        return "reconciling", reason, message
    what = {
        PREPARING: f"Pods of revision {name} start.",
        STEP: f"Revision {name} gets {decision.weight} % of the requests (step {roll.step + 1}).",
        PROMOTING: f"Revision {name} is promoted.",
    }
    return "reconciling", _PHASES.get(roll.phase, roll.phase), what[roll.phase]


def _steady(facts: Facts, decision: Decision, ready: int) -> tuple[str, str, str]:
    stable, wanted = decision.stable, facts.spec.replicas
    pods = facts.seen.pods.get(stable.revision) if stable else None
    if not facts.seen.routers:
        problem = facts.seen.router_problem or Problem("RouterNotReady", "The router's pod starts.")
        return "reconciling", problem.reason, problem.message
    if ready < wanted:
        why = f": {pods.problem.message}" if pods and pods.problem else "."
        reason = pods.problem.reason if pods and pods.problem else "PodsNotReady"
        return "reconciling", reason, f"{ready} of {wanted} pods are ready{why}"
    return "ready", "Serving", f"{ready} of {wanted} pods are ready and get all requests."
