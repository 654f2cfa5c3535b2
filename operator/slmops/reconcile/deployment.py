"""ModelDeployment: reads its world, lets the rollout decide, and says what has to be applied.

A problem of the new revision (its source is not ready, a Secret is missing, it cannot be served) never stops the pass:
the stable revision is looked after in any case.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import datetime

from slmops.api import keys
from slmops.api.deployment import ModelDeploymentSpec, ModelDeploymentStatus, Revision, ServedModel, Verdict
from slmops.api.meta import Lineage
from slmops.api.run import Input
from slmops.build import router as router_parts
from slmops.build import serving
from slmops.cluster.port import Cluster, ClusterError, Key, Object
from slmops.reconcile import conditions, sources
from slmops.reconcile import deployment_children as children
from slmops.reconcile.deployment_measure import measure
from slmops.reconcile.deployment_pods import EVENTS_SECONDS, PodReader, role
from slmops.reconcile.deployment_report import Facts, report
from slmops.reconcile.deployment_world import Agent, Observed, Wanted
from slmops.reconcile.protocol import World
from slmops.reconcile.serverpods import drains, is_ready, mute
from slmops.reconcile.state import Count, Event, Plan, Retry, Routes
from slmops.remote import prometheus, router
from slmops.remote.errors import RemoteError, TokenRefusedError
from slmops.remote.router import Report
from slmops.rollout.machine import decide, measurement_due, measurement_window
from slmops.rollout.phases import ROLLING_OUT
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
        wanted, anew = observed.wanted, children.anew(obj, spec, observed, decision)
        outdated = children.outdated(observed, anew)
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
        records = children.records(obj, spec, observed, decision, anew, outdated)
        return Plan(
            status=status.wire(),
            apply=children.made(obj, spec, observed, decision, routes, records),
            routes=_orders(obj, observed, decision, routes),
            delete=(
                *children.removed(obj, spec, observed, decision),
                *(children.server(obj, revision) for revision in outdated),
            ),
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
