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
    """Return the hashes of all that is needed: of the ConfigMaps, a dot, of the Secrets; empty where nothing is.

    Two, for a new Secret cannot mend what a new dataset can. They are of contents, not of versions: to touch a Secret
    is not to change it. A Secret's uid goes into its hash: who may not read the Secret does not know that, and can
    guess nothing from it. Raises Retry(SecretNotFound, ConfigMapNotFound, BadDataset), ClusterError.
    """
    if not needed.secrets and not needed.config_maps:
        return ""
    maps, secrets = sha256(), sha256()
    for name, wanted in sorted(needed.secrets.items()):
        secret = cluster.get(Key("Secret", namespace, name))
        if secret is None:
            raise Retry("SecretNotFound", f"Secret {name} does not exist: create it.", after=RECHECK_SECONDS)
        _keys("SecretNotFound", f"Secret {name}", wanted, secret.get("data") or {})
        secrets.update(f"{secret['metadata']['uid']};".encode())
        for key, value in sorted((secret.get("data") or {}).items()):
            secrets.update(f"{name}/{key}/{value};".encode())
    for name, wanted in sorted(needed.config_maps.items()):
        config_map = cluster.get(Key("ConfigMap", namespace, name))
        if config_map is None:
            raise Retry("ConfigMapNotFound", f"ConfigMap {name} does not exist: create it.", after=RECHECK_SECONDS)
        data: Object = {**(config_map.get("data") or {}), **(config_map.get("binaryData") or {})}
        _keys("ConfigMapNotFound", f"ConfigMap {name}", wanted, data)
        for key in sorted(wanted):
            maps.update(f"{name}/{key}/{data[key]};".encode())
            if (name, key) in needed.jsonl and key in (config_map.get("data") or {}):
                _jsonl(f"ConfigMap {name}, key {key}", data[key])
    of_maps = maps.hexdigest()[:16] if needed.config_maps else ""
    return f"{of_maps}.{secrets.hexdigest()[:16] if needed.secrets else ''}"


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
