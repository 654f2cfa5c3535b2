"""ModelDeployment: reads its world, lets the rollout decide, and says what has to be applied.

A problem of the new revision (its source is not ready, a Secret is missing, it cannot be served) never stops the pass:
the stable revision is looked after in any case.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from slmops.api import keys
from slmops.api.deployment import ModelDeploymentSpec, ModelDeploymentStatus, Revision, ServedModel, Verdict
from slmops.api.meta import Lineage
from slmops.api.run import Input
from slmops.build import router as router_parts
from slmops.build import serving
from slmops.cluster.port import Cluster, ClusterError, Key, Object
from slmops.cluster.same import covers
from slmops.reconcile import conditions, sources
from slmops.reconcile.deployment_measure import measure
from slmops.reconcile.deployment_pods import EVENTS_SECONDS, PodReader, role
from slmops.reconcile.deployment_report import Facts, report
from slmops.reconcile.protocol import World
from slmops.reconcile.serverpods import drains, is_ready, mute
from slmops.reconcile.state import Count, Event, Plan, Retry, Routes
from slmops.remote import prometheus, router
from slmops.remote.errors import RemoteError, TokenRefusedError
from slmops.remote.router import Report
from slmops.rollout.machine import decide, measurement_due, measurement_window
from slmops.rollout.phases import PREPARING, ROLLING_OUT
from slmops.rollout.revision import identify
from slmops.rollout.seen import Decision, Problem, Router, Seen
from slmops.settings import Settings

OUTCOMES = {  # of a rollout, by the reason of the Event that tells it
    "RolloutStarted": "Started",
    "RolloutPromoted": "Promoted",
    "RollingBack": "RolledBack",
    "RolloutReverted": "Reverted",
    "RolloutSuperseded": "Superseded",
}
STRAY_SECONDS = 1.0  # until what is left of a revision is looked for again
ROUTERS_MOST = 8  # asked in a pass: there are two, and some that come or go; anybody's pod may carry their labels
RECHECK_SECONDS = 10.0  # until a Secret that is missing, or that may not be read, is looked for again

Ask = Callable[[str, str], Report]
Query = Callable[[str, str, datetime], prometheus.Answer]


@dataclass(frozen=True)
class Wanted:
    """What the spec asks for, as far as it can be told now."""

    revision: Revision | None = None
    model: Input | None = None
    lineage: Lineage | None = None  # of the model that is asked for
    waiting: Problem | None = None  # SourceNotReady, SecretNotFound, Forbidden: mends itself
    other: bool = False  # what is waited for is sure to be another revision than the candidate


@dataclass(frozen=True)
class Agent:
    """A router pod that is ready, or drains."""

    url: str
    report: Report | None  # None where it does not answer, or refuses our token
    leaving: bool = False  # it drains: told of new weights, for it still answers requests, and asked for nothing
    refuses: bool = False


@dataclass(frozen=True)
class Observed:
    """All that a decision needs."""

    settings: Settings
    wanted: Wanted
    seen: Seen
    agents: tuple[Agent, ...] = ()
    live: Mapping[str, Object] = field(default_factory=dict)  # Deployments by revision
    records: Mapping[str, Object] = field(default_factory=dict)
    strays: frozenset[str] = frozenset()  # revisions on record that have a Service, but no Deployment
    budgets: frozenset[str] = frozenset()  # names of disruption budgets that exist
    mute: bool = False  # a pod does not start and does not say why


class DeploymentReconciler:
    """Implements protocol.Reconciler; `ask` and `query` are its edges to routers and Prometheus."""

    kind = "ModelDeployment"

    def __init__(self, ask: Ask | None = None, query: Query = prometheus.query) -> None:
        self._ask, self._query = ask or router.Observer(), query
        self._pods = PodReader()

    def references(self, obj: Object) -> frozenset[tuple[str, str]]:
        """See protocol.Reconciler."""
        return sources.references(obj)

    def observe(self, obj: Object, world: World) -> Observed:
        """Read Deployments, pods, routers, and Prometheus where a measurement is due. Raises Retry, ClusterError."""
        if not world.settings.router_key:
            raise Retry("OperatorMisconfigured", "The operator has no SLMOPS_ROUTER_KEY.", after=60.0)
        spec = ModelDeploymentSpec.model_validate(obj["spec"])
        status = ModelDeploymentStatus.model_validate(obj.get("status") or {})
        namespace, cluster = obj["metadata"]["namespace"], world.cluster
        wanted = _wanted(cluster, obj, spec, status)
        owned = {keys.LABEL_OWNER_UID: obj["metadata"]["uid"]}
        pods = cluster.list("Pod", namespace, owned)
        deployments = cluster.list("Deployment", namespace, owned)
        live = {
            found["metadata"]["labels"][keys.LABEL_REVISION]: found
            for found in deployments
            if keys.LABEL_REVISION in found["metadata"]["labels"] and not found["metadata"].get("deletionTimestamp")
        }
        routers = [pod for pod in pods if role(pod) == keys.ROLE_ROUTER]
        front = next((found for found in deployments if role(found) == keys.ROLE_ROUTER), {})
        up = [pod for pod in routers if _address(pod) and (is_ready(pod) or drains(pod, world.now))]
        asked = sorted(up, key=is_ready, reverse=True)[:ROUTERS_MOST]
        agents = tuple(self._agent(obj, pod, world.settings) for pod in asked)
        began = status.rollout.routed_at or status.rollout.entered_at
        seen = Seen(
            target=wanted.revision,
            other=wanted.waiting if wanted.other else None,
            pods={name: self._pods.pods_of(world, found, pods, began) for name, found in live.items()},
            routers=tuple(_router(agent) for agent in agents if not agent.leaving),
            router_problem=self._pods.problem(world, front, routers),
            refusal=_refusal(obj, status),
            annotations=obj["metadata"].get("annotations") or {},
        )
        if measurement_due(spec, status, seen, world.now):
            seen = Seen(**{**vars(seen), "verdicts": self._measure(obj, spec, status, seen, world)})
        config_map = cluster.get(Key("ConfigMap", namespace, router_parts.router_name(obj)))
        records = router_parts.records_of(obj, config_map, world.settings.router_key)
        strays = frozenset(
            revision
            for revision in records
            if revision not in live and cluster.get(Key("Service", namespace, serving.revision_name(obj, revision)))
        )
        names = [serving.budget_name(obj, role) for role in (keys.ROLE_SERVER, keys.ROLE_ROUTER)]
        return Observed(
            settings=world.settings,
            wanted=wanted,
            seen=seen,
            agents=agents,
            live=live,
            records=records,
            strays=strays,
            budgets=frozenset(n for n in names if cluster.get(Key("PodDisruptionBudget", namespace, n))),
            mute=mute(pods) is not None,
        )

    def decide(self, obj: Object, observed: Observed, now: datetime) -> Plan:
        """Pure."""
        spec = ModelDeploymentSpec.model_validate(obj["spec"])
        before = ModelDeploymentStatus.model_validate(obj.get("status") or {})
        decision = decide(spec, before, observed.seen, now)
        wanted, anew = observed.wanted, _anew(obj, spec, observed, decision)
        outdated = _outdated(observed, anew)
        if decision.candidate is not None and decision.candidate.revision in outdated:  # it has its whole time again
            fresh = decision.rollout.model_copy(update={"waiting_since": None, "waiting_pods": None})
            decision = replace(decision, rollout=fresh)
        facts = Facts(spec, before, observed.seen, obj["metadata"].get("generation", 0), wanted.waiting, now)
        status = report(facts, decision).model_copy(
            update={
                "endpoint": router_parts.endpoint(obj),
                "selector": serving.scale_selector(obj, _sharing(decision)),
                "lineage": _lineage(decision.stable, wanted.lineage, before.lineage),
            }
        )
        routes = _routes(obj, spec, decision, observed.agents)
        records = _records(obj, spec, observed, decision, anew, outdated)
        return Plan(
            status=status.wire(),
            apply=_children(obj, spec, observed, decision, routes, records),
            routes=_orders(obj, observed, decision, routes),
            delete=(*_removed(obj, spec, observed, decision), *(_server(obj, revision) for revision in outdated)),
            events=tuple(Event(note.reason, note.message, note.warning) for note in decision.notes),
            counts=_counts(obj, decision),
            requeue=_requeue(observed, decision),
            keep_going=True,
            status_first=decision.given_up,
        )

    def _agent(self, obj: Object, pod: Object, settings: Settings) -> Agent:
        url, leaving = router.agent_url(_address(pod)), not is_ready(pod)
        try:
            return Agent(url, self._ask(url, router.token(settings.router_key, obj["metadata"]["uid"])), leaving)
        except RemoteError as error:
            return Agent(url, None, leaving, refuses=isinstance(error, TokenRefusedError))

    def _measure(
        self, obj: Object, spec: ModelDeploymentSpec, status: ModelDeploymentStatus, seen: Seen, world: World
    ) -> tuple[Verdict, ...]:
        window = measurement_window(spec, status, seen, world.now)
        return measure(obj, spec, status, world.settings.prometheus_url, world.now, window, self._query)


def _wanted(cluster: Cluster, obj: Object, spec: ModelDeploymentSpec, status: ModelDeploymentStatus) -> Wanted:
    """Resolve the model. Raises ClusterError."""
    namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
    try:
        model, digest, lineage = _resolved(cluster, namespace, spec.model)
    except Retry as retry:
        ref, candidate = spec.model.ref, status.candidate
        other = ref is not None and candidate is not None and candidate.source != f"{ref.kind}/{ref.name}"
        return Wanted(waiting=Problem(retry.reason, retry.message), other=other)
    revision = identify(name, spec, model, digest)
    if not digest and "@sha256:" in model.uri:  # a pinned URI names its content
        revision = revision.model_copy(update={"digest": model.uri.rpartition("@")[2]})
    known = {r.revision for r in (status.stable, status.candidate) if r}
    try:
        missing = "" if revision.revision in known else _missing_secret(cluster, namespace, spec, model)
    except ClusterError as error:
        if error.status != 403:
            raise
        message = f"The operator may not read a Secret that the spec names: {error.message}"
        return Wanted(waiting=Problem("Forbidden", message), other=True)
    if missing:
        return Wanted(waiting=Problem("SecretNotFound", f"Secret {missing} does not exist: create it."), other=True)
    return Wanted(revision=revision, model=model, lineage=lineage)


def _resolved(cluster: Cluster, namespace: str, source: ServedModel) -> tuple[Input, str, Lineage | None]:
    """The model, the digest of its artifact where that is known, and its lineage: of one moment, by one read.

    Raises Retry(SourceNotReady), ClusterError.
    """
    if source.ref is None:
        return Input(uri=source.uri or "", secret=source.secret_ref.name if source.secret_ref else None), "", None
    name = f"{source.ref.kind}/{source.ref.name}"
    said = sources.ready_object(cluster, Key(source.ref.kind, namespace, source.ref.name)).get("status") or {}
    artifact = said.get("artifact")
    if not artifact:
        raise sources.not_ready(f"{name} is Ready but names no artifact.")
    lineage = Lineage.model_validate(said.get("lineage") or {"digest": artifact["digest"]})
    digest = artifact["digest"]
    return Input(uri=sources.pinned(artifact["uri"], digest), name=name), digest, lineage


def _missing_secret(cluster: Cluster, namespace: str, spec: ModelDeploymentSpec, model: Input) -> str:
    """Name a Secret that pods would wait for in vain."""
    ref = spec.endpoint.api_keys_secret_ref
    names = (model.secret, ref.name if ref else None)
    return next((name for name in names if name and cluster.get(Key("Secret", namespace, name)) is None), "")


def _lineage(stable: Revision | None, asked: Lineage | None, before: Lineage | None) -> Lineage | None:
    """Of the stable model, from its source while that still has this artifact, then from memory."""
    if stable is None or not stable.digest:
        return None
    known = (one for one in (asked, before) if one is not None and one.digest == stable.digest)
    return next(known, Lineage(digest=stable.digest))


def _sharing(decision: Decision) -> set[str]:
    """The revisions that share the load; idle pods of a former one would make an autoscaler believe in less of it."""
    rolling = decision.stable is None or decision.rollout.phase in ROLLING_OUT
    found = (decision.stable, decision.candidate if rolling else None)
    return {one.revision for one in found if one is not None}


def _router(agent: Agent) -> Router:
    said = agent.report
    if said is None:
        return Router(refuses=agent.refuses)
    shares = said.revisions
    return Router(
        weights={name: share.weight for name, share in shares.items()},
        epoch=said.epoch,
        ready={name: share.ready for name, share in shares.items()},
        answered={name: share.requests for name, share in shares.items()},
        chosen={name: share.chosen for name, share in shares.items()},
        turns=said.turns,
    )


def _refusal(obj: Object, status: ModelDeploymentStatus) -> Problem | None:
    """Why the candidate has no Deployment, where the last pass was refused it."""
    said = conditions.find(status.conditions, conditions.READY)
    if status.candidate is None or said is None:
        return None
    name = f"Deployment {serving.revision_name(obj, status.candidate.revision)}"
    _, refused, why = said.message.partition(name)  # before it stands how long it has been waited for
    return Problem(said.reason, refused + why) if refused else None


def _address(pod: Object) -> str:
    return str((pod.get("status") or {}).get("podIP") or "")


def _routes(obj: Object, spec: ModelDeploymentSpec, decision: Decision, agents: Collection[Agent]) -> Object:
    first = decision.stable or decision.candidate
    fallback = first.revision if first else ""
    given = [agent.report.routes for agent in agents if agent.report is not None]
    return router_parts.routes(obj, decision.weights, fallback, decision.epoch, spec.replicas, given)


def _orders(obj: Object, observed: Observed, decision: Decision, routes: Object) -> tuple[Routes, ...]:
    """To every router that answers and has other routes; one that is silent is held against the rollout elsewhere."""
    token = router.token(observed.settings.router_key, obj["metadata"]["uid"])
    return tuple(
        Routes(url=agent.url, weights=decision.weights, token=token, body=routes, leaving=agent.leaving)
        for agent in observed.agents
        if agent.report is not None and agent.report.routes != routes
    )


def _children(
    obj: Object,
    spec: ModelDeploymentSpec,
    observed: Observed,
    decision: Decision,
    routes: Object,
    records: dict[str, Object],
) -> tuple[Object, ...]:
    settings = observed.settings
    token = router.token(settings.router_key, obj["metadata"]["uid"])
    made: list[Object] = [
        router_parts.token_secret(obj, token),
        router_parts.config_map(obj, routes, records, settings.router_key),
        router_parts.service(obj),
        router_parts.deployment(obj, spec, token, settings),
    ]
    for revision, replicas in sorted(decision.replicas.items()):
        if revision in records:
            made += [serving.headless_service(obj, revision), serving.scaled(records[revision], replicas)]
    if spec.replicas > 1:
        first = decision.stable or decision.candidate
        made.append(serving.disruption_budget(obj, keys.ROLE_SERVER, first.revision if first else ""))
        made.append(serving.disruption_budget(obj, keys.ROLE_ROUTER))
    return tuple(made)


def _records(
    obj: Object,
    spec: ModelDeploymentSpec,
    observed: Observed,
    decision: Decision,
    anew: Mapping[str, Object],
    outdated: Collection[str],
) -> dict[str, Object]:
    """The manifest of each wanted revision: as recorded, else as it stands in the cluster, else built.

    The record of one that is not wanted is kept as long as its Service is there: nothing else tells of it. That of one
    whose Deployment goes is dropped, so that the next pass builds it; of one that somebody deleted it is still there.
    """
    records = {revision: observed.records[revision] for revision in observed.strays}
    wanted = observed.wanted
    for revision in decision.replicas:
        if revision in outdated:
            continue
        if revision in anew:  # it has no Deployment, or one that is just like it
            records[revision] = anew[revision]
        elif revision in observed.records:
            records[revision] = observed.records[revision]
        elif revision in observed.live:
            records[revision] = serving.record_of(observed.live[revision])
        elif wanted.revision is not None and wanted.model is not None and revision == wanted.revision.revision:
            records[revision] = serving.deployment(obj, spec, revision, wanted.model, observed.settings)
    return records


def _anew(obj: Object, spec: ModelDeploymentSpec, observed: Observed, decision: Decision) -> dict[str, Object]:
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


def _outdated(observed: Observed, anew: Mapping[str, Object]) -> list[str]:
    """Revisions whose Deployment goes, so that the next pass makes it anew.

    It is not changed: a pod that waits for its image keeps the GPU that its successor would wait for. A record alone
    does not tell: one that was read back from the cluster says also what the API server added.
    """
    return [name for name, manifest in anew.items()
            if name in observed.live and observed.records.get(name) != manifest
            and not _is_made_of(observed.live[name], manifest)]  # fmt: skip


def _is_made_of(live: Object, manifest: Object) -> bool:
    return covers(live["spec"], serving.scaled(manifest, live["spec"].get("replicas", 1))["spec"])


def _server(obj: Object, revision: str) -> Key:
    return Key("Deployment", obj["metadata"]["namespace"], serving.revision_name(obj, revision))


def _removed(obj: Object, spec: ModelDeploymentSpec, observed: Observed, decision: Decision) -> tuple[Key, ...]:
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


def _counts(obj: Object, decision: Decision) -> tuple[Count, ...]:
    whose = (obj["metadata"]["namespace"], obj["metadata"]["name"])
    outcomes = [OUTCOMES[note.reason] for note in decision.notes if note.reason in OUTCOMES]
    return (
        *(Count("rollouts", (*whose, outcome)) for outcome in outcomes),
        *(Count("verdicts", (*whose, verdict.name, verdict.verdict)) for verdict in decision.verdicts),
    )


def _requeue(observed: Observed, decision: Decision) -> float | None:
    wakes = [decision.requeue] if decision.requeue is not None else []
    if observed.strays - decision.replicas.keys():
        wakes.append(STRAY_SECONDS)
    wanted = observed.wanted
    if wanted.waiting and wanted.waiting.reason in ("SecretNotFound", "Forbidden"):
        wakes.append(RECHECK_SECONDS)
    if observed.mute:
        wakes.append(EVENTS_SECONDS)
    return min(wakes, default=None)


RECONCILER = DeploymentReconciler()
