"""What a fresh cluster gets before its user does: DNS, a default storage class and volumes."""

from __future__ import annotations

import json
import shutil
from typing import Any

from localkube import paths, shell, tools

Manifest = dict[str, Any]
VOLUME_COUNT = 20


def kubectl(*words: str, stdin: str | None = None) -> str:
    return shell.run(tools.path("kubectl"), "--kubeconfig", paths.KUBECONFIG, *words, stdin=stdin)


def apply() -> None:
    items = [*dns(), storage_class(), *(volume(n) for n in range(VOLUME_COUNT))]
    for number in range(VOLUME_COUNT):
        _empty_folder(number)
    kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


def renew_volumes() -> int:
    """Volumes whose claim is gone are emptied and offered again; returns how many."""
    listed = json.loads(kubectl("get", "persistentvolumes", "-o", "json"))["items"]
    released = {v["metadata"]["name"] for v in listed if v["status"].get("phase") == "Released"}
    numbers = [n for n in range(VOLUME_COUNT) if _volume_name(n) in released]
    for number in numbers:
        kubectl("delete", "persistentvolume", _volume_name(number))
        _empty_folder(number)
        kubectl("create", "-f", "-", stdin=json.dumps(volume(number)))
    return len(numbers)


def dns() -> list[Manifest]:
    """CoreDNS runs on the host: its Service selects nothing and names the node's address."""
    namespace = "kube-system"
    ports = [{"name": f"dns-{p.lower()}", "protocol": p, "port": 53, "targetPort": paths.DNS_PORT} for p in _PROTOCOLS]
    rules = [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    group = "rbac.authorization.k8s.io"
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": namespace},
            "spec": {"clusterIP": paths.DNS_SERVICE_IP, "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "kube-dns-host",
                "namespace": namespace,
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "addressType": "IPv4",
            "ports": [{"name": f"dns-{p.lower()}", "protocol": p, "port": paths.DNS_PORT} for p in _PROTOCOLS],
            "endpoints": [{"addresses": [paths.NODE_IP], "conditions": {"ready": True}}],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "system:coredns"},
            "rules": rules,
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "system:coredns"},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"apiGroup": group, "kind": "User", "name": "system:coredns"}],
        },
    ]


def storage_class() -> Manifest:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }


def volume(number: int) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": _volume_name(number)},
        "spec": {
            "capacity": {"storage": "10Gi"},
            "accessModes": ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "standard",
            "hostPath": {"path": str(paths.VOLUMES / str(number)), "type": "Directory"},
        },
    }


_PROTOCOLS = ("UDP", "TCP")


def _volume_name(number: int) -> str:
    return f"local-{number}"


def _empty_folder(number: int) -> None:
    """Pods run as any user, so anyone may write."""
    folder = paths.VOLUMES / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
