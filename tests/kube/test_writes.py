"""What the operator writes, and what it leaves behind: each test with an operator of its own behind a proxy."""

import time

from tests.kube.api import Api, wait_for
from tests.kube.conftest import Operator, Start
from tests.kube.kubelet import RESULT, complete_job, finish_pod
from tests.kube.proxy import Proxy
from tests.kube.test_life import JOB, TUNE, started_pod, tune, until_job


def test_to_a_good_end_with_few_writes_and_no_trace_of_kopf(api: Api, start: Start, proxy: Proxy) -> None:
    start().until_ready()
    tune(api)
    pod = started_pod(api)
    api.until_phase("FineTuneJob", "tune", "Running")
    finish_pod(api, pod)
    status = api.until_phase("FineTuneJob", "tune", "Succeeded")
    assert status["artifact"] == RESULT["artifact"]
    assert status["lineage"]["digest"] == "sha256:aa"
    assert status["quality"] == "exactMatch 0.500"
    assert status["source"] == "oci://r/base:1"
    complete_job(api, JOB)
    wait_for("the Event", lambda: any(w.endswith("/events") for w in proxy.writes))
    assert len(proxy.writes) <= 6, proxy.writes
    metadata = api.need("FineTuneJob", "tune")["metadata"]
    assert "finalizers" not in metadata
    assert "annotations" not in metadata
    assert {entry["manager"] for entry in metadata["managedFields"]} == {"user", "slmops"}
    job = api.need("Job", JOB)["metadata"]
    assert "finalizers" not in job
    assert set(job["annotations"]) == {"slmops.dev/applied", "slmops.dev/image"}
    assert {entry["manager"] for entry in job["managedFields"] if entry["operation"] == "Apply"} == {"slmops"}


def test_a_second_operator_writes_nothing(api: Api, start: Start, proxy: Proxy) -> None:
    first = start().until_ready()
    tune(api)
    finish_pod(api, started_pod(api))
    api.create("FineTuneJob", "waits", spec={**TUNE, "base": {"ref": {"kind": "FineTuneJob", "name": "none"}}})
    api.until_phase("FineTuneJob", "tune", "Succeeded")
    api.until_reason("FineTuneJob", "waits", "SourceNotReady")
    wait_for("the Event", lambda: any(w.endswith("/events") for w in proxy.writes))
    assert first.terminate() < 10
    before = list(proxy.writes)
    second = start().until_ready()
    wait_for("passes over both", lambda: passes(second) >= 2)
    assert proxy.writes == before


def test_a_deadline_that_somebody_else_gave_the_job_is_no_storm(api: Api, start: Start, proxy: Proxy) -> None:
    operator = start().until_ready()
    tune(api)
    started_pod(api)
    api.until_phase("FineTuneJob", "tune", "Running")
    before, applied = passes(operator), len(proxy.writes)
    api.patch("Job", JOB, {"spec": {"activeDeadlineSeconds": 36000}})
    wait_for("passes after it", lambda: passes(operator) >= before + 3)
    assert len([write for write in proxy.writes[applied:] if f"/jobs/{JOB}" in write]) <= 1, proxy.writes
    assert api.need("Job", JOB)["spec"]["activeDeadlineSeconds"] == 36000


def test_deleting_an_object_waits_for_nobody(api: Api, start: Start) -> None:
    operator = start().until_ready()
    tune(api)
    until_job(api)
    operator.kill()
    api.delete("FineTuneJob", "tune")
    assert api.get("FineTuneJob", "tune") is None


def test_a_namespace_that_goes_away_is_no_storm(api: Api, start: Start, proxy: Proxy) -> None:
    tune(api)
    api.ask("DELETE", f"/api/v1/namespaces/{api.namespace}")  # its end never comes: no controller is here to bring it
    start().until_ready()
    api.until_reason("FineTuneJob", "tune", "NamespaceTerminating")
    until = time.monotonic() + 8
    wait_for("some seconds more", lambda: time.monotonic() > until)
    tries = [request for request in proxy.requests if request.startswith("PATCH") and "/jobs/" in request]
    assert len(tries) == 1
    assert len(proxy.writes) == 1, proxy.writes  # the status that says so


def passes(operator: Operator) -> float:
    """How many passes over FineTuneJobs have ended."""
    name = 'slmops_reconcile_seconds_count{kind="FineTuneJob"} '
    return sum(float(line.removeprefix(name)) for line in scraped(operator).splitlines() if line.startswith(name))


def scraped(operator: Operator) -> str:
    answer = operator.get("/metrics", metrics=True)
    return answer.text if answer else ""
