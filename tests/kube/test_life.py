"""The life of batch objects on a real API server; Jobs and pods are played."""

from datetime import UTC, datetime, timedelta
from typing import Any

from tests.kube.api import Api, Object, wait_for
from tests.kube.conftest import Operator
from tests.kube.kubelet import (
    Kubelet,
    exited,
    fail_job,
    fail_pod,
    finish_pod,
    make_pod,
    now,
    running,
    set_pod,
)

from slmops.api.run import RunSpec
from slmops.api.times import parse, stamp

TUNE: Object = {"base": {"uri": "oci://r/base:1"}, "dataset": {"uri": "oci://r/data:1"}}
JOB = "tune-finetune"


def tune(api: Api, **spec: Any) -> Object:
    return api.create("FineTuneJob", "tune", spec={**TUNE, **spec})


def until_job(api: Api, name: str = JOB) -> Object:
    wait_for(f"Job {name}", lambda: api.get("Job", name))
    return api.need("Job", name)


def started_pod(api: Api, job: Object | None = None, name: str = "") -> str:
    pod = make_pod(api, job or until_job(api), name)
    set_pod(api, pod, "Running", running())
    return pod


def test_a_chain_in_the_wrong_order(api: Api, operator: Operator) -> None:
    api.create("QuantizedModel", "c", spec={"source": {"ref": {"kind": "FineTuneJob", "name": "b"}}})
    api.create("FineTuneJob", "b", spec={**TUNE, "base": {"ref": {"kind": "FineTuneJob", "name": "a"}}})
    api.until_reason("QuantizedModel", "c", "SourceNotReady")
    api.until_phase("FineTuneJob", "b", "Waiting")
    assert api.list("Job") == []
    api.create("FineTuneJob", "a", spec=TUNE)
    with Kubelet(api) as kubelet:
        api.until_phase("QuantizedModel", "c", "Succeeded", 30)
    assert {name: len(uids) for name, uids in kubelet.jobs_seen.items()} == {
        "a-finetune": 1,
        "b-finetune": 1,
        "c-quantize": 1,
    }
    run = api.need("Job", "c-quantize")["spec"]["template"]["spec"]["containers"][0]["env"][0]
    assert '"name":"FineTuneJob/b"' in run["value"]


def test_a_failed_source_is_named_and_a_new_one_is_taken(api: Api, operator: Operator) -> None:
    api.create("QuantizedModel", "q", spec={"source": {"ref": {"kind": "FineTuneJob", "name": "tune"}}})
    tune(api)
    pod = started_pod(api)
    fail_pod(api, pod, 3, "NothingToTrain", "line 3: no answer")
    fail_job(api, JOB, "PodFailurePolicy", 1)
    status = api.until_phase("FineTuneJob", "tune", "Failed")
    assert status["lastFailure"]["message"] == "line 3: no answer"
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Ready": "False", "Stalled": "True", "Failed": "True",
    }  # fmt: skip
    wait_for("the dependent to say so", lambda: "line 3" in str(api.status("QuantizedModel", "q")))
    api.delete("FineTuneJob", "tune")
    wait_for("the dependent to notice", lambda: "does not exist" in str(api.status("QuantizedModel", "q")))
    api.delete("Job", JOB)
    api.delete("Pod", pod)
    tune(api)
    finish_pod(api, started_pod(api))
    until_job(api, "q-quantize")


def test_a_missing_secret_is_named_and_mends_itself(api: Api, operator: Operator) -> None:
    tune(api, base={"uri": "hf://org/m", "secretRef": {"name": "hub"}})
    status = api.until_reason("FineTuneJob", "tune", "SecretNotFound")
    assert status["phase"] == "Waiting"
    assert api.get("Job", JOB) is None
    api.create("Secret", "hub", stringData={"token": "x"})
    until_job(api)


def test_a_broken_dataset_costs_no_pod(api: Api, operator: Operator) -> None:
    good = '{"prompt": "a", "completion": "b"}\n'
    api.create("ConfigMap", "data", data={"train": f"{good}nonsense\n"})
    tune(api, dataset={"configMap": {"name": "data", "key": "train"}})
    api.until_reason("FineTuneJob", "tune", "BadDataset")
    assert "line 2: not JSON" in str(api.status("FineTuneJob", "tune"))
    api.patch("ConfigMap", "data", {"data": {"train": f'{good}{{"prompt": "a"}}'}})
    lacks = "line 2 has no column 'completion'"
    wait_for("the column to be named", lambda: lacks in api.status("FineTuneJob", "tune")["conditions"][0]["message"])
    assert api.get("Job", JOB) is None
    api.patch("ConfigMap", "data", {"data": {"train": good}})
    until_job(api)


def test_a_broken_schema_costs_no_pod(api: Api, operator: Operator) -> None:
    api.create("ConfigMap", "rules", data={"schema": "{type: object}"})
    spec = {
        "teacher": {"endpoint": {"url": "http://teacher/v1", "model": "m"}},
        "student": {"uri": "oci://registry/base:1"},
        "data": {
            "prompts": {"uri": "oci://registry/data:1"},
            "filters": {"jsonSchema": {"name": "rules", "key": "schema"}},
        },
    }
    api.create("DistillationJob", "pupil", spec=spec)
    api.until_reason("DistillationJob", "pupil", "BadSpec")
    assert "key schema (data.filters.jsonSchema) is not JSON" in str(api.status("DistillationJob", "pupil"))
    assert api.get("Job", "pupil-distill") is None
    api.patch("ConfigMap", "rules", {"data": {"schema": '{"type": "object"}'}})
    until_job(api, "pupil-distill")


def test_suspend_and_resume(api: Api, operator: Operator) -> None:
    tune(api)
    started_pod(api)
    api.until_phase("FineTuneJob", "tune", "Running")
    api.patch("FineTuneJob", "tune", {"spec": {"suspend": True}})
    status = api.until_phase("FineTuneJob", "tune", "Suspended")
    assert "Suspended" in {c["type"] for c in status["conditions"]}
    assert api.need("Job", JOB)["spec"]["suspend"] is True
    api.patch("FineTuneJob", "tune", {"spec": {"suspend": False}})
    wait_for("the Job to go on", lambda: api.need("Job", JOB)["spec"]["suspend"] is False)
    wait_for("the condition to go", lambda: "Suspended" not in str(api.status("FineTuneJob", "tune")["conditions"]))
    pods = api.list("Pod")
    api.patch("Job", JOB, {"spec": {"suspend": True}})  # Kueue's, which would do so again and again
    for pod in pods:
        api.delete("Pod", pod["metadata"]["name"])
    api.until_phase("FineTuneJob", "tune", "Queued")
    assert api.need("Job", JOB)["spec"]["suspend"] is True
    api.patch("Job", JOB, {"spec": {"suspend": False}})
    api.until_phase("FineTuneJob", "tune", "Pending")


def test_limits_reach_a_running_job(api: Api, operator: Operator) -> None:
    tune(api, activeDeadlineSeconds=100)
    started_pod(api)
    api.patch("FineTuneJob", "tune", {"spec": {"backoffLimit": 9, "activeDeadlineSeconds": None}})
    wait_for("the limit", lambda: api.need("Job", JOB)["spec"]["backoffLimit"] == 9)
    assert "activeDeadlineSeconds" not in api.need("Job", JOB)["spec"]


def test_the_job_goes_in_its_time_and_the_object_stays_done(api: Api, operator: Operator) -> None:
    tune(api, ttlSecondsAfterFinished=0)
    finish_pod(api, started_pod(api))
    wait_for("the Job to go", lambda: api.status("FineTuneJob", "tune").get("artifact") and not api.get("Job", JOB))
    assert api.status("FineTuneJob", "tune")["phase"] == "Succeeded"


def test_a_job_deleted_by_hand_is_made_again_until_the_end(api: Api, operator: Operator) -> None:
    tune(api)
    first = until_job(api)
    api.delete("Job", JOB)
    wait_for("another Job", lambda: (api.get("Job", JOB) or first)["metadata"]["uid"] != first["metadata"]["uid"])
    finish_pod(api, started_pod(api, api.need("Job", JOB)))
    api.until_phase("FineTuneJob", "tune", "Succeeded")
    api.delete("Job", JOB)
    api.patch("FineTuneJob", "tune", {"spec": {"ttlSecondsAfterFinished": 100}})  # something to be seen by
    wait_for("the pass", lambda: api.status("FineTuneJob", "tune")["observedGeneration"] == 2)
    assert api.get("Job", JOB) is None


def test_a_quota_is_quoted(api: Api, operator: Operator) -> None:
    tune(api)
    job = until_job(api)
    about = {"apiVersion": "batch/v1", "kind": "Job", "namespace": api.namespace, "name": JOB}
    message = "Error creating: pods is forbidden: exceeded quota: team, requested: cpu=8, used: cpu=0, limited: cpu=4"
    api.create(
        "Event", "e1", involvedObject={**about, "uid": job["metadata"]["uid"]}, reason="FailedCreate", type="Warning",
        message=message, firstTimestamp=now(), lastTimestamp=now(), count=1,
    )  # fmt: skip
    status = api.until_reason("FineTuneJob", "tune", "QuotaExceeded")
    assert "limited: cpu=4" in str(status["conditions"])
    started_pod(api, job)
    api.until_phase("FineTuneJob", "tune", "Running")


def test_a_job_that_a_quota_forbids(api: Api, operator: Operator) -> None:
    api.ask(
        "POST", f"/api/v1/namespaces/{api.namespace}/resourcequotas",
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
         "spec": {"hard": {"count/jobs.batch": "0"}}},
    )  # fmt: skip
    path = f"/api/v1/namespaces/{api.namespace}/resourcequotas/none"
    hard = {"count/jobs.batch": "0"}  # no controller keeps the count: said by hand
    api.ask("PATCH", f"{path}/status", {"status": {"hard": hard, "used": hard}}, content="application/merge-patch+json")
    tune(api)
    api.until_reason("FineTuneJob", "tune", "QuotaExceeded")
    api.ask("DELETE", path)
    until_job(api)


def test_out_of_memory_names_the_limit(api: Api, operator: Operator) -> None:
    tune(api, backoffLimit=0, pod={"resources": {"limits": {"memory": "512Mi"}}})
    pod = started_pod(api)
    set_pod(api, pod, "Failed", exited(137, reason="OOMKilled"))
    fail_job(api, JOB, failed=1)
    status = api.until_phase("FineTuneJob", "tune", "Failed")
    assert status["lastFailure"]["reason"] == "OutOfMemory"
    assert "512Mi" in status["lastFailure"]["message"]


def test_a_silent_store_is_asked_again_later_and_a_new_secret_at_once(api: Api, operator: Operator) -> None:
    api.create("Secret", "hub", stringData={"token": "old"})
    tune(api, base={"uri": "hf://org/m", "secretRef": {"name": "hub"}})
    pod = started_pod(api)
    fail_pod(api, pod, 1, "AccessDenied", "the token is refused")
    first = api.need("Job", JOB)["metadata"]["uid"]
    fail_job(api, JOB)
    status = api.until_reason("FineTuneJob", "tune", "AccessDenied")
    assert status["phase"] == "Waiting"
    assert "nextRetryTime" in status
    api.patch("Secret", "hub", {"stringData": {"token": "new"}})
    wait_for("another Job", lambda: (api.get("Job", JOB) or {}).get("metadata", {}).get("uid") not in (None, first), 45)
    assert "nextRetryTime" not in api.until_phase("FineTuneJob", "tune", "Pending")


def test_a_refused_model_behind_a_tag_is_looked_at_again_later(api: Api, operator: Operator) -> None:
    tune(api)
    pod = started_pod(api)
    first = api.need("Job", JOB)["metadata"]["uid"]
    fail_pod(api, pod, 3, "UnsupportedModel", "it is a BertModel")
    fail_job(api, JOB, "PodFailurePolicy", 1)
    status = api.until_reason("FineTuneJob", "tune", "UnsupportedModel")
    assert (status["phase"], "Failed" in {c["type"] for c in status["conditions"]}) == ("Failed", False)
    assert parse(status["nextRetryTime"]) - datetime.now(UTC) > timedelta(minutes=9)
    assert api.need("Job", JOB)["metadata"]["uid"] == first
    # As if ten minutes had passed; a status wakes nobody.
    soon = {"nextRetryTime": stamp(datetime.now(UTC) + timedelta(seconds=1))}
    api.patch("FineTuneJob", "tune", {"status": soon}, "status")
    api.patch("FineTuneJob", "tune", {"spec": {"ttlSecondsAfterFinished": 999}})
    wait_for("another Job", lambda: (api.get("Job", JOB) or {}).get("metadata", {}).get("uid") not in (None, first), 45)
    assert api.until_phase("FineTuneJob", "tune", "Pending")["retries"] == 1


def test_a_foreign_job_is_left_alone(api: Api, operator: Operator) -> None:
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}
    foreign = api.create("Job", JOB, spec={"template": template})
    tune(api)
    status = api.until_reason("FineTuneJob", "tune", "NameConflict")
    assert JOB in str(status["conditions"])
    assert api.need("Job", JOB)["metadata"]["resourceVersion"] == foreign["metadata"]["resourceVersion"]


def test_who_waits_for_each_other_is_told_and_can_be_parted(api: Api, operator: Operator) -> None:
    api.create("FineTuneJob", "a", spec={**TUNE, "base": {"ref": {"kind": "FineTuneJob", "name": "b"}}})
    api.create("FineTuneJob", "b", spec={**TUNE, "base": {"ref": {"kind": "FineTuneJob", "name": "a"}}})
    for name in ("a", "b"):
        status = api.until_reason("FineTuneJob", name, "SourceCycle")
        assert {c["type"]: c["status"] for c in status["conditions"]} == {"Ready": "False", "Stalled": "True"}
    api.delete("FineTuneJob", "b")
    api.until_reason("FineTuneJob", "a", "SourceNotReady")
    api.create("FineTuneJob", "b", spec=TUNE)
    with Kubelet(api):
        api.until_phase("FineTuneJob", "a", "Succeeded", 30)


def test_the_longest_name_and_words_of_all_scripts(api: Api, operator: Operator) -> None:
    name = "n" * 229 + "-" + "x" * 23  # where it is cut for its Event there is a hyphen
    text = '\u4f60\u597d \u0646 \U0001f600 \u2028 \\ " $(HOME) {{x}}'
    generation = {"generation": {"systemPrompt": text}, "prompts": {"uri": "oci://r/p:1"}}
    teacher = {"endpoint": {"url": "https://t/v1", "model": "m"}}
    spec = {"teacher": teacher, "student": {"uri": "oci://r/m:1"}, "data": generation}
    api.create("DistillationJob", name, spec={**spec, "pod": {"env": [{"name": "FACE", "value": "\U0001f600\u2028"}]}})
    with Kubelet(api):
        api.until_phase("DistillationJob", name, "Succeeded")
    (job,) = api.list("Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    env = {e["name"]: e["value"].replace("$$", "$") for e in container["env"]}  # as the kubelet gives it to the process
    assert env["FACE"] == "\U0001f600\u2028"
    run = RunSpec.model_validate_json(env["SLMOPS_RUN"])
    assert run.distill is not None
    assert run.distill.data.generation.system_prompt == text
    assert run.name == name
    wait_for("the Event", lambda: any(e["involvedObject"]["name"] == name for e in api.list("Event")))
