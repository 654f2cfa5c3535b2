"""The three kinds that run to an end: DistillationJob, FineTuneJob, QuantizedModel.

One object has at most one Job at a time, always of the same name. The truth of a finished run is in the object's
status: a finished object's Job may go (its TTL, or by hand) and is never made again, an unfinished object's Job is.

What becomes of a Job that failed, by the reason that its last pod gave:
  something outside did not answer (WORLD: a source, the store, the teacher, an access right), or nobody knows: the pod
  went before its reason was read
      the object is not failed: Ready=False, Reconciling=True with that reason, and a new Job starts at
      status.nextRetryTime. The delay starts at 30 s and doubles up to 1 h, and it ends within a minute when a ConfigMap
      or a Secret that the object names has changed. So it mends itself when the cause goes, checkpoints are kept, and
      an outage of a day costs some thirty Jobs of one pod each, which waits itself for some minutes before it gives up
  somebody has to mend what is refused, and can: the teacher, a dataset or a model whose URI names no digest (SLOW)
      likewise, but from 10 min up to 6 h, and no Secret ends the delay: nothing tells when it is mended, and each look
      costs a pod, some seven on the first day and four a day then. Stalled=True instead of Reconciling
  anything else
      the object is failed: Failed=True, Stalled=True. It goes on from its checkpoint when something that could help
      was changed: a ConfigMap it names, a backoffLimit above the attempts so far (unless the worker said that trying
      again is useless), an activeDeadlineSeconds longer than the run was or none
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from slmops.api import keys
from slmops.api.base import Model
from slmops.api.batch import BatchSpec
from slmops.api.meta import BatchStatus, ModelSource, Progress
from slmops.api.run import RunSpec
from slmops.build.inputs import inputs
from slmops.build.job import job, job_name, run_secrets
from slmops.cluster.port import Key, Object
from slmops.reconcile import conditions, needs, sources
from slmops.reconcile.batch_end import is_finished
from slmops.reconcile.batch_life import decide
from slmops.reconcile.batch_pass import ANNOTATION_IMAGE, ANNOTATION_INPUTS, Blocked, Pass, Seen
from slmops.reconcile.ownership import check_ours
from slmops.reconcile.pods import LATE_SECONDS, created, ended, ended_at, is_over, running, trouble_of
from slmops.reconcile.protocol import World
from slmops.reconcile.state import Plan, Retry, Terminal

ReadProgress = Callable[[str], Progress | None]


@dataclass(frozen=True)
class Recipe:
    """What tells the three kinds apart."""

    kind: str
    slot: str  # the RunSpec field that takes the spec
    spec: type[BatchSpec]
    status: type[BatchStatus]
    model: Callable[[BatchSpec], ModelSource]
    columns: Callable[[BatchSpec], dict[str, str]]  # status fields that are for the table alone


class BatchReconciler:
    """Implements protocol.Reconciler for one of the three kinds."""

    def __init__(self, recipe: Recipe, read_progress: ReadProgress) -> None:
        self._recipe, self._read_progress = recipe, read_progress

    @property
    def kind(self) -> str:
        """The kind."""
        return self._recipe.kind

    def references(self, obj: Object) -> frozenset[tuple[str, str]]:
        """See protocol.Reconciler."""
        return sources.references(obj)

    def observe(self, obj: Object, world: World) -> Seen:
        """Read the Job, its pods, and only what the state of these asks for. Raises Retry, Terminal, ClusterError."""
        cluster, namespace = world.cluster, obj["metadata"]["namespace"]
        spec = self._recipe.spec.model_validate(obj["spec"])
        status = self._status(obj)
        found = cluster.get(Key("Job", namespace, job_name(obj)))
        if conditions.is_true(status.conditions, conditions.COMPLETE):  # what `decide` asks first, too
            return Seen(job=found if found is not None and _belongs(found, obj) else None)
        if found is not None:
            check_ours(obj, found)
        labels = {keys.LABEL_OWNER_UID: obj["metadata"]["uid"], keys.LABEL_ROLE: keys.ROLE_WORKER}
        pods = sorted(cluster.list("Pod", namespace, labels), key=created)
        mine = tuple(pod for pod in pods if found is not None and _belongs(pod, found))
        former = tuple(pod for pod in pods if pod not in mine and not ended(pod))
        wanted, blocked, digest = None, None, ""
        has_failed = conditions.is_true(status.conditions, conditions.FAILED)
        if not spec.suspend and (found is None or status.next_retry_time or has_failed):
            try:
                wanted, digest = self._wanted(obj, spec, world)
            except Retry as retry:
                blocked = Blocked(retry.reason, str(retry), retry.after or None)
            except Terminal as terminal:
                if not has_failed:
                    raise
                blocked = Blocked(terminal.reason, str(terminal), None)  # its Job is to be looked after all the same
        return Seen(
            job=found,
            pods=mine,
            former=former,
            wanted=wanted,
            blocked=blocked,
            inputs=digest,
            events=self._events(found, mine, world),
            progress=self._progress(mine),
            image=world.settings.trainer_image,
        )

    def decide(self, obj: Object, observed: Seen, now: datetime) -> Plan:
        """See protocol.Reconciler."""
        spec = self._recipe.spec.model_validate(obj["spec"])
        return decide(Pass(obj, spec, self._status(obj), observed, now))

    def _status(self, obj: Object) -> BatchStatus:
        spec = self._recipe.spec.model_validate(obj["spec"])
        status = self._recipe.status.model_validate(obj.get("status") or {})
        return status.model_copy(update=self._recipe.columns(spec))

    def _wanted(self, obj: Object, spec: BatchSpec, world: World) -> tuple[Object, str]:
        """The Job as it would be made now, and the hash of its inputs. Raises Retry, Terminal, ClusterError."""
        try:
            run = self._run(obj, spec, world)
        except Retry as retry:
            own = Key(self.kind, obj["metadata"]["namespace"], obj["metadata"]["name"])
            if retry.reason == sources.NOT_READY and world.circular(own):
                sources.check_cycle(world.cluster, obj)
            raise
        needed = inputs(spec, extra_secrets=run_secrets(run, world.settings))
        sources.check_apart(run.output, needed.uris | {run.model.uri})
        digest = needs.check(world.cluster, obj["metadata"]["namespace"], needed)
        made = job(obj, spec, run, world.settings)
        image = "" if spec.pod and spec.pod.image else world.settings.trainer_image
        notes = {name: value for name, value in ((ANNOTATION_INPUTS, digest), (ANNOTATION_IMAGE, image)) if value}
        return {**made, "metadata": {**made["metadata"], "annotations": notes}}, digest

    def _run(self, obj: Object, spec: BatchSpec, world: World) -> RunSpec:
        metadata = obj["metadata"]
        namespace = metadata["namespace"]
        output = sources.resolve_output(obj, spec.output, world.settings)
        teacher = getattr(spec, "teacher", None)
        # The pod's own form is none of the worker's business, and one variable holds no more than 128 KiB.
        slot: dict[str, Model] = {self._recipe.slot: spec.model_copy(update={"pod": None})}
        return RunSpec(
            namespace=namespace,
            name=metadata["name"],
            uid=metadata["uid"],
            model=sources.resolve_model(world.cluster, namespace, self._recipe.model(spec)),
            teacher=sources.resolve_teacher(world.cluster, namespace, teacher) if teacher else None,
            output=output.artifact,
            checkpoint=output.checkpoint,
            **slot,  # type: ignore[arg-type]  # distill, finetune or quantize
        )

    def _events(self, found: Object | None, pods: tuple[Object, ...], world: World) -> tuple[Object, ...]:
        """What has been told of a Job that has no pod, or of a pod that is long in starting. Raises ClusterError.

        Events are kept in no cache: each read scans all those of the namespace, so what a pod says itself is enough.
        """
        pod = next((pod for pod in reversed(pods) if not ended(pod)), None)
        if found is None or (pod is None and not _owes_pod(found, pods)):
            return ()
        if pod is not None and (running(pod) or trouble_of(pod)):
            return ()
        before = created(pod) if pod else ended_at(pods[-1]) if pods else None  # the first pod comes at once
        if before is not None and (world.now - before).total_seconds() <= LATE_SECONDS:
            return ()
        kind, metadata = ("Pod" if pod else "Job"), (pod or found)["metadata"]
        return tuple(world.cluster.events(metadata["namespace"], kind=kind, name=metadata["name"]))

    def _progress(self, pods: tuple[Object, ...]) -> Progress | None:
        for pod in reversed(pods):
            address = (pod.get("status") or {}).get("podIP")
            if address and running(pod):
                return self._read_progress(address)
        return None


def _owes_pod(job: Object, pods: tuple[Object, ...]) -> bool:
    """Whether the Job's controller is to make another pod: where it cannot, only Events of the Job say why."""
    return not (job["spec"].get("suspend") or is_finished(job) or (pods and not is_over(pods[-1])))


def _belongs(pod: Object, owner: Object) -> bool:
    uid = owner["metadata"]["uid"]
    return any(ref.get("uid") == uid for ref in pod["metadata"].get("ownerReferences") or [])
