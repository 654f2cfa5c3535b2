"""Resolving what a spec names: other objects of ours, the teacher, where to write."""

from collections.abc import Iterable
from dataclasses import dataclass

from slmops.api.distillation import DistillationJobSpec, Teacher
from slmops.api.keys import child_name
from slmops.api.meta import Ancestor, Condition, Lineage, ModelSource
from slmops.api.run import Input, TeacherEndpoint
from slmops.cluster.kinds import OURS
from slmops.cluster.port import Cluster, Key, Object
from slmops.reconcile import conditions
from slmops.reconcile.state import Retry, Terminal
from slmops.settings import Settings

NOT_READY = "SourceNotReady"


@dataclass(frozen=True)
class Output:
    """Where a run writes."""

    artifact: str
    checkpoint: str


def not_ready(message: str) -> Retry:
    """Say that a source has to come first. Nothing polls: the source's own change wakes whoever names it."""
    return Retry(NOT_READY, message, after=0)


def resolve_model(cluster: Cluster, namespace: str, source: ModelSource) -> Input:
    """Resolve a model source. Raises Retry(SourceNotReady), ClusterError."""
    if source.ref is None:
        return Input(uri=source.uri or "", secret=source.secret_ref.name if source.secret_ref else None)
    name = f"{source.ref.kind}/{source.ref.name}"
    found = ready_object(cluster, Key(source.ref.kind, namespace, source.ref.name))
    artifact = (found.get("status") or {}).get("artifact") or {}
    if not artifact.get("uri"):
        raise not_ready(f"{name} is Ready but names no artifact.")
    return Input(uri=pinned(artifact["uri"], artifact.get("digest", "")), name=name)


def pinned(uri: str, digest: str) -> str:
    """The URI of an artifact, with its digest: a folder on a claim has none in it, and may be published over."""
    return f"{uri}@{digest}" if uri.startswith("pvc://") and digest and "@sha256:" not in uri else uri


def resolve_teacher(cluster: Cluster, namespace: str, teacher: Teacher) -> TeacherEndpoint:
    """Resolve the teacher. Raises Retry(SourceNotReady, SecretNotFound), ClusterError."""
    if teacher.endpoint is not None:
        ref = teacher.endpoint.api_key_secret_ref
        return TeacherEndpoint(
            url=teacher.endpoint.url,
            model=teacher.endpoint.model,
            secret=ref.name if ref else None,
            key=ref.key if ref else None,
        )
    name = teacher.deployment_ref.name if teacher.deployment_ref else ""
    # Not Ready, which a rollout that waits, or was rolled back, is not: the stable revision answers meanwhile.
    found = ready_object(cluster, Key("ModelDeployment", namespace, name), conditions.AVAILABLE)
    stable = (found.get("status") or {}).get("stable") or {}
    model, secret = stable.get("servedName"), stable.get("apiKeysSecret")
    if not model:  # the status is an older operator's: what is stable is sure to be what is asked for only if Ready
        found = ready_object(cluster, Key("ModelDeployment", namespace, name))
        model = found["spec"].get("servedName") or name
        secret = ((found["spec"].get("endpoint") or {}).get("apiKeysSecretRef") or {}).get("name")
    url = (found.get("status") or {}).get("endpoint")
    if not url:
        raise not_ready(f"ModelDeployment/{name} is available but names no endpoint.")
    return TeacherEndpoint(
        url=url,
        model=_first(model),
        secret=secret,
        key=_some_key(cluster, namespace, secret) if secret else None,
        name=f"ModelDeployment/{name}",
        lineage=_served(found.get("status") or {}),
        revision=stable.get("revision") or "",
    )


def ready_object(cluster: Cluster, key: Key, condition: str = conditions.READY) -> Object:
    """Read one of our objects whose `condition` has to be true. Raises Retry(SourceNotReady), ClusterError."""
    found = cluster.get(key)
    name = f"{key.kind}/{key.name}"
    if found is None:
        raise not_ready(f"Waits for {name}, which does not exist yet.")
    if found["spec"].get("replicas") == 0:  # of a ModelDeployment, whose pods may not be gone yet
        raise not_ready(f"Waits for {name}, which is scaled to zero.")
    said = _said(found)
    if conditions.is_true(said, condition):
        return found
    stalled = conditions.find(said, conditions.STALLED)
    if stalled is not None and stalled.status == "True":
        raise not_ready(f"Waits for {name}, which has failed ({stalled.reason}: {stalled.message})")
    # Not why it is not: each of its steps would be a write here.
    raise not_ready(f"Waits for {name} to be {condition.lower()}.")


def check_cycle(cluster: Cluster, obj: Object) -> None:
    """See that nothing which `obj` waits for waits for `obj` itself. Raises Terminal(SourceCycle), ClusterError."""
    namespace, start = obj["metadata"]["namespace"], (obj["kind"], obj["metadata"]["name"])
    ways, seen = [[name] for name in sorted(references(obj))], set[tuple[str, str]]()
    while ways:
        way = ways.pop()
        if way[-1] == start:
            names = " -> ".join(f"{kind}/{name}" for kind, name in (start, *way))
            raise Terminal(
                "SourceCycle",
                f"These wait for each other: {names}. Delete one of them and make it anew from another model.",
            )
        if way[-1] in seen or way[-1][0] not in OURS:
            continue
        seen.add(way[-1])
        found = cluster.get(Key(way[-1][0], namespace, way[-1][1]))
        if found is not None and not _goes_on(found):
            ways += [[*way, name] for name in sorted(references(found))]


def _goes_on(found: Object) -> bool:
    """Whether what waits for this object is not stopped by what the object itself waits for."""
    if found["kind"] == "ModelDeployment":  # its next model may be late: the one before answers
        return bool((found.get("status") or {}).get("stable"))
    return conditions.is_true(_said(found), conditions.READY)


def resolve_output(owner: Object, output: str | None, settings: Settings) -> Output:
    """Where the artifact and the checkpoints go. Raises Terminal(NoStore)."""
    metadata = owner["metadata"]
    short = metadata["uid"][:8]
    if output is None:
        if not settings.store:
            raise Terminal(
                "NoStore",
                "There is nowhere to write: give spec.output, or set the chart's store (SLMOPS_STORE).",
            )
        name = child_name(f"{owner['kind'].lower()}-{metadata['name']}", limit=120)
        base = f"{settings.store.rstrip('/')}/{metadata['namespace']}/{name}"
        mark = ":" if base.startswith("oci://") else "-"  # a tag, or a part of a folder's name
        return Output(f"{base}{mark}{short}", f"{base}{mark}ckpt-{short}")
    if output.startswith("pvc://"):
        base = output.rstrip("/")
        return Output(base, f"{base}-ckpt-{short}")
    base, tag = _split_tag(output)
    return Output(f"{base}:{tag or short}", f"{base}:ckpt-{short}")


def check_apart(output: str, read: Iterable[str]) -> None:
    """See that nothing is written into a folder that the run reads, or around one. Raises Terminal(BadSpec)."""
    own = _folder(output)
    for uri in sorted(read):
        other = _folder(uri)
        if own != other and own[: len(other)] == other[: len(own)]:
            raise Terminal(
                "BadSpec",
                f"The output {output} lies {'in' if len(own) > len(other) else 'around'} {uri}, which is read: "
                "files of the one would count as the other's. Give spec.output a folder beside it, in a new object.",
            )


def _folder(uri: str) -> list[str]:
    """The claim and the folders on it; where there is no claim the URI, which lies in no other."""
    scheme, _, rest = uri.partition("://")
    return [part for part in rest.split("@sha256:")[0].split("/") if part] if scheme == "pvc" else [uri]


def references(obj: Object) -> frozenset[tuple[str, str]]:
    """(kind, name) of the objects of ours that a batch object or a ModelDeployment names."""
    spec = obj.get("spec") or {}
    found = set()
    for field in ("student", "base", "source", "model"):
        ref = (spec.get(field) or {}).get("ref")
        if ref:
            found.add((str(ref.get("kind")), str(ref.get("name"))))
    deployment = (spec.get("teacher") or {}).get("deploymentRef")
    if deployment:
        found.add(("ModelDeployment", str(deployment.get("name"))))
    return frozenset(found)


def teacher_label(spec: DistillationJobSpec) -> str:
    """Name the teacher for the table."""
    if spec.teacher.endpoint is not None:
        return spec.teacher.endpoint.model
    return f"ModelDeployment/{spec.teacher.deployment_ref.name}" if spec.teacher.deployment_ref else ""


def source_label(source: ModelSource) -> str:
    """Name a model source for the table."""
    return f"{source.ref.kind}/{source.ref.name}" if source.ref else source.uri or ""


def _said(obj: Object) -> list[Condition]:
    return [Condition.model_validate(item) for item in (obj.get("status") or {}).get("conditions") or []]


def _first(names: str) -> str:
    """The first of the names that slmops-server answers to: it takes a list with commas."""
    return next((name.strip() for name in names.split(",") if name.strip()), names)


def _split_tag(uri: str) -> tuple[str, str]:
    """oci://host:5000/repo:tag -> (oci://host:5000/repo, tag): a colon before the last slash is a port's."""
    head, slash, tail = uri.rpartition("/")
    name, _, tag = tail.partition(":")
    return f"{head}{slash}{name}", tag


def _some_key(cluster: Cluster, namespace: str, secret: str) -> str:
    """The first of the Secret's keys: any of its values is accepted as bearer token."""
    found = cluster.get(Key("Secret", namespace, secret))
    names = sorted((found or {}).get("data") or {})
    if not names:
        raise Retry("SecretNotFound", f"Secret {secret} with the teacher's API keys does not exist or is empty.")
    return str(names[0])


def _served(status: Object) -> list[Ancestor]:
    """The model that a deployment serves, and what that was made from."""
    stable = status.get("stable") or {}
    lineage = Lineage.model_validate(status["lineage"]) if status.get("lineage") else None
    own = (
        [Ancestor(kind="model", uri=stable["model"], digest=stable["digest"], name=stable.get("source", ""))]
        if stable.get("digest")
        else []
    )
    return [*own, *(lineage.parents if lineage else [])]
