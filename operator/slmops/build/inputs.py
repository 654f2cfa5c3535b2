"""What a batch spec needs from its namespace: ConfigMaps, Secrets and claims, by name."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from slmops.api.base import Model
from slmops.api.distillation import Filters
from slmops.api.meta import ConfigMapKeyRef, Dataset, ModelSource, Pod, SecretKeyRef, SecretRef


@dataclass(frozen=True)
class Inputs:
    """Names, each with the keys that have to be there; Secrets named whole have no keys."""

    config_maps: dict[str, set[str]] = field(default_factory=dict)
    secrets: dict[str, set[str]] = field(default_factory=dict)
    datasets: tuple[Dataset, ...] = ()
    schemas: frozenset[tuple[str, str]] = frozenset()  # (ConfigMap, key) of JSON Schemas
    models: frozenset[str] = frozenset()  # URIs

    @property
    def uris(self) -> frozenset[str]:
        """URIs of all artifacts that are read."""
        return self.models | {dataset.uri for dataset in self.datasets if dataset.uri}

    @property
    def claims(self) -> frozenset[str]:
        """PersistentVolumeClaims that are read."""
        return frozenset[str]().union(*map(claim_of, self.uris))


def inputs(spec: Model, *, extra_secrets: tuple[str, ...] = ()) -> Inputs:
    """Collect from anywhere in `spec`; a pod's image pull secrets are the kubelet's business."""
    config_maps: dict[str, set[str]] = {}
    secrets: dict[str, set[str]] = {name: set() for name in extra_secrets if name}
    datasets: list[Dataset] = []
    schemas: set[tuple[str, str]] = set()
    models: set[str] = set()
    for part in _parts(spec):
        match part:
            case ConfigMapKeyRef():
                config_maps.setdefault(part.name, set()).add(part.key)
            case SecretKeyRef():
                secrets.setdefault(part.name, set()).add(part.key)
            case SecretRef():
                secrets.setdefault(part.name, set())
            case Dataset():
                datasets.append(part)
            case Filters():
                schemas.update({(part.json_schema.name, part.json_schema.key)} if part.json_schema else ())
            case ModelSource():
                models.update({part.uri} if part.uri else ())
    return Inputs(config_maps, secrets, tuple(datasets), frozenset(schemas), frozenset(models))


def claim_of(uri: str | None) -> set[str]:
    """The claim that a pvc:// URI names, as a set of none or one."""
    return {re.split("[/@]", uri.removeprefix("pvc://"), maxsplit=1)[0]} if uri and uri.startswith("pvc://") else set()


def may_change(uri: str) -> bool:
    """Whether the URI may come to mean something else: it names neither a digest nor a hub's commit."""
    return "@sha256:" not in uri and not re.fullmatch(r"hf://.*@[0-9a-f]{40}", uri)


def _parts(value: object) -> Iterator[Model]:
    if isinstance(value, Pod):
        return
    if isinstance(value, Model):
        yield value
        for name in type(value).model_fields:
            yield from _parts(getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
