"""A batch object and its resolved inputs -> one Job. The RunSpec rides in a variable: one child, one write."""

from slmops.api import keys
from slmops.api.batch import BatchSpec
from slmops.api.run import (
    CONFIGMAP_ROOT,
    ENV_GPU,
    ENV_RUN,
    EXIT_FATAL,
    EXIT_INTERRUPTED,
    PVC_ROOT,
    SECRET_ROOT,
    TERMINATION_LOG,
    WORK_DIR,
    RunSpec,
)
from slmops.build import parts
from slmops.build.inputs import claim_of, inputs
from slmops.build.parts import Object
from slmops.settings import Settings

CONTAINER = "worker"
GRACE_SECONDS = 60  # for the checkpoint on SIGTERM

_GPUS = ("nvidia.com/gpu", "nvidia.com/mig-")  # how the names of these resources begin

# A mesh's sidecar does not end with the worker, and neither does its pod then, nor the Job.
_NO_SIDECAR = {"sidecar.istio.io/inject": "false"}

SUFFIX = {"DistillationJob": "distill", "FineTuneJob": "finetune", "QuantizedModel": "quantize"}

ANNOTATION_SUSPENDED = "slmops.dev/suspended"  # on a suspended Job: whether by its object's spec.suspend

_POLICY = ("suspend", "backoffLimit", "activeDeadlineSeconds")


def job_name(owner: Object) -> str:
    """Deterministic name of the Job; the kind is part of it: two kinds may have objects of one name."""
    return keys.child_name(owner["metadata"]["name"], SUFFIX[owner["kind"]])


def job(owner: Object, spec: BatchSpec, run: RunSpec, settings: Settings) -> Object:
    """Build the Job of a batch object.

    The Job has no ttlSecondsAfterFinished: the operator deletes it itself once the result stands in the object's
    status, so that no outage of the operator can lose a result.
    """
    more = {keys.LABEL_QUEUE: spec.queue_name} if spec.queue_name else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": parts.metadata(owner, job_name(owner), keys.ROLE_WORKER, more),
        "spec": {
            **policy(spec, spec.queue_name),
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",  # never two pods of one run at once
            "podFailurePolicy": {
                "rules": [
                    # Evicted, preempted, drained, node lost: not the run's fault.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "Ignore", "onExitCodes": _exits(EXIT_INTERRUPTED)},
                    {"action": "FailJob", "onExitCodes": _exits(EXIT_FATAL)},
                ]
            },
            "template": {
                "metadata": {
                    "labels": {**parts.labels(owner, keys.ROLE_WORKER), **_NO_SIDECAR},
                    "annotations": {"linkerd.io/inject": "disabled"},
                },
                "spec": _pod(spec, run, settings),
            },
        },
    }


def queue_of(current: Object, spec: BatchSpec) -> str | None:
    """Name the queue of the Job `current`: Kueue labels a Job without one if the namespace has a default queue."""
    labels = current["metadata"].get("labels") or {}
    return spec.queue_name or labels.get(keys.LABEL_QUEUE)


def held(current: Object, spec: BatchSpec, *, suspended: bool) -> bool:
    """Whether somebody else suspended the Job `current`: Kueue, also without a queue, or a person. Theirs to resume.

    `suspended`: whether it was, by its object's status. This is asked where nothing is noted, as by older operators.
    """
    note = (current["metadata"].get("annotations") or {}).get(ANNOTATION_SUSPENDED)
    ours = suspended if note is None else note == "true"
    return bool(current["spec"].get("suspend")) and bool(queue_of(current, spec) or not ours)


def policy(spec: BatchSpec, queue: str | None) -> Object:
    """Build the Job fields that stay mutable. A queued Job's `suspend` is Kueue's alone."""
    fields: Object = {"backoffLimit": spec.backoff_limit}
    if spec.active_deadline_seconds is not None:
        fields["activeDeadlineSeconds"] = spec.active_deadline_seconds
    if not queue:
        fields["suspend"] = spec.suspend
    return fields


def revised(current: Object, spec: BatchSpec, *, suspended: bool) -> Object | None:
    """Build the Job `current` with the policy of `spec`; None where it has it already. `suspended` is as for `held`.

    All else is what stands in the cluster: a Job's template is immutable, and a newer operator may build another one.
    The resourceVersion makes the write fail if somebody (Kueue) changed the Job since it was read.
    """
    wanted = policy(spec, queue_of(current, spec))
    theirs = held(current, spec, suspended=suspended)
    if theirs and not spec.suspend:
        wanted.pop("suspend", None)
    have, before = current["spec"], current["metadata"].get("annotations") or {}
    notes = {name: value for name, value in before.items() if name != ANNOTATION_SUSPENDED}
    if wanted.get("suspend") or (theirs and ANNOTATION_SUSPENDED in before):
        notes[ANNOTATION_SUSPENDED] = "false" if theirs else "true"
    unset = [name for name in _POLICY if name not in wanted and name in have and name != "suspend"]
    if not unset and notes == before and all(have.get(name) == value for name, value in wanted.items()):
        return None
    metadata = current["metadata"]
    # `suspend`: what one apply wrote and the next leaves out is taken away, and Kueue's Job would start unadmitted.
    kept = ("completions", "parallelism", "podReplacementPolicy", "podFailurePolicy", "template", "suspend")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "resourceVersion": metadata["resourceVersion"],
            "labels": metadata.get("labels") or {},
            "annotations": notes,
            "ownerReferences": metadata.get("ownerReferences") or [],
        },
        "spec": {**{name: have[name] for name in kept if name in have}, **wanted},
    }


def _exits(code: int) -> Object:
    return {"containerName": CONTAINER, "operator": "In", "values": [code]}


def _pod(spec: BatchSpec, run: RunSpec, settings: Settings) -> Object:
    volumes, mounts = _volumes(spec, run, settings)
    image = (spec.pod.image if spec.pod else None) or settings.trainer_image
    return {
        **parts.placement(spec.pod),
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": parts.POD_SECURITY,
        "containers": [
            {
                "name": CONTAINER,
                "image": image,
                "imagePullPolicy": settings.image_pull_policy,
                "env": parts.environment(_environment(spec, run, settings), spec.pod),
                "ports": [{"name": "metrics", "containerPort": keys.METRICS_PORT, "protocol": "TCP"}],
                "resources": parts.resources(spec.pod),
                "securityContext": parts.CONTAINER_SECURITY,
                "terminationMessagePath": TERMINATION_LOG,
                "terminationMessagePolicy": "File",
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _environment(spec: BatchSpec, run: RunSpec, settings: Settings) -> dict[str, str]:
    env = {
        ENV_RUN: run.model_dump_json(by_alias=True, exclude_none=True),
        "HOME": "/tmp",  # noqa: S108  # an emptyDir: the root file system is read-only
        "HF_HOME": f"{WORK_DIR}/hf",
        "PYTHONUNBUFFERED": "1",
        **parts.NO_TELEMETRY,
    }
    if settings.plain_http:
        env["SLMOPS_PLAIN_HTTP"] = settings.plain_http
    if settings.registry_secret:
        env["SLMOPS_REGISTRY_AUTH"] = f"{SECRET_ROOT}/{settings.registry_secret}/.dockerconfigjson"
    if settings.hf_endpoint:
        env["HF_ENDPOINT"] = settings.hf_endpoint
    limits = (spec.pod.resources.limits if spec.pod and spec.pod.resources else None) or {}
    gpus = [name for name, amount in limits.items() if name.startswith(_GPUS) and amount != "0"]
    if gpus:
        env[ENV_GPU] = gpus[0]
    return env


def _volumes(spec: BatchSpec, run: RunSpec, settings: Settings) -> tuple[list[Object], list[Object]]:
    """Volumes and their mounts; volumes are numbered, for the names of what they hold may be too long for one."""
    needed = inputs(spec, extra_secrets=run_secrets(run, settings))
    volumes: list[Object] = [{"name": "tmp", "emptyDir": {}}, {"name": "work", "emptyDir": {}}]
    mounts: list[Object] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "work", "mountPath": WORK_DIR}]  # noqa: S108
    for number, name in enumerate(sorted(needed.config_maps)):
        volumes.append({"name": f"configmap-{number}", "configMap": {"name": name, "optional": False}})
        mounts.append({"name": f"configmap-{number}", "mountPath": f"{CONFIGMAP_ROOT}/{name}", "readOnly": True})
    for number, name in enumerate(sorted(needed.secrets)):
        # 0440: root's file, readable through fsGroup.
        secret = {"secretName": name, "optional": False, "defaultMode": 0o440}
        volumes.append({"name": f"secret-{number}", "secret": secret})
        mounts.append({"name": f"secret-{number}", "mountPath": f"{SECRET_ROOT}/{name}", "readOnly": True})
    written = claim_of(run.output) | claim_of(run.checkpoint)
    for number, name in enumerate(sorted(needed.claims | claim_of(run.model.uri) | written)):
        volumes.append({"name": f"pvc-{number}", "persistentVolumeClaim": {"claimName": name}})
        mount: Object = {"name": f"pvc-{number}", "mountPath": f"{PVC_ROOT}/{name}"}
        mounts.append(mount if name in written else mount | {"readOnly": True})
    return volumes, mounts


def run_secrets(run: RunSpec, settings: Settings) -> tuple[str, ...]:
    """Name the Secrets that resolving added to those of the spec."""
    found = (run.model.secret, run.teacher.secret if run.teacher else None, settings.registry_secret)
    return tuple(name for name in found if name)
