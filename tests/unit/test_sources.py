"""Resolving sources, against the cluster in memory."""

from contextlib import nullcontext
from typing import Any

import pytest
from tests.unit.objects import ARTIFACT, Object, at, finetune, ours

from slmops.api.distillation import Teacher
from slmops.api.meta import ModelSource
from slmops.build.inputs import claim_of
from slmops.cluster.memory import MemoryCluster, key_of
from slmops.reconcile import sources
from slmops.reconcile.state import Retry, Terminal
from slmops.settings import Settings

REF = ModelSource.model_validate({"ref": {"kind": "FineTuneJob", "name": "tune"}})


def conditions(**types: str) -> list[Object]:
    return [
        {
            "type": name,
            "status": value.split()[0],
            "reason": value.split()[1],
            "message": "m",
            "lastTransitionTime": at(0),
        }
        for name, value in types.items()
    ]


def with_source(status: Object) -> MemoryCluster:
    cluster = MemoryCluster()
    cluster.put(finetune(status))
    return cluster


def test_a_uri_is_taken_as_it_is() -> None:
    source = ModelSource.model_validate({"uri": "hf://a/b", "secretRef": {"name": "s"}})
    found = sources.resolve_model(MemoryCluster(), "ns", source)
    assert (found.uri, found.secret, found.name) == ("hf://a/b", "s", "")


def test_a_ready_source_gives_its_artifact() -> None:
    cluster = with_source({"conditions": conditions(Ready="True Succeeded"), "artifact": ARTIFACT})
    found = sources.resolve_model(cluster, "ns", REF)
    assert (found.uri, found.name) == (ARTIFACT["uri"], "FineTuneJob/tune")


def test_a_folder_on_a_claim_is_named_with_its_digest():
    """It may be published over; an artifact in a registry has the digest in its URI already."""
    folder = {**ARTIFACT, "uri": "pvc://models/out", "digest": "sha256:" + "a" * 64}
    cluster = with_source({"conditions": conditions(Ready="True Succeeded"), "artifact": folder})
    found = sources.resolve_model(cluster, "ns", REF)
    assert found.uri == f"pvc://models/out@{folder['digest']}"
    assert claim_of(found.uri) == {"models"}
    assert claim_of(f"pvc://models@{folder['digest']}") == {"models"}


NOT_READY: dict[str, tuple[Object | None, str]] = {
    "absent": (None, "does not exist yet"),
    "new": ({}, "Waits for FineTuneJob/tune to be ready"),
    "running": ({"conditions": conditions(Ready="False Running")}, "Waits for FineTuneJob/tune to be ready"),
    "failed": ({"conditions": conditions(Ready="False BadDataset", Stalled="True BadDataset")}, "has failed"),
    "ready without artifact": ({"conditions": conditions(Ready="True Succeeded")}, "names no artifact"),
}


@pytest.mark.parametrize("name", NOT_READY)
def test_a_source_that_is_not_ready_is_waited_for(name: str) -> None:
    status, words = NOT_READY[name]
    cluster = MemoryCluster() if status is None else with_source(status)
    with pytest.raises(Retry, match=words) as caught:
        sources.resolve_model(cluster, "ns", REF)
    assert caught.value.reason == "SourceNotReady"


def teacher(**fields: Any) -> Teacher:
    return Teacher.model_validate(fields)


def test_an_endpoint_is_taken_as_it_is() -> None:
    ref = {"name": "s", "key": "k"}
    found = sources.resolve_teacher(
        MemoryCluster(), "ns", teacher(endpoint={"url": "https://t/v1", "model": "m", "apiKeySecretRef": ref})
    )
    assert (found.url, found.model, found.secret, found.key) == ("https://t/v1", "m", "s", "k")


@pytest.mark.parametrize(
    "ready",
    [
        {"Ready": "True Serving"},
        {"Ready": "False RolledBack", "Stalled": "True RolledBack"},
        {"Ready": "False Approval", "Reconciling": "True Approval"},
    ],
)
def test_a_deployment_that_answers_gives_its_service_its_key_and_its_lineage(ready: dict[str, str]) -> None:
    cluster = MemoryCluster()
    parent = {"kind": "model", "uri": "oci://r/base", "digest": "sha256:bb", "name": ""}
    status = {
        "conditions": conditions(Available="True Answering", **ready),
        "endpoint": "http://t-1a2b.ns.svc:8000/v1",
        "stable": {
            "revision": "r1",
            "model": "oci://r/m",
            "digest": "sha256:mm",
            "source": "QuantizedModel/q",
            "servedName": "big",
            "apiKeysSecret": "keys",
        },
        "lineage": {"digest": "sha256:mm", "parents": [parent]},
    }
    # what the spec asks for is on its way, or was rolled back: the stable revision answers to its own name and keys
    spec = {"model": {"uri": "oci://r/m"}, "servedName": "next", "endpoint": {"apiKeysSecretRef": {"name": "other"}}}
    cluster.put(ours("ModelDeployment", spec, name="t", status=status))
    wanted = teacher(deploymentRef={"name": "t"})
    with pytest.raises(Retry) as caught:
        sources.resolve_teacher(cluster, "ns", wanted)
    assert caught.value.reason == "SecretNotFound"
    cluster.put({"kind": "Secret", "metadata": {"name": "keys", "namespace": "ns"}, "data": {"b": "", "a": ""}})
    found = sources.resolve_teacher(cluster, "ns", wanted)
    assert (found.url, found.model) == ("http://t-1a2b.ns.svc:8000/v1", "big")
    assert (found.secret, found.key, found.name) == ("keys", "a", "ModelDeployment/t")
    assert found.revision == "r1"
    assert [(a.digest, a.name) for a in found.lineage] == [("sha256:mm", "QuantizedModel/q"), ("sha256:bb", "")]


def test_what_a_status_of_an_older_operator_serves_is_known_only_when_it_is_ready() -> None:
    cluster = MemoryCluster()
    status = {"conditions": conditions(Ready="False RolledBack", Available="True Answering"), "endpoint": "http://t/v1"}
    deployment = ours("ModelDeployment", {"model": {"uri": "oci://r/m"}, "servedName": "b"}, name="t", status=status)
    cluster.put(deployment)
    with pytest.raises(Retry, match="Waits for ModelDeployment/t to be ready"):
        sources.resolve_teacher(cluster, "ns", teacher(deploymentRef={"name": "t"}))
    said = conditions(Ready="True Serving", Available="True Answering")
    cluster.set_status(key_of(deployment), {**status, "conditions": said})
    assert sources.resolve_teacher(cluster, "ns", teacher(deploymentRef={"name": "t"})).model == "b"


@pytest.mark.parametrize("told", [{"stable": {"model": "oci://r/m", "servedName": " ,big, small"}}, {}])
def test_a_teacher_of_several_names_is_asked_by_the_first(told: Object) -> None:
    """The server takes a list; no name is made of the whole of it."""
    cluster = MemoryCluster()
    said = conditions(Ready="True Serving", Available="True Answering")
    spec = {"model": {"uri": "oci://r/m"}, "servedName": " ,big, small"}
    status = {"conditions": said, "endpoint": "http://t/v1", **told}
    cluster.put(ours("ModelDeployment", spec, name="t", status=status))
    assert sources.resolve_teacher(cluster, "ns", teacher(deploymentRef={"name": "t"})).model == "big"


@pytest.mark.parametrize("reason", ["ScaledToZero", "QuotaExceeded"])
def test_a_teacher_that_is_scaled_to_zero_is_waited_for(reason: str) -> None:
    """It is Ready, as wanted: but a pod that asks it would wait for its answers in vain."""
    cluster = MemoryCluster()
    said = conditions(Ready=f"True {reason}", Available="True Answering")  # by pods that are about to go
    status = {"conditions": said, "endpoint": "http://t.ns.svc:8000/v1"}
    deployment = ours("ModelDeployment", {"model": {"uri": "oci://r/m"}, "replicas": 0}, name="t", status=status)
    cluster.put(deployment)
    with pytest.raises(Retry, match="ModelDeployment/t, which is scaled to zero") as caught:
        sources.resolve_teacher(cluster, "ns", teacher(deploymentRef={"name": "t"}))
    assert (caught.value.reason, caught.value.after) == ("SourceNotReady", 0)  # its change tells
    cluster.put({**deployment, "spec": {**deployment["spec"], "replicas": 1}})
    assert sources.resolve_teacher(cluster, "ns", teacher(deploymentRef={"name": "t"})).model == "t"


def test_a_teacher_that_does_not_answer_is_waited_for() -> None:
    cluster = MemoryCluster()
    status = {"conditions": conditions(Ready="True Serving", Available="False NotAnswering"), "endpoint": "http://t/v1"}
    cluster.put(ours("ModelDeployment", {"model": {"uri": "oci://r/m"}}, name="t", status=status))
    with pytest.raises(Retry, match="Waits for ModelDeployment/t to be available") as caught:
        sources.resolve_teacher(cluster, "ns", teacher(deploymentRef={"name": "t"}))
    assert (caught.value.reason, caught.value.after) == ("SourceNotReady", 0)


OUTPUTS = [
    (None, "oci://s:5000/ns/finetunejob-tune:11111111", "oci://s:5000/ns/finetunejob-tune:ckpt-11111111"),
    ("oci://r:5000/a/b", "oci://r:5000/a/b:11111111", "oci://r:5000/a/b:ckpt-11111111"),
    ("oci://r:5000/a/b:v1", "oci://r:5000/a/b:v1", "oci://r:5000/a/b:ckpt-11111111"),
    ("pvc://c/x/", "pvc://c/x", "pvc://c/x-ckpt-11111111"),
]


@pytest.mark.parametrize(("given", "artifact", "checkpoint"), OUTPUTS)
def test_output(given: str | None, artifact: str, checkpoint: str) -> None:
    found = sources.resolve_output(finetune(), given, Settings(store="oci://s:5000/"))
    assert (found.artifact, found.checkpoint) == (artifact, checkpoint)


@pytest.mark.parametrize(
    ("output", "read", "where"),
    [
        ("pvc://c/a/int4", "pvc://c/a", "in"),
        ("pvc://c//a/b/c/", "pvc://c/a/@sha256:" + "1" * 64, "in"),
        ("pvc://c/a", "pvc://c", "in"),
        ("pvc://c/a", "pvc://c/a/train.jsonl", "around"),
        ("pvc://c/ab", "pvc://c/a", ""),
        ("pvc://c/a", "pvc://c/a", ""),
        ("pvc://c/a", "pvc://d/a/b", ""),
        ("pvc://c/a", "hf://c/a", ""),
        ("oci://c/a/b:v1", "oci://c/a", ""),
    ],
)
def test_nothing_is_written_in_or_around_what_is_read(output: str, read: str, where: str) -> None:
    found = sources.resolve_output(finetune(), output, Settings())
    with pytest.raises(Terminal, match=f" lies {where} {read}") if where else nullcontext() as caught:
        sources.check_apart(found.artifact, {"hf://org/base", read})
    assert caught is None or caught.value.reason == "BadSpec"


def test_nowhere_to_write_is_said_at_once() -> None:
    with pytest.raises(Terminal, match=r"spec\.output"):
        sources.resolve_output(finetune(), None, Settings())


def test_a_long_name_gives_a_repository_that_registries_take() -> None:
    found = sources.resolve_output(finetune(name="n" * 253), None, Settings(store="oci://s"))
    assert len(found.artifact) < 255


def test_references() -> None:
    spec = {"teacher": {"deploymentRef": {"name": "t"}}, "student": {"ref": {"kind": "FineTuneJob", "name": "s"}}}
    assert sources.references(ours("DistillationJob", spec)) == {("ModelDeployment", "t"), ("FineTuneJob", "s")}
    assert sources.references(finetune()) == frozenset()


def waiting_for(cluster: MemoryCluster, kind: str, name: str, **spec: Any) -> Object:
    return cluster.put(ours(kind, spec, name=name, status={"conditions": conditions(Ready="False SourceNotReady")}))


def ref(kind: str, name: str) -> Object:
    return {"ref": {"kind": kind, "name": name}}


def test_who_waits_for_himself_is_told_the_whole_way() -> None:
    cluster = MemoryCluster()
    job = waiting_for(cluster, "DistillationJob", "d", teacher={"deploymentRef": {"name": "m"}}, student={"uri": "x"})
    waiting_for(cluster, "FineTuneJob", "f", base=ref("DistillationJob", "d"))
    waiting_for(cluster, "QuantizedModel", "q", source=ref("FineTuneJob", "f"))
    sources.check_cycle(cluster, job)  # m is not there: it may become anything
    served = waiting_for(cluster, "ModelDeployment", "m", model=ref("QuantizedModel", "q"))
    way = "DistillationJob/d -> ModelDeployment/m -> QuantizedModel/q -> FineTuneJob/f -> DistillationJob/d"
    with pytest.raises(Terminal, match=way) as caught:
        sources.check_cycle(cluster, job)
    assert caught.value.reason == "SourceCycle"
    cluster.put({**served, "status": {}})
    for available in ("True Answering", "False NotAnswering"):  # not now perhaps, scaled to zero
        said = conditions(Ready="False SourceNotReady", Available=available)
        cluster.set_status(key_of(served), {"conditions": said, "stable": {"revision": "r1", "model": "oci://r/m"}})
        sources.check_cycle(cluster, job)  # its next model waits for the job, but there is the one before


def test_who_names_himself_is_told() -> None:
    cluster = MemoryCluster()
    with pytest.raises(Terminal, match="FineTuneJob/a -> FineTuneJob/a"):
        sources.check_cycle(cluster, waiting_for(cluster, "FineTuneJob", "a", base=ref("FineTuneJob", "a")))


def test_a_cycle_that_one_merely_waits_for_is_not_ones_own() -> None:
    cluster = MemoryCluster()
    waiting_for(cluster, "FineTuneJob", "a", base=ref("FineTuneJob", "b"))
    waiting_for(cluster, "FineTuneJob", "b", base=ref("FineTuneJob", "a"))
    sources.check_cycle(cluster, waiting_for(cluster, "FineTuneJob", "c", base=ref("FineTuneJob", "a")))


def test_a_folder_as_store_has_no_tags() -> None:
    found = sources.resolve_output(finetune(), None, Settings(store="pvc://models/all"))
    assert found.artifact == "pvc://models/all/ns/finetunejob-tune-11111111"
    assert found.checkpoint == "pvc://models/all/ns/finetunejob-tune-ckpt-11111111"
