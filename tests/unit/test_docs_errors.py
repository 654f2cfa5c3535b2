"""docs/errors.md has a row for every reason that an object or an Event can give, and for no other."""

import ast
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import get_args

import pytest
from tests.unit.objects import NOW, Object, exited, finetune, job, pod, said
from tests.unit.test_batch_again import edited
from tests.unit.test_batch_life import FAILED_JOB, FATAL_JOB, after, kstatus, run

from slmops.api.deployment import Verdict
from slmops.api.run import EXIT_FATAL, EXIT_RETRY, FailureReason
from slmops.api.times import parse
from slmops.reconcile import deployment_report, pods, serverpods, sources
from slmops.rollout import phases
from slmops_artifacts.errors import Reason

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/errors.md").read_text()
WORD = re.compile(r"[A-Z][A-Za-z]+")
# What makes an outcome -> which of its arguments is the reason.
PLACES = {"Retry": 0, "Terminal": 0, "Trouble": 0, "Problem": 0, "Event": 0, "hold": 0, "note": 0, "_keys": 0,
          "going_on": 2, "ready": 1}  # fmt: skip


def words(node: ast.expr | None) -> Iterator[str]:
    """The constants that an expression may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and WORD.fullmatch(node.value):
        yield node.value
    if isinstance(node, ast.IfExp):
        yield from words(node.body)
        yield from words(node.orelse)


def reasons(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in PLACES and len(node.args) > PLACES[name]:
                yield from words(node.args[PLACES[name]])
            yield from (word for keyword in node.keywords if keyword.arg == "reason" for word in words(keyword.value))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if "reason" in names:
                yield from words(node.value)
            if "reason, message" in ast.unparse(targets[0]) and isinstance(node.value, ast.Tuple):
                yield from words(node.value.elts[0])
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and node.value.elts:
            first, *rest = node.value.elts
            state = isinstance(first, ast.Constant) and first.value in ("ready", "reconciling", "stalled")
            yield from words(rest[0] if state and rest else first)


def given() -> set[str]:
    folders = [ROOT / "operator/slmops" / name for name in ("reconcile", "rollout")]
    found = {
        reason for folder in folders for path in folder.rglob("*.py") for reason in reasons(ast.parse(path.read_text()))
    }
    assert len(found) > 40, "the search is broken"
    rollout = {phases.PREPARING, phases.STEP, phases.PROMOTING}
    shown = {deployment_report._PHASES.get(phase, phase) for phase in rollout}
    verdicts = set(get_args(Verdict.model_fields["verdict"].annotation)) - {"Pass", "Fail"}
    of_uploads = ("Refused", "NoRepository")
    pulled = {serverpods.PULLED.get(reason, reason) for reason in get_args(Reason) if reason not in of_uploads}
    return found | shown | verdicts | pulled | {sources.NOT_READY, *get_args(FailureReason), *pods._WAITING.values()}


def told() -> set[str]:
    rows = [
        line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| reason ")
    ]
    return {word for row in rows for word in WORD.findall(row)}


def test_every_reason_has_a_row() -> None:
    assert given() - told() == set(), "add a row with the remedy to docs/errors.md"


# Said by Kubernetes itself, and passed on as they are; BackoffLimitExceeded by older operators, whose objects are kept.
PASSED_ON = {"SchedulingGated", "DeadlineExceeded", "BackoffLimitExceeded", "FailedMount", "FailedAttachVolume",
             "FailedCreatePodSandBox", "Unschedulable"}  # fmt: skip


def test_every_row_is_a_reason() -> None:
    assert told() - given() - PASSED_ON == set()


def retryable() -> set[str]:
    """The reasons for which the trainer wishes another pod: RunFailure(..., retryable=True)."""
    found = set()
    for path in (ROOT / "images/trainer/slmops_trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RunFailure":
                wishes = [each for each in node.keywords if each.arg == "retryable"]
                if wishes and isinstance(wishes[0].value, ast.Constant) and wishes[0].value.value:
                    found |= set(words(node.args[0]))
    assert {"Interrupted", "InternalError"} <= found, "the search is broken"
    return found


def ends() -> Iterator[tuple[str, Object | None]]:
    """Every reason of a failed run, and how its last container ended."""
    retried = retryable()
    for reason in sorted(set(get_args(FailureReason)) - {"Interrupted"}):
        yield reason, said(reason, "x", EXIT_RETRY if reason in retried else EXIT_FATAL)
    yield "OutOfMemory", exited(137, reason="OOMKilled")
    yield "NodeFailed", exited(137, reason="ContainerStatusUnknown")
    yield "ResultLost", None  # no pod is left


def code_of(state: Object | None) -> int | None:
    return state["terminated"]["exitCode"] if state else None


def effect(reason: str, state: Object | None, **spec: Object) -> str:
    """What becomes of an object whose run ended so, and whose backoffLimit is raised."""
    obj = finetune(**spec)
    ended = job(obj, **(FATAL_JOB if code_of(state) == EXIT_FATAL else FAILED_JOB))
    plan = run(obj, job=ended, pods=(pod(obj, phase="Failed", state=state),) if state else ())
    assert plan.status["lastFailure"]["reason"] == reason
    if "nextRetryTime" in plan.status:
        return "later" if parse(plan.status["nextRetryTime"]) - NOW >= timedelta(minutes=10) else "yes"
    raised = run(edited(after(obj, plan), backoffLimit=9), job=ended, inputs="m1.s1")
    return "attempts" if kstatus(raised) == "InProgress" else "no"


@pytest.mark.parametrize(("reason", "state"), list(ends()))
def test_whether_it_is_tried_again_is_told_rightly(reason: str, state: Object | None) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    (told,) = [row[1] for row in rows if len(row) == 4 and reason in WORD.findall(row[0])]
    if reason == "OutOfMemory":
        assert told == "attempts if the container was killed (exit code 137), else no"
        told = "attempts" if code_of(state) == 137 else "no"
    if reason in ("BadDataset", "UnsupportedModel"):
        assert told == "later, unless its URI names a digest or commit"
        pinned = {field: {"uri": "oci://r/x@sha256:" + "a" * 64} for field in ("base", "dataset")}
        assert effect(reason, state, **pinned) == "no"
        told = "later"
    assert effect(reason, state) == told
