"""The cluster behind the port, by the official client's transport.

Requests and answers stay plain dicts: the client's models refuse fields that they do not know yet. Every call has a
timeout and is counted; nothing is retried here, the queue does that.
"""

import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from time import monotonic
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import OpenApiException
from kubernetes.client.rest import should_bypass_proxies

from slmops.api.keys import FIELD_MANAGER
from slmops.api.times import stamp
from slmops.cluster.kinds import API_VERSION, PLACES, Place
from slmops.cluster.port import ClusterError, Key, Object, Objects
from slmops.cluster.same import APPLIED, covers, merge_patch, stamped

CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"

_BELOW_ASTRAL = re.compile("[\x7f-\uffff]")

Query = list[tuple[str, str]] | None
OnCall = Callable[[str, str, int, float], None]
"""Told of every call: verb, kind, HTTP status (0: no answer), seconds."""


def configuration(env: dict[str, str] | None = None) -> client.Configuration:
    """How to reach the API server: KUBECONFIG if it is set, else the pod's service account, else ~/.kube/config.

    Raises ClusterError (status 0) where there is none of these.
    """
    env = dict(os.environ) if env is None else env
    found = client.Configuration()
    try:
        if not env.get("KUBECONFIG") and env.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(client_configuration=found)  # type: ignore[no-untyped-call]  # of the client
        else:
            config.load_kube_config(client_configuration=found)  # type: ignore[no-untyped-call]  # of the client
    except Exception as error:  # of a broken file the loader says anything
        said = " ".join(str(error).split()) or type(error).__name__
        where = env.get("KUBECONFIG") or "the service account, or ~/.kube/config"
        raise ClusterError(0, "NoConfiguration", f"No way to reach a cluster, by {where}: {said}") from error
    found.retries = False
    return found


def proxy_of(found: client.Configuration) -> str | None:
    """The proxy on the way to the API server, where there is one."""
    return None if should_bypass_proxies(found.host, found.no_proxy or "") else found.proxy


class KubeCluster:
    """Implements port.Cluster; safe to use from many threads."""

    def __init__(self, settings: client.Configuration, *, threads: int = 8, on_call: OnCall | None = None) -> None:
        settings.connection_pool_maxsize = threads
        self._api = client.ApiClient(settings)
        self._api.user_agent = "slmops-operator"
        self._on_call = on_call

    def get(self, key: Key) -> Object | None:
        """See port.Cluster."""
        try:
            return self._ask("GET", key.kind, PLACES[key.kind].path(key.namespace, key.name), verb="get")
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: str, namespace: str, labels: dict[str, str]) -> Objects:
        """See port.Cluster."""
        selector = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
        query = [("labelSelector", selector)]
        answer = self._ask("GET", kind, PLACES[kind].path(namespace), query=query, verb="list")
        version = answer.get("apiVersion")
        # A list leaves the type of its items out.
        return [{"apiVersion": version, "kind": kind, **item} for item in answer.get("items") or []]

    def apply(self, obj: Object, *, current: Object | None = None) -> Object:
        """See port.Cluster."""
        wanted = stamped(obj)
        if current is not None and _applied(current) == _applied(wanted) and covers(current, wanted):
            return current
        metadata = obj["metadata"]
        path = PLACES[obj["kind"]].path(metadata["namespace"], metadata["name"])
        query = [("fieldManager", FIELD_MANAGER), ("force", "true")]
        return self._ask("PATCH", obj["kind"], path, query=query, body=as_yaml(wanted), content=APPLY, verb="apply")

    def delete(self, key: Key, *, uid: str | None = None) -> None:
        """See port.Cluster."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            self._ask("DELETE", key.kind, PLACES[key.kind].path(key.namespace, key.name), body=body, verb="delete")
        except ClusterError as error:
            if error.status not in (404, 409):  # gone, or another object by now
                raise

    def patch_status(self, obj: Object, status: Object) -> Object:
        """See port.Cluster."""
        patch = merge_patch(obj.get("status") or {}, status)
        if not patch:
            return obj
        metadata = obj["metadata"]
        path = PLACES[obj["kind"]].path(metadata["namespace"], metadata["name"], "status")
        body = {"metadata": {"uid": metadata["uid"]}, "status": patch}
        query = [("fieldManager", FIELD_MANAGER)]
        return self._ask("PATCH", obj["kind"], path, query=query, body=body, content=MERGE, verb="patch_status")

    def events(self, namespace: str, *, kind: str, name: str) -> Objects:
        """See port.Cluster."""
        query = [("fieldSelector", f"involvedObject.kind={kind},involvedObject.name={name}")]
        answer = self._ask("GET", "Event", PLACES["Event"].path(namespace), query=query, verb="list")
        items: Objects = answer.get("items") or []
        return sorted(items, key=lambda item: str(item.get("lastTimestamp") or item.get("eventTime") or ""))

    def post_event(self, obj: Object, reason: str, message: str, *, warning: bool = False) -> None:
        """See port.Cluster."""
        metadata = obj["metadata"]
        place: Place = PLACES["Event"]
        now = stamp(datetime.now(UTC))
        digest = sha256(f"{metadata['uid']} {reason} {message}".encode()).hexdigest()[:16]
        name = f"{metadata['name'][:230].rstrip('-.')}.{digest}"
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": obj["kind"],
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "reason": reason,
            "message": message,
            "type": "Warning" if warning else "Normal",
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            self._ask("POST", "Event", place.path(metadata["namespace"]), body=event, verb="create")
        except ClusterError as error:
            if error.status != 409:
                raise
            path = place.path(metadata["namespace"], name)
            known = self._ask("GET", "Event", path, verb="get")
            body = {"count": int(known.get("count") or 1) + 1, "lastTimestamp": now}
            self._ask("PATCH", "Event", path, body=body, content=MERGE, verb="patch")

    def served(self) -> set[str]:
        """Which of our kinds the API server has: the CRDs may be missing, or be taken away. Raises ClusterError."""
        try:
            answer = self._ask("GET", "APIResourceList", f"/apis/{API_VERSION}", verb="get")
        except ClusterError as error:
            if error.status == 404:
                return set()
            raise
        return {str(resource["kind"]) for resource in answer.get("resources") or []}

    def _ask(
        self,
        method: str,
        kind: str,
        path: str,
        *,
        verb: str,
        query: Query = None,
        body: Object | bytes | None = None,
        content: str = "application/json",
    ) -> Object:
        """One HTTP exchange. Raises ClusterError: for every status but 2xx, and with status 0 for no answer."""
        headers = {"Accept": "application/json", "Content-Type": content}
        began = monotonic()
        status = 0
        try:
            request = self._api.param_serialize(
                method, path, query_params=query or [], header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            answer = self._api.call_api(*request, _request_timeout=(CONNECT_SECONDS, READ_SECONDS))
            data: bytes = answer.read()  # type: ignore[no-untyped-call]  # of the client
            status = int(answer.status)
        except (urllib3.exceptions.HTTPError, OpenApiException, OSError) as error:
            raise ClusterError(0, "NoAnswer", f"The API server does not answer: {error}") from error
        finally:
            if self._on_call:
                self._on_call(verb, kind, status, monotonic() - began)
        return _parsed(status, data)


def as_yaml(obj: Object) -> bytes:
    """`obj` as JSON that is YAML as well: what is applied is read as YAML.

    YAML knows no surrogate pairs, so what lies beyond the first plane stands as it is; and it takes some other signs
    for ends of lines, or for none at all, so these are escaped.
    """
    text = json.dumps(obj, ensure_ascii=False, separators=(",", ":"))
    return _BELOW_ASTRAL.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


def _parsed(status: int, data: bytes) -> Object:
    try:
        parsed: Any = json.loads(data)
    except ValueError:
        parsed = None
    answer: Object = parsed if isinstance(parsed, dict) else {}
    if 200 <= status < 300:
        return answer
    text = data[:200].decode(errors="replace")
    raise ClusterError(status, str(answer.get("reason") or "Error"), str(answer.get("message") or text or status))


def _applied(obj: Object) -> str | None:
    annotations: dict[str, str] = obj["metadata"].get("annotations") or {}
    return annotations.get(APPLIED)
