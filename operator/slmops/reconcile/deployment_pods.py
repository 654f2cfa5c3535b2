"""What is seen of a ModelDeployment's pods, with what Events tell of one that is long in starting."""

import logging
from collections.abc import Sequence

from slmops.api import keys
from slmops.cluster.port import ClusterError, Object
from slmops.reconcile.pods import LATE_SECONDS, created
from slmops.reconcile.protocol import World
from slmops.reconcile.serverpods import by_events, ended_lately, is_ready, mute, problem_of
from slmops.rollout.seen import Pods, Problem

log = logging.getLogger(__name__)


def role(pod: Object) -> str:
    """Which part of a ModelDeployment the pod, or the Deployment, is."""
    return str((pod["metadata"].get("labels") or {}).get(keys.LABEL_ROLE, ""))


def pods_of(world: World, deployment: Object, pods: Sequence[Object]) -> Pods:
    """Those of `pods` that are of the revision of `deployment`. Raises ClusterError."""
    revision = deployment["metadata"]["labels"][keys.LABEL_REVISION]
    mine = [p for p in pods if p["metadata"]["labels"].get(keys.LABEL_REVISION) == revision]
    ready = sum(is_ready(pod) for pod in mine if role(pod) == keys.ROLE_SERVER)
    return Pods(deployment["spec"].get("replicas", 1), ready, problem(world, deployment, mine))


def problem(world: World, deployment: Object, pods: Sequence[Object]) -> Problem | None:
    """Why `pods` are missing or not ready: their own words, else Events of one that is late, else how others ended."""
    return problem_of(deployment, pods) or _by_events(world, pods) or ended_lately(pods, world.now)


def _by_events(world: World, pods: Sequence[Object]) -> Problem | None:
    pod = mute(pods)
    if pod is None or (world.now - created(pod)).total_seconds() < LATE_SECONDS:
        return None
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    try:
        return by_events(pod, world.cluster.events(namespace, kind="Pod", name=name))
    except ClusterError as error:  # what serves is to be looked after all the same
        log.warning("Could not read Events", extra={"pod": name, "error": error.message})
        return None
