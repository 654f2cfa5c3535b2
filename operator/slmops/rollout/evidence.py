"""What a step has to earn: time, requests, good measurements, approval. Unknown holds; only a Fail counts against."""

from slmops.api import keys
from slmops.api.deployment import Step, Verdict
from slmops.api.times import parse, stamp
from slmops.rollout.phases import PROMOTING, SAMPLES_SECONDS, STEP
from slmops.rollout.seen import Problem
from slmops.rollout.verbs import meant
from slmops.rollout.verdicts import all_pass, any_answer, first_failed, first_unknown, still_pass, too_few
from slmops.rollout.work import Work

SPLIT_TURNS = 100  # requests from which the observed split is compared
SPLIT_POINTS = 5.0  # percent points by which it may be off


def earned(work: Work, step: Step) -> bool:
    """Whether the candidate may go on to the next step; says what it waits for where not."""
    analysis = work.spec.rollout.analysis if step.weight else None
    least = step.pause_seconds
    if least is None:
        least = analysis.interval_seconds if analysis else 0
    left = 0.0 if work.roll.approved else work.left(work.roll.routed_at, least)
    if paused(work) or _split_is_off(work, step):
        return False
    if left > 0:
        work.wakes.append(left)
        work.set(state="Pausing" if step.pause_seconds else "Analyzing")
        return False
    if analysis and not _enough(work, analysis.min_samples, analysis.passes):
        return False
    if step.approval and not work.roll.approved:
        work.hold("Approval", f"Waits for the annotation {keys.ANNOTATION_PROMOTE}={work.name}.")
        return False
    return True


def paused(work: Work) -> bool:
    """Whether the candidate's share may not rise: somebody asked to stay here, or asks for another revision by now."""
    if asked_to_pause(work):
        work.hold("Paused", f"Paused by annotation; remove {keys.ANNOTATION_PAUSE} to go on.")
        return True
    other = work.seen.other
    if other is None or work.stable is None:  # the first one has nobody to protect: better it than nobody
        return False
    share = f"Revision {work.name} stays at {work.weight} %, for the spec asks for another one by now"
    work.hold(other.reason, f"{share}: {other.message}")
    return True


def asked_to_pause(work: Work) -> bool:
    """Whether the annotation names the candidate."""
    return meant(work.seen.annotations.get(keys.ANNOTATION_PAUSE, "")) in ("*", work.name)


def due(work: Work) -> bool:
    """Whether this pass measures: whoever gets requests is measured once in an interval, with enough of them.

    Also while the next step waits for its pods: such a measurement can fail the candidate, but earns it nothing.
    """
    return _measures(work) and _left_to_measure(work) <= 0 and _enough_samples(work)


def keep_measuring(work: Work) -> None:
    """Ask for a pass when the next measurement is due, whatever else this one waits for."""
    if _measures(work):
        work.wakes.append(max(_left_to_measure(work), 0.5) if _enough_samples(work) else SAMPLES_SECONDS)


def judged(work: Work) -> bool:
    """Account for what was measured; True where the rollout ends, for it failed more often than the spec now allows."""
    analysis = work.spec.rollout.analysis
    if analysis is None:
        return False
    if not still_pass(analysis.metrics, work.roll.verdicts):
        work.set(passes=0)
    failed = _account(work) if work.seen.verdicts and due(work) else None
    if work.roll.failures <= analysis.failure_limit or work.stands_in():
        return False
    said = f"{work.roll.failures} measurements failed; failureLimit allows {analysis.failure_limit}."
    work.roll_back(Problem("AnalysisFailed", f"Metric {failed.name}: {failed.message}." if failed else said))
    return True


def _account(work: Work) -> Verdict | None:
    """Note what was measured; the first that failed.

    Who stands in for the stable revision has more to do than its pods are meant for, and nobody to leave it to: what
    fails then is not counted, nor is what later looks back to it.
    """
    verdicts = work.seen.verdicts
    failed, counted, stands_in = first_failed(verdicts), _is_counted(work), work.stands_in()
    work.verdicts = verdicts
    work.set(
        measured_at=stamp(work.now),
        answered_at=stamp(work.now) if any_answer(verdicts) else work.roll.answered_at,
        verdicts=list(verdicts),
        passes=work.roll.passes + 1 if all_pass(verdicts) and work.roll.routed_at else 0,
    )
    if failed is None:
        return None
    if stands_in:
        work.set(failed_at=stamp(work.now))
    elif not counted:
        work.set(failures=work.roll.failures + 1, failed_at=stamp(work.now))
    said = f"Revision {work.name}, metric {failed.name}: {failed.message}."
    why = " It is not counted, for no pod of the stable revision is ready." if stands_in else ""
    work.note("AnalysisFailed", said + why, warning=True)
    return failed


def _enough(work: Work, min_samples: int, passes: int) -> bool:
    analysis = work.spec.rollout.analysis
    assert analysis is not None
    if work.samples() < min_samples:
        short = too_few(analysis.metrics, work.told(), min_samples)
        work.set(verdicts=list(short))
        work.hold("TooFewSamples", f"Revision {work.name}: {short[0].message}.")
        return False
    if work.roll.passes >= passes:
        return True
    work.set(state="Analyzing")
    unknown = first_unknown(work.roll.verdicts)
    if unknown is None or unknown.verdict == "TooFewSamples":  # which is over
        return False
    early = unknown.verdict == "NoData" and work.left(work.roll.routed_at, analysis.window_seconds) > 0
    if not early:  # before the window is full, Prometheus may not have scraped often enough
        work.hold(unknown.verdict, f"Metric {unknown.name}: {unknown.message}")
    return False


def window(work: Work) -> int:
    """Seconds that a query looks back: windowSeconds, or more, so that no request is left out.

    As far as to the last measurement that had an answer, and as far as to find minSamples at the pace of the step: of a
    candidate with one request a minute one bad request would be all that there is, and a good one would hide all that
    came before. But never to before the step, whose evidence it shall be.
    """
    analysis, roll = work.spec.rollout.analysis, work.roll
    assert analysis is not None
    began = roll.routed_at or roll.entered_at
    if began is None:
        return analysis.window_seconds
    age = (work.now - parse(began)).total_seconds()
    # An operator of before notes no answers by themselves.
    answered = roll.answered_at or (roll.measured_at if any_answer(roll.verdicts) else None) or began
    unmeasured = -work.left(max(began, answered), 0)
    samples = work.samples()
    enough = age * analysis.min_samples / samples if samples else 0.0
    return max(1, int(min(age, max(analysis.window_seconds, unmeasured, enough))))


def _measures(work: Work) -> bool:
    roll, steps = work.roll, work.steps
    if work.spec.rollout.analysis is None or work.stable is None or work.weight == 0:
        return False
    if roll.phase == STEP and roll.routed_at is not None:  # at the weight that the plan says now
        return roll.step < len(steps) and steps[roll.step].weight == work.weight
    return roll.phase in (STEP, PROMOTING)


def _is_counted(work: Work) -> bool:
    """Whether what fails now may be what was counted before: one bad request is in the windows of many measurements.

    Windows begin anew with each step.
    """
    failed_at, began = work.roll.failed_at, work.roll.routed_at or work.roll.entered_at
    if failed_at is None or (began is not None and failed_at <= began):
        return False
    return work.left(failed_at, window(work)) > 0


def _enough_samples(work: Work) -> bool:
    analysis = work.spec.rollout.analysis
    return analysis is not None and work.samples() >= analysis.min_samples


def _left_to_measure(work: Work) -> float:
    analysis, roll = work.spec.rollout.analysis, work.roll
    since = max((t for t in (roll.measured_at, roll.routed_at or roll.entered_at) if t), default=None)
    return work.left(since, analysis.interval_seconds) if analysis else 0.0


def _split_is_off(work: Work, step: Step) -> bool:
    """Compare what the routers did with what they were told, by the requests that are free of a conversation."""
    turns = sum(router.turns for router in work.seen.routers)
    chosen = sum(router.chosen.get(work.name, 0) for router in work.seen.routers)
    if turns < SPLIT_TURNS or abs(chosen / turns * 100 - step.weight) <= SPLIT_POINTS:
        return False
    work.wakes.append(SAMPLES_SECONDS)
    share = round(chosen / turns * 100)  # not the numbers: with each request they would be another text to write
    work.hold("SplitMismatch", f"The routers gave {share} % of the requests to {work.name}, not {step.weight} %.")
    return True
