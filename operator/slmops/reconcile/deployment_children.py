"""The children of a ModelDeployment: which are wanted, of what manifests, and which go."""

from collections.abc import Collection, Mapping

from slmops.api import keys
from slmops.api.deployment import ModelDeploymentSpec
from slmops.build import router as router_parts
from slmops.build import serving
from slmops.cluster.port import Key, Object
from slmops.cluster.same import covers
from slmops.reconcile.deployment_world import Observed
from slmops.remote import router
from slmops.rollout.phases import PREPARING
from slmops.rollout.seen import Decision


def made(
    obj: Object,
    spec: ModelDeploymentSpec,
    observed: Observed,
    decision: Decision,
    routes: Object,
    manifests: dict[str, Object],
) -> tuple[Object, ...]:
    """Make what is to be applied, with the router's records of all revisions in it."""
    settings = observed.settings
    token = router.token(settings.router_key, obj["metadata"]["uid"])
    children: list[Object] = [
        router_parts.token_secret(obj, token),
        router_parts.config_map(obj, routes, manifests, settings.router_key),
        router_parts.service(obj),
        router_parts.deployment(obj, spec, token, settings),
    ]
    for revision, replicas in sorted(decision.replicas.items()):
        if revision in manifests:
            children += [serving.headless_service(obj, revision), serving.scaled(manifests[revision], replicas)]
    if spec.replicas > 1:
        first = decision.stable or decision.candidate
        children.append(serving.disruption_budget(obj, keys.ROLE_SERVER, first.revision if first else ""))
        children.append(serving.disruption_budget(obj, keys.ROLE_ROUTER))
    return tuple(children)


def records(
    obj: Object,
    spec: ModelDeploymentSpec,
    observed: Observed,
    decision: Decision,
    built: Mapping[str, Object],
    going: Collection[str],
) -> dict[str, Object]:
    """The manifest of each wanted revision: as recorded, else as it stands in the cluster, else built.

    The record of one that is not wanted is kept as long as its Service is there: nothing else tells of it. That of one
    whose Deployment goes is dropped, so that the next pass builds it; of one that somebody deleted it is still there.
    """
    found = {revision: observed.records[revision] for revision in observed.strays}
    wanted = observed.wanted
    for revision in decision.replicas:
        if revision in going:
            continue
        if revision in built:  # it has no Deployment, or one that is just like it
            found[revision] = built[revision]
        elif revision in observed.records:
            found[revision] = observed.records[revision]
        elif revision in observed.live:
            found[revision] = serving.record_of(observed.live[revision])
        elif wanted.revision is not None and wanted.model is not None and revision == wanted.revision.revision:
            found[revision] = serving.deployment(obj, spec, revision, wanted.model, observed.settings)
    return found


def anew(obj: Object, spec: ModelDeploymentSpec, observed: Observed, decision: Decision) -> dict[str, Object]:
    """The revision that the spec asks for, as it would be built now; empty where that would touch pods that serve.

    By this a mended setting of the operator, the image first of all, reaches the pods that fail for want of it: those
    of a candidate that has not begun to serve, and of a stable revision none of whose pods can serve for want of it.
    Empty also while pods may just need time.
    """
    wanted = observed.wanted
    if wanted.revision is None or wanted.model is None:
        return {}
    name = wanted.revision.revision
    pods = observed.seen.pods.get(name)
    if pods is not None and (pods.ready or not pods.failing):
        return {}
    if decision.candidate is not None and decision.candidate.revision == name:
        due = decision.rollout.phase == PREPARING
    else:
        due = decision.stable is not None and decision.stable.revision == name and pods is not None and pods.imageless
    return {name: serving.deployment(obj, spec, name, wanted.model, observed.settings)} if due else {}


def outdated(observed: Observed, built: Mapping[str, Object]) -> list[str]:
    """Revisions whose Deployment goes, so that the next pass makes it anew.

    It is not changed: a pod that waits for its image keeps the GPU that its successor would wait for. A record alone
    does not tell: one that was read back from the cluster says also what the API server added.
    """
    return [name for name, manifest in built.items()
            if name in observed.live and observed.records.get(name) != manifest
            and not _is_made_of(observed.live[name], manifest)]  # fmt: skip


def _is_made_of(live: Object, manifest: Object) -> bool:
    return covers(live["spec"], serving.scaled(manifest, live["spec"].get("replicas", 1))["spec"])


def server(obj: Object, revision: str) -> Key:
    """Where a revision's Deployment is."""
    return Key("Deployment", obj["metadata"]["namespace"], serving.revision_name(obj, revision))


def removed(obj: Object, spec: ModelDeploymentSpec, observed: Observed, decision: Decision) -> tuple[Key, ...]:
    """What is to be deleted."""
    namespace = obj["metadata"]["namespace"]
    gone = [
        Key(kind, namespace, serving.revision_name(obj, revision))
        for revision in decision.remove
        for kind in ("Service", "Deployment")  # by its Deployment a revision is known: that one last
    ]
    gone += [
        Key("Service", namespace, serving.revision_name(obj, revision))
        for revision in sorted(observed.strays - decision.replicas.keys())
    ]
    if spec.replicas <= 1:
        gone += [Key("PodDisruptionBudget", namespace, name) for name in sorted(observed.budgets)]
    return tuple(gone)
