"""The Job of a run, compared whole."""

import re
from typing import Any

import pytest
from tests.unit.objects import UID, Object, finetune, ours

from slmops.api.batch import BatchSpec
from slmops.api.distillation import DistillationJobSpec
from slmops.api.finetune import FineTuneJobSpec
from slmops.api.run import Input, RunSpec, TeacherEndpoint
from slmops.build.job import job, job_name, revised
from slmops.settings import Settings

SETTINGS = Settings(trainer_image="trainer:1", plain_http="reg:5000", hf_endpoint="http://hub", registry_secret="store")


def run_spec(spec: BatchSpec, slot: str, **more: Any) -> RunSpec:
    fields = {"output": "oci://reg:5000/ns/x:1", "checkpoint": "oci://reg:5000/ns/x:ckpt-1", **more}
    return RunSpec(namespace="ns", name="tune", uid=UID, model=Input(uri="oci://r/base:1"), **{slot: spec}, **fields)


def made(settings: Settings = SETTINGS, **spec: Any) -> Object:
    owner = finetune(**spec)
    parsed = FineTuneJobSpec.model_validate(owner["spec"])
    return job(owner, parsed, run_spec(parsed, "finetune"), settings)


def test_the_whole_job() -> None:
    owner = finetune()
    spec = FineTuneJobSpec.model_validate(owner["spec"])
    run = run_spec(spec, "finetune")
    labels = {
        "app.kubernetes.io/managed-by": "slmops",
        "slmops.dev/kind": "FineTuneJob",
        "slmops.dev/owner": "tune",
        "slmops.dev/owner-uid": UID,
        "slmops.dev/role": "worker",
    }
    env = {
        "SLMOPS_RUN": run.model_dump_json(by_alias=True, exclude_none=True),
        "HOME": "/tmp",
        "HF_HOME": "/slmops/work/hf",
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OLIVE_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "SLMOPS_PLAIN_HTTP": "reg:5000",
        "SLMOPS_REGISTRY_AUTH": "/slmops/secrets/store/.dockerconfigjson",
        "HF_ENDPOINT": "http://hub",
    }
    assert job(owner, spec, run, SETTINGS) == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": "tune-finetune",
            "namespace": "ns",
            "labels": labels,
            "ownerReferences": [
                {
                    "apiVersion": "slmops.dev/v1alpha1",
                    "kind": "FineTuneJob",
                    "name": "tune",
                    "uid": UID,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            "backoffLimit": 3,
            "suspend": False,
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "Ignore",
                        "onExitCodes": {"containerName": "worker", "operator": "In", "values": [143]},
                    },
                    {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [3]}},
                ]
            },
            "template": {
                "metadata": {
                    "labels": {**labels, "sidecar.istio.io/inject": "false"},
                    "annotations": {"linkerd.io/inject": "disabled"},
                },
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "terminationGracePeriodSeconds": 60,
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": 65532,
                        "runAsGroup": 65532,
                        "fsGroup": 65532,
                        "fsGroupChangePolicy": "OnRootMismatch",
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [
                        {
                            "name": "worker",
                            "image": "trainer:1",
                            "imagePullPolicy": "IfNotPresent",
                            "env": [{"name": name, "value": value} for name, value in env.items()],
                            "ports": [{"name": "metrics", "containerPort": 9090, "protocol": "TCP"}],
                            "resources": {},
                            "securityContext": {
                                "allowPrivilegeEscalation": False,
                                "capabilities": {"drop": ["ALL"]},
                                "readOnlyRootFilesystem": True,
                                "runAsNonRoot": True,
                            },
                            "terminationMessagePath": "/dev/termination-log",
                            "terminationMessagePolicy": "File",
                            "volumeMounts": [
                                {"name": "tmp", "mountPath": "/tmp"},
                                {"name": "work", "mountPath": "/slmops/work"},
                                {"name": "secret-0", "mountPath": "/slmops/secrets/store", "readOnly": True},
                            ],
                        }
                    ],
                    "volumes": [
                        {"name": "tmp", "emptyDir": {}},
                        {"name": "work", "emptyDir": {}},
                        {"name": "secret-0", "secret": {"secretName": "store", "optional": False, "defaultMode": 288}},
                    ],
                },
            },
        },
    }


def container(built: Object) -> Object:
    found: Object = built["spec"]["template"]["spec"]["containers"][0]
    return found


def mounts(built: Object) -> dict[str, bool]:
    """Path -> read-only."""
    return {mount["mountPath"]: mount.get("readOnly", False) for mount in container(built)["volumeMounts"]}


def test_the_run_can_be_read_back() -> None:
    text = container(made())["env"][0]["value"]
    run = RunSpec.model_validate_json(text)
    assert run.finetune is not None
    assert run.finetune.dataset.uri == "oci://r/data:1"
    assert run.distill is None


def expanded(env: list[Object]) -> dict[str, str]:
    """The variables as the kubelet makes them (k8s.io/kubernetes/third_party/forked/golang/expansion)."""
    known: dict[str, str] = {}
    for var in env:
        known[var["name"]] = re.sub(
            r"\$(?:(\$)|\(([^)]*)\))",
            lambda found: "$" if found[1] else known.get(found[2], f"$({found[2]})"),
            var["value"],
        )
    return known


@pytest.mark.parametrize(
    "text", ["costs $$5", "say $(HOME) and $(SLMOPS_RUN)", "$", "$$$(A)$", "a$$(A)", '\\$5 "$(HOME)"']
)
def test_dollars_reach_the_container_as_they_were_written(text: str) -> None:
    built = made(
        dataset={"uri": "oci://r/data:1", "columns": {"prompt": text}},
        pod={"env": [{"name": "A", "value": "b"}, {"name": "SAYS", "value": text}]},
    )
    env = expanded(container(built)["env"])
    assert env["SAYS"] == text
    run = RunSpec.model_validate_json(env["SLMOPS_RUN"])
    assert run.finetune is not None
    assert run.finetune.dataset.columns is not None
    assert run.finetune.dataset.columns.prompt == text


def test_gpu_and_placement_pass_through() -> None:
    pod = {
        "image": "mine:1",
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}},
        "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "runtimeClassName": "nvidia",
        "priorityClassName": "batch",
        "imagePullSecrets": [{"name": "pull"}],
        "env": [{"name": "HOME", "value": "/h"}, {"name": "A", "value": "b"}],
    }
    built = made(pod=pod)
    template = built["spec"]["template"]["spec"]
    assert container(built)["resources"] == {"limits": {"nvidia.com/gpu": "1", "memory": "8Gi"}}
    for name in ("nodeSelector", "tolerations", "runtimeClassName", "priorityClassName", "imagePullSecrets"):
        assert template[name] == pod[name]
    assert container(built)["image"] == "mine:1"
    env = {var["name"]: var["value"] for var in container(built)["env"]}
    assert (env["HOME"], env["A"]) == ("/h", "b")
    assert env["SLMOPS_GPU"] == "nvidia.com/gpu"  # the trainer ends where it sees none
    assert len(env) == len(container(built)["env"])
    assert "/slmops/secrets/pull" not in mounts(built)  # the kubelet's business


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"nvidia.com/mig-1g.5gb": 1}, ["nvidia.com/mig-1g.5gb"]),
        ({"nvidia.com/gpu": 0, "memory": "1Gi"}, []),
        ({"memory": "1Gi"}, []),
    ],
)
def test_the_trainer_is_told_of_a_gpu_that_is_asked_for(limits: dict[str, object], told: list[str]) -> None:
    env = container(made(pod={"resources": {"limits": limits}}))["env"]
    assert [var["value"] for var in env if var["name"] == "SLMOPS_GPU"] == told


def test_what_the_spec_names_is_mounted() -> None:
    built = made(
        base={"uri": "hf://org/m@main", "secretRef": {"name": "hf.token"}},
        dataset={"configMap": {"name": "train", "key": "a.jsonl"}},
        evaluation={"dataset": {"uri": "pvc://sets/held.jsonl"}},
        output="pvc://models/tune",
    )
    assert mounts(built) == {
        "/tmp": False,
        "/slmops/work": False,
        "/slmops/configmaps/train": True,
        "/slmops/secrets/hf.token": True,
        "/slmops/secrets/store": True,
        "/slmops/pvc/sets": True,
    }  # the output's claim is in the RunSpec, which here is the default one
    names = [volume["name"] for volume in built["spec"]["template"]["spec"]["volumes"]]
    assert len(names) == len(set(names))
    assert all("." not in name for name in names)


def test_claims_that_are_written_are_not_read_only() -> None:
    owner = finetune(base={"uri": "pvc://models/base"})
    spec = FineTuneJobSpec.model_validate(owner["spec"])
    run = run_spec(spec, "finetune", output="pvc://models/out", checkpoint="pvc://models/out-ckpt")
    assert mounts(job(owner, spec, run, Settings()))["/slmops/pvc/models"] is False


def test_the_teachers_key_is_mounted() -> None:
    spec = {
        "teacher": {"deploymentRef": {"name": "teacher"}},
        "student": {"uri": "oci://r/s:1"},
        "data": {
            "prompts": {"configMap": {"name": "p", "key": "k"}},
            "filters": {"jsonSchema": {"name": "s", "key": "j"}},
        },
    }
    owner = ours("DistillationJob", spec, name="d")
    parsed = DistillationJobSpec.model_validate(spec)
    teacher = TeacherEndpoint(url="http://t/v1", model="t", secret="keys", key="a")
    built = job(owner, parsed, run_spec(parsed, "distill", teacher=teacher), Settings())
    assert {"/slmops/secrets/keys", "/slmops/configmaps/p", "/slmops/configmaps/s"} <= mounts(built).keys()
    assert built["metadata"]["name"] == "d-distill"


def test_a_queued_job_has_the_label_and_no_suspend() -> None:
    built = made(queueName="gpus")
    assert built["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "suspend" not in built["spec"]


def test_the_job_never_removes_itself() -> None:
    built = made(ttlSecondsAfterFinished=1, activeDeadlineSeconds=5, backoffLimit=0)
    assert "ttlSecondsAfterFinished" not in built["spec"]
    assert (built["spec"]["activeDeadlineSeconds"], built["spec"]["backoffLimit"]) == (5, 0)


def test_long_names_stay_apart() -> None:
    long = "a" * 250
    names = {job_name(finetune(name=name)) for name in (long, long + "b", "a.b", "a-b", "x" * 54, "x" * 55)}
    assert len(names) == 6
    assert all(len(name) <= 63 and "." not in name for name in names)
    assert job_name(ours("DistillationJob", {}, name="n")) != job_name(ours("QuantizedModel", {}, name="n"))


def live(built: Object) -> Object:
    return {**built, "metadata": {**built["metadata"], "resourceVersion": "9"}}


def test_a_job_with_the_right_limits_is_left_alone() -> None:
    current = live(made(activeDeadlineSeconds=5))
    assert (
        revised(current, FineTuneJobSpec.model_validate(finetune(activeDeadlineSeconds=5)["spec"]), suspended=False)
        is None
    )


def test_revising_keeps_the_template_that_is_there() -> None:
    current = live(made(activeDeadlineSeconds=5))
    current["spec"]["template"]["spec"]["nodeSelector"] = {"set": "by-kueue"}
    spec = FineTuneJobSpec.model_validate(finetune(backoffLimit=9)["spec"])
    change = revised(current, spec, suspended=False)
    assert change is not None
    assert change["spec"]["template"] == current["spec"]["template"]
    assert change["spec"]["backoffLimit"] == 9
    assert "activeDeadlineSeconds" not in change["spec"]  # taken away
    assert change["metadata"]["resourceVersion"] == "9"


def test_a_queued_jobs_suspend_is_not_touched() -> None:
    current = live(made(queueName="q"))
    current["spec"]["suspend"] = True
    assert revised(current, FineTuneJobSpec.model_validate(finetune(queueName="q")["spec"]), suspended=False) is None
    # Without queueName Kueue sets the label where there is a default queue, and the operator has written `suspend`.
    change = revised(current, FineTuneJobSpec.model_validate(finetune(backoffLimit=9)["spec"]), suspended=False)
    assert change is not None
    assert change["spec"]["suspend"] is True
