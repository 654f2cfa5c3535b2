"""Verbs by annotation. Each is bound to a revision and obeyed once: status says what was obeyed.

The value is a revision, or `*` for the candidate of the moment; after a slash may stand anything, so that the same can
be said again (`3f2a91c07d/second-step`). Pause is no verb but a state: it lasts as long as the annotation.
"""

from collections.abc import Mapping
from enum import StrEnum

from slmops.api import keys
from slmops.api.deployment import Revision, RolloutStatus


class Verb(StrEnum):
    """The annotations."""

    ABORT = keys.ANNOTATION_ABORT
    RETRY = keys.ANNOTATION_RETRY
    PROMOTE = keys.ANNOTATION_PROMOTE
    PAUSE = keys.ANNOTATION_PAUSE


_ROLLING_OUT = ("Preparing", "Step", "Promoting")
_APPLIES = {Verb.ABORT: _ROLLING_OUT, Verb.RETRY: ("RolledBack",), Verb.PROMOTE: ("Preparing", "Step")}
_ACTS = {  # when somebody who says it expects something of it
    Verb.ABORT: _ROLLING_OUT,
    Verb.PROMOTE: _ROLLING_OUT,
    Verb.PAUSE: _ROLLING_OUT,
    Verb.RETRY: ("RollingBack", "RolledBack"),
}
_WAITS = {Verb.ABORT: (), Verb.RETRY: ("RollingBack",), Verb.PROMOTE: ()}


def meant(value: str) -> str:
    """The revision, or `*`, that an annotation is for."""
    return value.partition("/")[0].strip()


def obey(
    annotations: Mapping[str, str], rollout: RolloutStatus, stable: Revision | None, candidate: Revision | None
) -> tuple[dict[str, str], Verb | None]:
    """Return what is handled now, and the verb to carry out.

    A verb for the candidate that has nothing to do is handled all the same, and so is one for the stable revision, so
    that it cannot hit a later rollout. One for a revision that is not here yet waits for it.
    """
    handled: dict[str, str] = {}
    todo: Verb | None = None
    for verb, applies in _APPLIES.items():
        value = annotations.get(verb)
        if value is None:
            continue
        value = value[:253]
        if rollout.handled.get(verb) == value:
            handled[verb] = value
            continue
        whom = meant(value)
        ours = candidate is not None and whom in ("*", candidate.revision)
        past = whom == "*" or (stable is not None and whom == stable.revision)
        if ours and rollout.phase in applies and todo is None:
            todo = verb
            handled[verb] = value
        elif (ours or past) and rollout.phase not in _WAITS[verb]:
            handled[verb] = value
    return handled, todo


def ignored(
    annotations: Mapping[str, str], handled: Mapping[str, str], rollout: RolloutStatus, candidate: Revision | None
) -> dict[str, str]:
    """The verbs that do nothing, for they name neither the candidate nor `*`: `true`, say, or the stable revision.

    `handled`: before this pass. What is of an earlier rollout is none of these: it did what it could.
    """
    if candidate is None:
        return {}
    acting = [verb for verb, phases in _ACTS.items() if verb in annotations and rollout.phase in phases]
    given = {verb: annotations[verb][:253] for verb in acting}
    return {
        verb: value
        for verb, value in given.items()
        if meant(value) not in ("*", candidate.revision)
        and (handled.get(verb) != value or rollout.ignored.get(verb) == value)
    }
