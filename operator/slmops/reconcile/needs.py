"""What has to be in the namespace before a pod is worth starting: Secrets, ConfigMaps, readable datasets.

All of it is read by name. What is missing or broken is said at once and costs no pod; it is looked at again every
RECHECK_SECONDS, so that mending it is enough.
"""

import json
from hashlib import sha256

from slmops.build.inputs import Inputs
from slmops.cluster.port import Cluster, Key, Object
from slmops.reconcile.state import Retry

RECHECK_SECONDS = 5.0


def check(cluster: Cluster, namespace: str, needed: Inputs) -> str:
    """Return the hash of all that is needed. Raises Retry(SecretNotFound, ConfigMapNotFound, BadDataset), ClusterError.

    The hash is of contents, not of versions: what touches a Secret without changing it must not start a failed run
    again. A Secret's uid goes into it: who may not read the Secret does not know that, and can guess nothing from the
    hash. Where nothing is needed it is empty.
    """
    if not needed.secrets and not needed.config_maps:
        return ""
    digest = sha256()
    for name, wanted in sorted(needed.secrets.items()):
        secret = cluster.get(Key("Secret", namespace, name))
        if secret is None:
            raise Retry("SecretNotFound", f"Secret {name} does not exist: create it.", after=RECHECK_SECONDS)
        _keys("SecretNotFound", f"Secret {name}", wanted, secret.get("data") or {})
        digest.update(f"{secret['metadata']['uid']};".encode())
        for key, value in sorted((secret.get("data") or {}).items()):
            digest.update(f"{name}/{key}/{value};".encode())
    for name, wanted in sorted(needed.config_maps.items()):
        config_map = cluster.get(Key("ConfigMap", namespace, name))
        if config_map is None:
            raise Retry("ConfigMapNotFound", f"ConfigMap {name} does not exist: create it.", after=RECHECK_SECONDS)
        data: Object = {**(config_map.get("data") or {}), **(config_map.get("binaryData") or {})}
        _keys("ConfigMapNotFound", f"ConfigMap {name}", wanted, data)
        for key in sorted(wanted):
            digest.update(f"{name}/{key}/{data[key]};".encode())
            if (name, key) in needed.jsonl and key in (config_map.get("data") or {}):
                _jsonl(f"ConfigMap {name}, key {key}", data[key])
    return digest.hexdigest()[:16]


def _keys(reason: str, what: str, wanted: set[str], data: Object) -> None:
    missing = sorted(wanted - data.keys())
    if missing:
        there = ", ".join(sorted(data)) or "none"
        raise Retry(reason, f"{what} has no key {missing[0]}; its keys: {there}.", after=RECHECK_SECONDS)


def _jsonl(what: str, text: str) -> None:
    """Each line one JSON object. Columns are the worker's to judge. Raises Retry(BadDataset)."""
    found, lines = False, text.removeprefix("\ufeff").split("\n")  # splitlines() also splits within strings
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = True
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad(f"{what}, line {number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise _bad(f"{what}, line {number}: not a JSON object")
    if not found:
        raise _bad(f"{what}: no example in it")


def _bad(message: str) -> Retry:
    return Retry("BadDataset", f"{message}. Each line has to be one JSON object: mend it.", after=RECHECK_SECONDS)
