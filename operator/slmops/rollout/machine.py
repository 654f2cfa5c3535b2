"""The state machine of a rollout. One pure function: (spec, status, what is seen, now) -> the wanted state.

    Stable --new revision--> Preparing --ready--> Step 0 .. n --earned--> Promoting --routed--> Draining --> Stable
    Preparing | Step | Promoting --fail, abort, deadline--> RollingBack --weight 0 seen--> RolledBack
    Preparing | Step | Promoting --third revision--> Preparing      --spec back to stable--> Draining --> Stable
    RolledBack --retry, new revision--> Preparing                   --spec back to stable--> Stable

Rules that hold in every state:
- Deployments are per revision, so promotion moves weights and roles, never pods.
- The stable revision keeps all its pods until the routers were seen to send everything to its successor.
- Weight goes up only to pods that are ready and that every router reaches; it goes to 0 before pods go.
- Unknown is not bad: missing metrics, a silent Prometheus or router hold. Only a Fail spends the budget.
- While no pod of the stable revision is ready, only people take requests away from a candidate that answers them.
- Rolling back needs nothing but the decision: no metric, no router that answers, no candidate that lives.
- Times in status are absolute and facts are read anew, so a pass may be repeated or lost at any point.
"""

from collections.abc import Mapping
from datetime import datetime

from slmops.api import keys
from slmops.api.deployment import ModelDeploymentSpec, ModelDeploymentStatus, Revision
from slmops.api.times import stamp
from slmops.rollout import evidence
from slmops.rollout.phases import (
    DRAINING,
    LOSSES_MAX,
    PROMOTING,
    ROLLED_BACK,
    ROLLING_OUT,
    ROUTER_SECONDS,
    STEP,
    TOLD_SECONDS,
)
from slmops.rollout.seen import Decision, Problem, Seen
from slmops.rollout.verbs import Verb, ignored, obey
from slmops.rollout.work import Work


def decide(spec: ModelDeploymentSpec, status: ModelDeploymentStatus, seen: Seen, now: datetime) -> Decision:
    """Decide. Pure."""
    work = Work(spec, status, seen, now)
    work.stable, work.candidate = _named(work.stable, seen.target), _named(work.candidate, seen.target)
    if status.stable is None and status.candidate is None:
        _pass_over(work)
    _take_target(work)
    handled = work.roll.handled
    _tell_resumed(work, status)
    _take_plan(work)
    again = True
    while again:  # what a verb leads to decides what becomes of the others, and some wait for a phase to end
        phase = work.roll.phase
        obeyed = _obey(work)
        _advance(work)
        again = obeyed or work.roll.phase != phase
    _warn(work, handled)
    work.retire()
    return work.decision()


def measurement_due(spec: ModelDeploymentSpec, status: ModelDeploymentStatus, seen: Seen, now: datetime) -> bool:
    """Whether this pass should measure."""
    return evidence.due(Work(spec, status, seen, now))


def measurement_window(spec: ModelDeploymentSpec, status: ModelDeploymentStatus, seen: Seen, now: datetime) -> int:
    """Seconds that the queries of this pass look back."""
    return evidence.window(Work(spec, status, seen, now))


def _named(known: Revision | None, target: Revision | None) -> Revision | None:
    """Fill in what an older operator did not write down of a revision: who asks it (sources.py) needs to know."""
    if known is None or target is None or known.revision != target.revision or known.served_name:
        return known
    said = {"served_name": target.served_name, "api_keys_secret": target.api_keys_secret}
    return known.model_copy(update=said)


def _pass_over(work: Work) -> None:
    """Do nothing of an abort that is older than any revision: this object is a copy, or restored without its status."""
    old = work.seen.annotations.get(keys.ANNOTATION_ABORT)
    if old is not None:
        work.set(handled={**work.roll.handled, keys.ANNOTATION_ABORT: old[:253]})


def _take_target(work: Work) -> None:
    """Start, replace or call off a rollout when the spec asks for another revision than before."""
    target, old = work.seen.target, work.candidate
    current = old or work.stable
    if target is None or (current and target.revision == current.revision):
        return
    if work.stable is not None and target.revision == work.stable.revision:
        work.candidate, work.weight = None, 0
        if work.roll.phase in ROLLING_OUT:
            work.note("RolloutReverted", "The spec asks for the stable revision again: it gets all requests.")
            work.set(outcome="Reverted: the spec went back to the stable revision.")
        work.enter(DRAINING)
        return
    if work.stable is None and work.weight == 100 and work.pods.ready > 0:  # whoever sees it: nobody else serves
        _promoted(work)
    elif old is not None and work.roll.phase in ROLLING_OUT:
        work.note("RolloutSuperseded", f"Revision {target.revision} takes the place of {old.revision}.")
    work.start(target)


def _tell_resumed(work: Work, before: ModelDeploymentStatus) -> None:
    """Say that a pause is over: whoever applies the object from elsewhere may have taken the annotation away."""
    same = before.candidate is not None and before.candidate.revision == work.name and work.roll.phase in ROLLING_OUT
    if same and before.rollout.hold.startswith("Paused: ") and not evidence.asked_to_pause(work):
        said = f"The annotation {keys.ANNOTATION_PAUSE} names revision {work.name} no more: its share may rise again."
        work.note("RolloutResumed", said)


def _take_plan(work: Work) -> None:
    """Where the plan has become shorter than the way so far, its last step is the running one and has to be earned.

    No steps at all are the fast way, and are asked for as such.
    """
    if work.roll.phase == STEP and work.roll.step >= len(work.steps) > 0:
        work.set(step=len(work.steps) - 1)


def _obey(work: Work) -> bool:
    """Carry out a verb given by annotation, each once; False where there is none left."""
    handled, verb = obey(work.seen.annotations, work.roll, work.stable, work.candidate)
    work.set(handled=handled)
    match verb:
        case Verb.ABORT:
            work.roll_back(Problem("Aborted", "Aborted by annotation."))
        case Verb.RETRY:
            assert work.candidate is not None
            work.start(work.candidate)
        case Verb.PROMOTE:
            if work.stable is not None and work.roll.step < len(work.steps):
                work.set(approved=True, approved_weight=work.steps[work.roll.step].weight)
                work.note("StepApproved", f"Step {work.roll.step + 1} was approved by annotation.")
    return verb is not None


def _warn(work: Work, handled: Mapping[str, str]) -> None:
    """Say once of each verb that it does nothing: who stops a rollout should not believe that it has stopped."""
    found = ignored(work.seen.annotations, handled, work.roll, work.candidate)
    for verb, value in found.items():
        if work.roll.ignored.get(verb) != value:
            said = f"The annotation {verb}={value[:63]} does nothing now: the candidate is revision {work.name}"
            work.note("VerbIgnored", f"{said}; write {verb}={work.name} to mean it.", warning=True)
    work.set(ignored=found)


def _advance(work: Work) -> None:
    """Run phases until one has to wait."""
    while True:
        before = (work.roll.phase, work.roll.step)
        work.set(hold="", state="")
        match work.roll.phase:
            case "Preparing":
                _preparing(work)
            case "Step":
                _step(work)
            case "Promoting":
                _promoting(work)
            case "RollingBack":
                _rolling_back(work)
        if (work.roll.phase, work.roll.step) == before:
            return


def _preparing(work: Work) -> None:
    if work.asleep():
        return
    # The first revision has nobody to protect: it serves as soon as one pod does.
    ready = work.pods_ready(1 if work.stable is None else work.need(work.steps[0] if work.steps else None))
    if ready and not evidence.paused(work):
        approval = {"approved": work.roll.approved, "approved_weight": work.roll.approved_weight}
        work.set(step=0)
        work.enter(STEP if work.stable and work.steps else PROMOTING)
        work.set(**approval)  # given while the pods started


def _step(work: Work) -> None:
    if work.asleep():
        return
    if work.roll.step >= len(work.steps):  # the last one is done, or there is none any more
        work.enter(PROMOTING)
        return
    step = work.steps[work.roll.step]
    if work.roll.routed_at is not None and work.weight != step.weight:
        work.start_over(step.weight)
    if work.roll.approved_weight not in (None, step.weight):
        work.set(approved=False, approved_weight=None)
    evidence.keep_measuring(work)
    if evidence.judged(work) or _lost(work) or not work.pods_ready(work.need(step)):
        return
    if work.weight < step.weight and evidence.paused(work):
        return
    work.weight = step.weight
    if not work.routed():
        return
    if work.roll.routed_at is None:
        work.set(routed_at=stamp(work.now), samples=None)  # those of before are of another weight, or step
        work.note("StepRouted", f"Revision {work.name} gets {step.weight} % of the requests.")
    work.set(samples=work.told())
    work.wakes.append(TOLD_SECONDS)
    if evidence.earned(work, step):
        work.set(step=work.roll.step + 1, samples=work.samples())
        work.enter(STEP)


def _promoting(work: Work) -> None:
    if work.asleep():
        return
    evidence.keep_measuring(work)
    if evidence.judged(work) or _lost(work):
        return
    if not work.pods_ready(1 if work.stable is None else work.spec.replicas) or evidence.paused(work):
        return
    work.weight = 100
    if not work.routed():
        return
    _promoted(work)


def _promoted(work: Work) -> None:
    name = work.name
    work.promote()
    work.set(outcome=f"Promoted: revision {name} at {stamp(work.now)}.", samples=None, step=0)
    work.enter(DRAINING)
    work.note("RolloutPromoted", f"Revision {name} gets all requests.")


def _rolling_back(work: Work) -> None:
    work.weight = 0
    assert work.candidate is not None
    if work.rid_of(work.candidate.revision):
        work.enter(ROLLED_BACK)
    else:
        work.await_routers()


def _lost(work: Work) -> bool:
    """Take the weight back from a candidate whose last pod is gone, or give it up; True where it had any."""
    if work.weight == 0 or work.pods.ready > 0 or work.stable is None:
        return False
    losses = work.roll.losses + work.pods.fell
    work.set(losses=losses)
    if losses > LOSSES_MAX:
        problem = work.pods.problem or Problem("CandidateNotReady", "They do not say why.")
        work.roll_back(Problem(problem.reason, f"All pods fell over {losses} times: {problem.message}"))
        return True
    work.weight = 0
    work.set(routed_at=None, passes=0, state="Scaling")
    said = f"No pod of revision {work.name} is ready: it gets no requests."
    work.hold("CandidateNotReady", said)
    work.note("CandidateNotReady", said, warning=True)
    work.wakes.append(ROUTER_SECONDS)
    return True
