"""A ModelDeployment -> its router: Deployment, Service with the stable address, token, and the ConfigMap of its routes.

The ConfigMap carries the routes, so that a new router pod starts with the weights of the moment, and on record the
Deployment of every revision (build/serving.py), so that a revision whose spec is history can still be made again.
Records are sealed: who may write the ConfigMap may not for that have pods made of what it says.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterable

from slmops.api import keys
from slmops.api.deployment import ModelDeploymentSpec
from slmops.build import parts, serving
from slmops.build.parts import Object
from slmops.settings import Settings

ROUTER = "router"
AGENT_PORT = 9091
ROUTES_KEY = "routes.json"
RECORD_PREFIX, RECORD_SUFFIX, SEAL_SUFFIX = "deployment-", ".json", ".seal"
GRACE_SECONDS = serving.GRACE_SECONDS + 30  # for answers that run: no router goes before the server that gives them


def service_name(owner: Object) -> str:
    """Name of the Service that clients use."""
    return keys.child_name(owner["metadata"]["name"])


def router_name(owner: Object) -> str:
    """Name of the router's Deployment, ConfigMap and Secret."""
    return keys.child_name(owner["metadata"]["name"], ROUTER)


def endpoint(owner: Object) -> str:
    """Base URL of the API inside the cluster."""
    return f"http://{service_name(owner)}.{owner['metadata']['namespace']}.svc:{keys.API_PORT}/v1"


def selector(owner: Object) -> dict[str, str]:
    """Labels of the router pods."""
    return {keys.LABEL_OWNER_UID: owner["metadata"]["uid"], keys.LABEL_ROLE: keys.ROLE_ROUTER}


def routes(
    owner: Object, weights: dict[str, int], fallback: str, epoch: str, replicas: int, given: Iterable[Object] = ()
) -> Object:
    """Build the routes, in the shape that the agent gives them back; `given`: those that the routers have."""
    had = _places_had(given)
    return {
        "port": keys.API_PORT,
        "fallback": fallback if fallback in weights else "",
        "epoch": epoch,
        "revisions": [
            {
                "revision": revision,
                "host": serving.revision_name(owner, revision),
                "weight": weight,
                "servers": max(_places(replicas), had.get(revision, 0)),
            }
            for revision, weight in sorted(weights.items())
        ],
    }


def config_map(owner: Object, wanted: Object, records: dict[str, Object], key: str) -> Object:
    """Build the ConfigMap of routes and records, these sealed with the operator's `key`."""
    data = {ROUTES_KEY: _json(wanted)}
    for name, record in records.items():
        text = _json(record)
        data[f"{RECORD_PREFIX}{name}{RECORD_SUFFIX}"] = text
        data[f"{RECORD_PREFIX}{name}{SEAL_SUFFIX}"] = _seal(owner, name, text, key)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": parts.metadata(owner, router_name(owner), keys.ROLE_ROUTER),
        "data": data,
    }


def records_of(owner: Object, found: Object | None, key: str) -> dict[str, Object]:
    """Read the records back, by revision; one that somebody changed, or that is not sealed yet, counts as lost."""
    records: dict[str, Object] = {}
    data = (found or {}).get("data") or {}
    for entry, text in data.items():
        if entry.startswith(RECORD_PREFIX) and entry.endswith(RECORD_SUFFIX):
            name = entry.removeprefix(RECORD_PREFIX).removesuffix(RECORD_SUFFIX)
            seal = str(data.get(f"{RECORD_PREFIX}{name}{SEAL_SUFFIX}", ""))
            if hmac.compare_digest(seal.encode(), _seal(owner, name, text, key).encode()):
                records[name] = json.loads(text)
    return records


def token_secret(owner: Object, token: str) -> Object:
    """Build the Secret with the agent's token: not in the pod's spec, which more people may read."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": parts.metadata(owner, router_name(owner), keys.ROLE_ROUTER),
        "type": "Opaque",
        "data": {"token": base64.b64encode(token.encode()).decode()},
    }


def service(owner: Object) -> Object:
    """Build the Service that clients use."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": parts.metadata(owner, service_name(owner), keys.ROLE_ROUTER),
        "spec": {
            "ipFamilyPolicy": "PreferDualStack",
            "selector": selector(owner),
            "ports": [{"name": "http", "port": keys.API_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def deployment(owner: Object, spec: ModelDeploymentSpec, token: str, settings: Settings) -> Object:
    """Build the router's Deployment: two pods where the model has several. Another token makes other pods."""
    name = router_name(owner)
    mark = hashlib.sha256(token.encode()).hexdigest()[:8]
    theirs, ours = parts.placement(spec.pod), parts.placement(settings.router_pod)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": parts.metadata(owner, name, keys.ROLE_ROUTER),
        "spec": {
            "replicas": router_pods(spec),
            "revisionHistoryLimit": 1,
            "selector": {"matchLabels": selector(owner)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {
                    "labels": parts.labels(owner, keys.ROLE_ROUTER),
                    "annotations": {
                        "prometheus.io/scrape": "true",
                        "prometheus.io/port": str(keys.METRICS_PORT),
                        f"{keys.GROUP}/token": mark,
                    },
                },
                "spec": {
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "terminationGracePeriodSeconds": GRACE_SECONDS,
                    "securityContext": parts.POD_SECURITY,
                    # Not the object's node selector, priority and runtime: they are for what models need, a GPU say.
                    **{name: theirs[name] for name in ("tolerations", "imagePullSecrets") if name in theirs},
                    **{name: ours[name] for name in ("nodeSelector", "priorityClassName") if name in ours},
                    "containers": [_container(name, settings)],
                    "volumes": [
                        {"name": "tmp", "emptyDir": {}},
                        {
                            "name": "routes",
                            "configMap": {"name": name, "items": [{"key": ROUTES_KEY, "path": ROUTES_KEY}]},
                        },
                    ],
                },
            },
        },
    }


def router_pods(spec: ModelDeploymentSpec) -> int:
    """How many router pods there are."""
    return 2 if spec.replicas > 1 else 1


def _container(name: str, settings: Settings) -> Object:
    return {
        "name": ROUTER,
        "image": settings.router_image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": [{"name": "SLMOPS_ROUTER_TOKEN", "valueFrom": {"secretKeyRef": {"name": name, "key": "token"}}}],
        "ports": [
            {"name": "http", "containerPort": keys.API_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": keys.METRICS_PORT, "protocol": "TCP"},
            {"name": "agent", "containerPort": AGENT_PORT, "protocol": "TCP"},
        ],
        # Not /readyz: a router that waits for DNS is not made well by a restart.
        "startupProbe": parts.probe("/livez", "agent", 1, 60),
        "readinessProbe": parts.probe("/readyz", "agent", 2, 2),
        "livenessProbe": parts.probe("/livez", "agent", 10, 3),
        "resources": parts.resources(settings.router_pod),
        "securityContext": parts.CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  # an emptyDir: the root file system is read-only
            {"name": "routes", "mountPath": "/etc/slmops/router", "readOnly": True},
        ],
    }


def _places(replicas: int) -> int:
    """Servers that the router has room for: twice the pods, in steps, for each new number costs a reload."""
    places = 8
    while places < 2 * replicas:
        places *= 2
    return places


def _places_had(given: Iterable[Object]) -> dict[str, int]:
    """Places by revision, never to be fewer: a pod that stays may lie in any, and the others fill with a delay."""
    had: dict[str, int] = {}
    for one in (revision for routes in given for revision in routes.get("revisions") or ()):
        match one:
            case {"revision": str(name), "servers": int(places)}:
                had[name] = max(places, had.get(name, 0))
    return had


def _seal(owner: Object, revision: str, text: str, key: str) -> str:
    """Who can make it has the operator's key; it holds for this record of this object alone."""
    whole = f"record {owner['metadata']['uid']} {revision} {text}"
    return hmac.new(key.encode(), whole.encode(), hashlib.sha256).hexdigest()


def _json(value: Object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
