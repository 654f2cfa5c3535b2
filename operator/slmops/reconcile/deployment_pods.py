"""What is seen of a ModelDeployment's pods, with what Events tell of one that is long in starting."""

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from slmops.api import keys
from slmops.cluster.port import ClusterError, Object
from slmops.reconcile.pods import LATE_SECONDS, created
from slmops.reconcile.protocol import World
from slmops.reconcile.serverpods import by_events, ended_lately, fell, imageless, is_ready, mute, problem_of
from slmops.rollout.seen import NO_ROOM, Pods, Problem

EVENTS_SECONDS = 15.0  # until the Events of a pod that does not start are read again: nothing tells of them

log = logging.getLogger(__name__)


def role(pod: Object) -> str:
    """Which part of a ModelDeployment the pod, or the Deployment, is."""
    return str((pod["metadata"].get("labels") or {}).get(keys.LABEL_ROLE, ""))


class PodReader:
    """What is seen of pods, for all objects and from any thread.

    What Events told of a pod is kept for EVENTS_SECONDS, as passes may come every 2 s. It is a cache: it may be lost.
    """

    def __init__(self) -> None:
        self._told: dict[str, tuple[datetime, Problem | None]] = {}  # by the pod's uid

    def pods_of(self, world: World, deployment: Object, pods: Sequence[Object], since: str | None) -> Pods:
        """Those of `pods` that are of the revision of `deployment`; `since` is as for `fell`. Raises ClusterError."""
        revision = deployment["metadata"]["labels"][keys.LABEL_REVISION]
        mine = [p for p in pods if p["metadata"]["labels"].get(keys.LABEL_REVISION) == revision]
        ready = sum(is_ready(pod) for pod in mine if role(pod) == keys.ROLE_SERVER)
        said = self._said(world, deployment, mine)
        return Pods(
            wanted=deployment["spec"].get("replicas", 1),
            ready=ready,
            problem=said or ended_lately(mine, world.now),
            failing=said is not None,
            fell=fell(mine, since),
            imageless=imageless(mine),
        )

    def problem(self, world: World, deployment: Object, pods: Sequence[Object]) -> Problem | None:
        """Why `pods` are missing or not ready; where they do not say it, how the last one ended."""
        return self._said(world, deployment, pods) or ended_lately(pods, world.now)

    def _said(self, world: World, deployment: Object, pods: Sequence[Object]) -> Problem | None:
        """Their own words, else Events of one that is late; that others have no room does not hide these either."""
        said = problem_of(deployment, pods)
        return said if said and said.reason not in NO_ROOM else self._by_events(world, pods) or said

    def _by_events(self, world: World, pods: Sequence[Object]) -> Problem | None:
        pod = mute(pods)
        if pod is None or (world.now - created(pod)).total_seconds() < LATE_SECONDS:
            return None
        uid, since = pod["metadata"]["uid"], world.now - timedelta(seconds=EVENTS_SECONDS)
        fresh = {key: one for key, one in list(self._told.items()) if one[0] > since}
        if uid not in fresh:
            fresh[uid] = (world.now, _read(world, pod))
            self._told = fresh  # what another thread has put there meanwhile is read once more
        return fresh[uid][1]


def _read(world: World, pod: Object) -> Problem | None:
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    try:
        return by_events(pod, world.cluster.events(namespace, kind="Pod", name=name))
    except ClusterError as error:  # what serves is to be looked after all the same
        log.warning("Could not read Events", extra={"pod": name, "error": error.message})
        return None
