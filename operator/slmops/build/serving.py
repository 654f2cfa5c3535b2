"""A revision of a ModelDeployment -> its Deployment and headless Service; the pods' disruption budget.

A Deployment is built when its revision is new, and kept on record beside the router's routes (build/router.py). From
then on its record is applied, with the wanted replicas: neither an edited spec nor an upgraded operator, with another
default image or another template, touches pods that serve. A revision whose pods have failed to become ready is built
anew as long as it has not begun to serve, so that it gets what was mended; one that served, where no node gets its
image any more.
"""

from collections.abc import Collection
from typing import Any

from slmops.api import keys
from slmops.api.deployment import AUTO, ModelDeploymentSpec
from slmops.api.run import PVC_ROOT, SECRET_ROOT, TERMINATION_LOG, Input
from slmops.build import parts
from slmops.build.inputs import claim_of
from slmops.build.parts import Object
from slmops.settings import Settings

SERVER, PULL = "server", "pull"
RESTARTED = "kubectl.kubernetes.io/restartedAt"
MODEL_DIR = "/model"
# For answers that run when a pod is stopped; without any, it ends by itself. Not more: a namespace that is deleted
# looks for pods again only after half of the longest grace in it, however soon they end.
GRACE_SECONDS = 180
LOAD_SECONDS = 3600  # longest load of a model before the kubelet starts the container again


def revision_name(owner: Object, revision: str) -> str:
    """Name of a revision's Deployment and Service."""
    return keys.child_name(owner["metadata"]["name"], revision)


def selector(owner: Object, revision: str = "") -> dict[str, str]:
    """Labels of the server pods: of one revision, or of all."""
    labels = {keys.LABEL_OWNER_UID: owner["metadata"]["uid"], keys.LABEL_ROLE: keys.ROLE_SERVER}
    return labels | ({keys.LABEL_REVISION: revision} if revision else {})


def scale_selector(owner: Object, revisions: Collection[str]) -> str:
    """Write the selector of these revisions' server pods, as an autoscaler reads it."""
    equal = [f"{name}={value}" for name, value in selector(owner).items()]
    among = [f"{keys.LABEL_REVISION} in ({','.join(sorted(revisions))})"] if revisions else []
    return ",".join((*equal, *among))


def deployment(owner: Object, spec: ModelDeploymentSpec, revision: str, model: Input, settings: Settings) -> Object:
    """Build the Deployment of a new revision, with no replicas yet."""
    more = {keys.LABEL_REVISION: revision}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": parts.metadata(owner, revision_name(owner, revision), keys.ROLE_SERVER, more),
        "spec": {
            "replicas": 0,
            "revisionHistoryLimit": 1,
            "selector": {"matchLabels": selector(owner, revision)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {
                    "labels": parts.labels(owner, keys.ROLE_SERVER) | more,
                    "annotations": {
                        "prometheus.io/scrape": "true",
                        "prometheus.io/port": str(keys.METRICS_PORT),
                        "kubectl.kubernetes.io/default-container": SERVER,
                    },
                },
                "spec": _pod(owner["metadata"]["name"], spec, model, settings),
            },
        },
    }


def scaled(manifest: Object, replicas: int) -> Object:
    """The Deployment with so many replicas."""
    return {**manifest, "spec": {**manifest["spec"], "replicas": replicas}}


def record_of(live: Object) -> Object:
    """A Deployment's manifest read back from the cluster, should its record be lost.

    Without the time of the last `kubectl rollout restart`: applied again, it would undo the next one.
    """
    metadata, template = live["metadata"], live["spec"]["template"]
    kept = {name: metadata[name] for name in ("name", "namespace", "labels", "ownerReferences") if name in metadata}
    notes = {name: note for name, note in (template["metadata"].get("annotations") or {}).items() if name != RESTARTED}
    template = {**template, "metadata": {**template["metadata"], "annotations": notes}}
    spec = {**live["spec"], "replicas": 0, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": kept, "spec": spec}


def headless_service(owner: Object, revision: str) -> Object:
    """Build the Service by which the router finds the ready pods of a revision, in DNS."""
    more = {keys.LABEL_REVISION: revision}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": parts.metadata(owner, revision_name(owner, revision), keys.ROLE_SERVER, more),
        "spec": {
            "clusterIP": "None",
            "ipFamilyPolicy": "PreferDualStack",
            "selector": selector(owner, revision),
            "ports": [{"name": "http", "port": keys.API_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def budget_name(owner: Object, role: str) -> str:
    """Name of the disruption budget of the servers, or of the routers."""
    return keys.child_name(owner["metadata"]["name"], f"{role}s")


def disruption_budget(owner: Object, role: str, revision: str = "") -> Object:
    """Build the rule that evictions take one pod at a time: of the routers, or of the servers of this revision.

    It is for the stable one. Were a candidate's pods counted with it, one that starts would stop every drain. A
    candidate needs none: the stable revision keeps all its pods, and takes over where those of the candidate are gone.
    """
    labels = {keys.LABEL_OWNER_UID: owner["metadata"]["uid"], keys.LABEL_ROLE: role}
    labels |= {keys.LABEL_REVISION: revision} if revision else {}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": parts.metadata(owner, budget_name(owner, role), role),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": labels},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _pod(name: str, spec: ModelDeploymentSpec, model: Input, settings: Settings) -> Object:
    image = spec.engine.image or (spec.pod.image if spec.pod else None) or settings.server_image
    api_keys = spec.endpoint.api_keys_secret_ref
    return {
        **parts.placement(spec.pod),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": parts.POD_SECURITY,
        "initContainers": [_pull(image, spec, model, settings)],
        "containers": [_server(image, name, spec, settings)],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "model", "emptyDir": {}},
            *([_secret("api-keys", api_keys.name)] if api_keys else []),
            *([_secret("model-secret", model.secret)] if model.secret else []),
            *([_secret("registry", settings.registry_secret, optional=True)] if settings.registry_secret else []),
            *(
                {"name": "claim", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
                for claim in claim_of(model.uri)
            ),
        ],
    }


def _pull(image: str, spec: ModelDeploymentSpec, model: Input, settings: Settings) -> Object:
    """Bring the model into the pod; its termination message says why where it cannot."""
    env = {"PYTHONUNBUFFERED": "1", "HOME": "/tmp", **parts.NO_TELEMETRY}  # noqa: S108  # an emptyDir
    mounts: list[Object] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "model", "mountPath": MODEL_DIR}]  # noqa: S108
    command = ["python3", "-m", "slmops_artifacts", "pull", model.uri, MODEL_DIR]
    if settings.plain_http:
        env["SLMOPS_PLAIN_HTTP"] = settings.plain_http
    if settings.hf_endpoint:
        env["HF_ENDPOINT"] = settings.hf_endpoint
    if settings.registry_secret:
        env["SLMOPS_REGISTRY_AUTH"] = f"{SECRET_ROOT}/{settings.registry_secret}/.dockerconfigjson"
        mounts.append(_mount("registry", f"{SECRET_ROOT}/{settings.registry_secret}"))
    if model.secret:
        command += ["--secret-name", model.secret, "--secret-dir", f"{SECRET_ROOT}/{model.secret}/model"]
        mounts.append(_mount("model-secret", f"{SECRET_ROOT}/{model.secret}/model"))
    mounts += [_mount("claim", f"{PVC_ROOT}/{claim}") for claim in claim_of(model.uri)]
    return {
        "name": PULL,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": [parts.literal(word) for word in command],
        "env": parts.environment(env, spec.pod),
        "resources": _without_devices(parts.resources(spec.pod)),
        "securityContext": parts.CONTAINER_SECURITY,
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _server(image: str, name: str, spec: ModelDeploymentSpec, settings: Settings) -> Object:
    command = ["slmops-server", "--model", MODEL_DIR, "--served-name", spec.served_name or name]
    command += ["--port", str(keys.API_PORT), "--metrics-port", str(keys.METRICS_PORT)]
    if spec.engine.name not in AUTO:  # which is the server's own default
        command += ["--engine", spec.engine.name]
    mounts: list[Object] = [
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  # an emptyDir: the root file system is read-only
        {"name": "model", "mountPath": MODEL_DIR, "readOnly": True},
    ]
    if spec.endpoint.api_keys_secret_ref:
        folder = f"{SECRET_ROOT}/api-keys"
        command += ["--api-keys-dir", folder]
        mounts.append(_mount("api-keys", folder))
    env = {"PYTHONUNBUFFERED": "1", "HOME": "/tmp", **parts.NO_TELEMETRY}  # noqa: S108
    return {
        "name": SERVER,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": [parts.literal(word) for word in (*command, *(spec.engine.args or []))],
        "env": parts.environment(env, spec.pod),
        "ports": [
            {"name": "http", "containerPort": keys.API_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": keys.METRICS_PORT, "protocol": "TCP"},
        ],
        "startupProbe": parts.probe("/startupz", "http", 1, LOAD_SECONDS),
        "readinessProbe": parts.probe("/readyz", "http", 2, 2),
        "livenessProbe": parts.probe("/livez", "http", 10, 3),
        "resources": parts.resources(spec.pod),
        "securityContext": parts.CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _secret(volume: str, name: str, *, optional: bool = False) -> Object:
    # 0440: root's file, readable through fsGroup.
    return {"name": volume, "secret": {"secretName": name, "defaultMode": 0o440, "optional": optional}}


def _mount(volume: str, path: str) -> Object:
    return {"name": volume, "mountPath": path, "readOnly": True}


def _without_devices(resources: Object) -> Object:
    """CPU and memory alone: pulling needs no GPU."""
    plain = ("cpu", "memory", "ephemeral-storage")
    kept: dict[str, Any] = {
        part: {name: amount for name, amount in amounts.items() if name in plain} for part, amounts in resources.items()
    }
    return {part: amounts for part, amounts in kept.items() if amounts}
