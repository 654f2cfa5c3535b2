"""What has to be in the namespace before a pod is worth starting: Secrets, ConfigMaps, readable datasets and schemas.

All of it is read by name. What is missing or broken is said at once and costs no pod; it is looked at again every
RECHECK_SECONDS, so that mending it is enough.
"""

import json
from hashlib import sha256

from slmops.api.distillation import Prompts
from slmops.api.meta import Columns, Dataset
from slmops.build.inputs import Inputs
from slmops.cluster.port import Cluster, Key, Object
from slmops.reconcile.state import Retry

RECHECK_SECONDS = 5.0


def check(cluster: Cluster, namespace: str, needed: Inputs) -> str:
    """Return the hashes of all that is needed: of the ConfigMaps, a dot, of the Secrets; empty where nothing is.

    Two, for a new Secret cannot mend what a new dataset can. They are of contents, not of versions: to touch a Secret
    is not to change it. A Secret's uid goes into its hash: who may not read the Secret does not know that, and can
    guess nothing from it. Raises Retry(SecretNotFound, ConfigMapNotFound, BadDataset, BadSpec),
    ClusterError.
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
            if key in (config_map.get("data") or {}):  # what is binary is the worker's to read
                _readable(needed, name, key, data[key])
    of_maps = maps.hexdigest()[:16] if needed.config_maps else ""
    return f"{of_maps}.{secrets.hexdigest()[:16] if needed.secrets else ''}"


def _keys(reason: str, what: str, wanted: set[str], data: Object) -> None:
    missing = sorted(wanted - data.keys())
    if missing:
        there = ", ".join(sorted(data)) or "none"
        told = "" if reason == "SecretNotFound" else f"; its keys: {there}"  # a status is read by more than Secrets are
        raise Retry(reason, f"{what} has no key {missing[0]}{told}.", after=RECHECK_SECONDS)


def _readable(needed: Inputs, name: str, key: str, text: str) -> None:
    """Raises Retry(BadDataset, BadSpec) for what the worker, who has the last word, would refuse as well."""
    what = f"ConfigMap {name}, key {key}"
    for dataset in needed.datasets:
        if dataset.config_map and (dataset.config_map.name, dataset.config_map.key) == (name, key):
            _dataset(what, text, dataset)
    if (name, key) in needed.schemas:
        _schema(f"{what} (data.filters.jsonSchema)", text)


def _dataset(what: str, text: str, dataset: Dataset) -> None:
    """Each line that is used one JSON object with its columns. What stands in them is the worker's to judge."""
    count, columns = 0, tuple[str, ...]()
    lines = text.removeprefix("\ufeff").split("\n")  # splitlines() also splits within strings
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{what}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _bad(f"{where}: not a JSON object")
        columns = columns or _columns(row, dataset, where)
        for column in columns:
            if column not in row:
                raise _lacks(f"{where} has no column {column!r}", row)
        count += 1
        if count == dataset.limit:
            break
    if not count:
        raise _bad(f"{what}: no example in it")


def _columns(row: Object, dataset: Dataset, where: str) -> tuple[str, ...]:
    """The columns that every line needs; `auto` is told by the first line's."""
    named = dataset.columns or Columns()
    turns, prompt, answer = named.messages or "messages", named.prompt or "prompt", named.completion or "completion"
    pair = (prompt,) if isinstance(dataset, Prompts) else (prompt, answer)
    if dataset.format == "messages" or (dataset.format == "auto" and turns in row):
        return (turns,)
    if dataset.format == "auto" and not all(column in row for column in pair):
        raise _lacks(f"{where} has neither {turns!r} nor {' and '.join(map(repr, pair))}", row)
    return pair


def _schema(what: str, text: str) -> None:
    """A JSON object. What JSON Schema makes of it is the worker's to judge. Raises Retry(BadSpec)."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Retry("BadSpec", f"{what} is not JSON: {error}. Mend it.", after=RECHECK_SECONDS) from error
    if not isinstance(found, dict):
        raise Retry("BadSpec", f"{what} is no JSON Schema: it has to be an object.", after=RECHECK_SECONDS)


def _lacks(what: str, row: Object) -> Retry:
    names = [repr(name[:40]) for name in row]
    there = (", ".join(names[:12]) + (", ..." if len(names) > 12 else "")) or "no column"
    remedy = "Mend the file, or name the column in dataset.columns of a new object."
    return Retry("BadDataset", f"{what}; it has {there}. {remedy}", after=RECHECK_SECONDS)


def _bad(message: str) -> Retry:
    return Retry("BadDataset", f"{message}. Each line has to be one JSON object: mend it.", after=RECHECK_SECONDS)
