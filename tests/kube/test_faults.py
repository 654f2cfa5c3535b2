"""What goes wrong around the operator: it is killed at every write, the API server goes away, lies, or breaks off."""

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.kube.api import Api, ApiError, Object, wait_for
from tests.kube.conftest import Operator, Start
from tests.kube.kubelet import RESULT, Kubelet
from tests.kube.proxy import Proxy
from tests.kube.test_life import TUNE, tune, until_job
from tests.kube.test_writes import scraped

from slmops.api.run import RunSpec

KINDS = {"a": "FineTuneJob", "b": "FineTuneJob", "c": "QuantizedModel"}
JOBS = {"a-finetune", "b-finetune"}  # c's goes in its time


def apply_chain(api: Api) -> None:
    source = {"ref": {"kind": "FineTuneJob", "name": "b"}}
    api.create("QuantizedModel", "c", spec={"source": source, "ttlSecondsAfterFinished": 0})
    api.create("FineTuneJob", "b", spec={**TUNE, "base": {"ref": {"kind": "FineTuneJob", "name": "a"}}})
    api.create("FineTuneJob", "a", spec=TUNE)


def chain_done(api: Api) -> bool:
    phases = [api.status(kind, name).get("phase") for name, kind in KINDS.items()]
    return phases == ["Succeeded"] * 3 and {job["metadata"]["name"] for job in api.list("Job")} == JOBS


def digest_of(job: Object) -> Object:
    """A result that tells which run made it."""
    env = job["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"]
    run = RunSpec.model_validate_json(env)
    artifact = {**RESULT["artifact"], "digest": f"sha256:{run.name}"}
    return {**RESULT, "artifact": artifact}


def end_state(api: Api) -> Object:
    """What is left of it, without times, uids and what counts writes."""
    found: Object = {}
    for name, kind in KINDS.items():
        status = api.status(kind, name)
        said = [
            {key: value for key, value in c.items() if key not in ("lastTransitionTime", "message")}
            for c in status["conditions"]
        ]
        kept = {
            key: status[key] for key in ("phase", "artifact", "lineage", "metrics", "quality", "attempts", "retries")
        }
        found[name] = {**kept, "conditions": sorted(said, key=lambda c: str(c["type"]))}
    found["jobs"] = sorted(job["metadata"]["name"] for job in api.list("Job"))
    return found


def run_chain(
    api: Api, proxy: Proxy, start: Start, operator: Operator, kill_after: int | None
) -> tuple[Object, dict[str, set[str]], Operator]:
    """The chain from its creation to its end, the operator being killed right after one write was carried out.

    Returns the end state, the uids of all Jobs by name, and the operator that lives.
    """
    killed, victim = threading.Event(), operator

    def after_write(number: int) -> bool:
        if number != kill_after or killed.is_set():
            return False
        victim.kill()
        killed.set()
        return True

    proxy.writes.clear()
    proxy.after_write = after_write
    apply_chain(api)
    with Kubelet(api, digest_of) as kubelet:
        if kill_after is not None:
            wait_for("the kill", killed.is_set, 40)
            operator = start()
        wait_for("the chain's end", lambda: chain_done(api), 40)
    proxy.after_write = lambda number: False
    return end_state(api), kubelet.jobs_seen, operator


def clear(api: Api) -> None:
    for kind in ("FineTuneJob", "QuantizedModel", "Job", "Pod"):
        api.ask("DELETE", api.path(kind), {"propagationPolicy": "Background", "gracePeriodSeconds": 0})


@pytest.mark.slow
def test_killed_right_after_every_write(api: Api, start: Start, proxy: Proxy) -> None:
    undisturbed, jobs, operator = run_chain(api, proxy, start, start(), None)
    assert all(len(uids) == 1 for uids in jobs.values()), jobs
    writes = [write for write in proxy.writes if not write.endswith("/events")]
    assert len(proxy.writes) <= 3 * 6 + 1, proxy.writes  # six for an object, and the removal of one Job
    for number in range(1, len(writes) + 1):
        clear(api)
        state, jobs, operator = run_chain(api, proxy, start, operator, number)
        assert state == undisturbed, f"killed after write {number}"
        assert all(len(uids) == 1 for uids in jobs.values()), f"killed after write {number}: {jobs}"


def test_an_error_event_in_every_watch(api: Api, start: Start, proxy: Proxy) -> None:
    operator = start().until_ready()
    tune(api)
    until_job(api)
    process = operator.process.pid
    wait_for("the watches", lambda: proxy.error_in_watches(500) > 0)
    wait_for("the restart", lambda: "slmops_watch_restarts_total 1.0" in scraped(operator))
    operator.until_ready()
    api.create("FineTuneJob", "later", spec=TUNE)
    until_job(api, "later-finetune")
    assert operator.process.pid == process
    assert operator.healthy()


def test_a_watch_that_is_too_old(api: Api, start: Start, proxy: Proxy) -> None:
    operator = start().until_ready()
    wait_for("the watches", lambda: proxy.error_in_watches(410) > 0)
    api.create("FineTuneJob", "later", spec=TUNE)
    until_job(api, "later-finetune")
    assert operator.healthy()
    assert "slmops_watch_restarts_total 0.0" in scraped(operator)


def test_started_before_the_api_server(api: Api, start: Start, proxy: Proxy) -> None:
    proxy.refuse()
    operator = start()
    tune(api)
    wait_for("the process to serve", lambda: operator.get("/healthz") is not None)
    ready = operator.get("/readyz")
    assert ready is not None
    assert ready.status_code == 503
    proxy.listen()
    operator.until_ready(60)
    until_job(api)


def test_sigterm_ends_it_in_time_with_a_silent_api_server(api: Api, start: Start, proxy: Proxy) -> None:
    operator = start().until_ready()
    tune(api)
    until_job(api)
    proxy.silent, before = True, len(proxy.requests)

    def waits() -> bool:  # a Job without a pod is looked after every few seconds
        return any("finetunejobs/tune" in asked for asked in proxy.requests[before:])

    wait_for("a pass that waits for its answer", waits)
    assert operator.terminate() < 12  # eight of them are the pass's


def test_what_it_serves_to_prometheus(api: Api, start: Start) -> None:
    operator = start().until_ready()
    tune(api)
    with Kubelet(api):
        api.until_phase("FineTuneJob", "tune", "Succeeded")

    def told() -> bool:
        text = scraped(operator)
        return all(word in text for word in WORDS)

    wait_for(f"all of {WORDS}", told)
    memory = next(
        float(line.split()[1])
        for line in scraped(operator).splitlines()
        if line.startswith("process_resident_memory_bytes ")
    )
    assert memory < 160 * 2**20


WORDS = [
    'slmops_objects{kind="FineTuneJob",phase="Succeeded"} 1.0',
    'slmops_reconcile_seconds_count{kind="FineTuneJob"}',
    'slmops_run_seconds_count{kind="FineTuneJob",outcome="Succeeded"} 1.0',
    'slmops_api_requests_total{code="201",kind="Job",verb="apply"} 1.0',
    "slmops_queue_depth 0.0",
    "slmops_queue_oldest_seconds 0.0",
    "slmops_watch_restarts_total 0.0",
    "slmops_build_info",
]


def test_a_port_that_is_taken_is_said_in_a_sentence(api: Api, start: Start) -> None:
    first = start().until_ready()
    second = start(SLMOPS_PROBE_PORT=str(first.probes))
    assert second.process.wait(20) == 1
    assert "Could not start" in second.log.read_text()


def test_a_bad_setting_is_said_in_a_sentence(start: Start) -> None:
    operator: Operator = start(SLMOPS_WORKERS="many")
    assert operator.process.wait(20) == 1
    assert "SLMOPS_WORKERS" in operator.log.read_text()


def test_nothing_but_our_own_objects_is_asked_for(api: Api, start: Start, proxy: Proxy) -> None:
    """Secrets and ConfigMaps are never listed; pods, Jobs, Deployments and Services by our labels alone."""
    start().until_ready()
    tune(api)
    with Kubelet(api):
        api.until_phase("FineTuneJob", "tune", "Succeeded")
    for request in list(proxy.requests):
        path = request.split(" ", 1)[1]
        plural = path.split("?")[0].rsplit("/", 1)[-1]
        assert plural not in ("secrets", "configmaps", "namespaces", "customresourcedefinitions"), request
        if plural in ("pods", "jobs", "deployments", "services") and request.startswith("GET"):
            assert "labelSelector=" in path, request


def test_an_object_of_an_older_schema_stops_nobody(api: Api, start: Start) -> None:
    """Stored under an older CRD, it lacks what is required now: it says so, and the others go on."""
    name = "finetunejobs.slmops.dev"
    url = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
    crd = api.ask("GET", url)
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    required, rules = spec["required"], spec["x-kubernetes-validations"]
    patch: list[dict[str, Any]] = []
    base = "/spec/versions/0/schema/openAPIV3Schema/properties/spec"
    patch.append({"op": "replace", "path": f"{base}/required", "value": ["dataset"]})
    patch.append({"op": "remove", "path": f"{base}/x-kubernetes-validations"})
    try:
        api.ask("PATCH", url, patch, content="application/json-patch+json")

        def stored() -> bool:
            try:
                api.create("FineTuneJob", "old", spec={"dataset": TUNE["dataset"]})
            except Exception:  # noqa: BLE001  # the new schema is not in force yet
                return False
            return True

        wait_for("the older schema", stored)
    finally:
        patch = [
            {"op": "replace", "path": f"{base}/required", "value": required},
            {"op": "add", "path": f"{base}/x-kubernetes-validations", "value": rules},
        ]
        api.ask("PATCH", url, patch, content="application/json-patch+json")
    start().until_ready()
    tune(api)
    until_job(api)
    wait_for("the Event", lambda: any(event["reason"] == "InvalidSpec" for event in api.list("Event")))
    assert api.status("FineTuneJob", "old") == {"observedGeneration": -1}  # it cannot be written any more


def test_a_policy_that_denies_the_job_is_waited_for(api: Api, start: Start) -> None:
    name, group = f"no-jobs-{api.namespace}", "admissionregistration.k8s.io/v1"
    policies, bindings = (f"/apis/{group}/validatingadmissionpolic{end}" for end in ("ies", "ybindings"))
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": api.namespace}}}
    policy = {
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": "false", "message": "label team is missing"}],
    }
    binding = {"policyName": name, "validationActions": ["Deny"], "matchResources": here}
    whole = {"apiVersion": group, "metadata": {"name": name}}
    api.ask("POST", policies, {**whole, "kind": "ValidatingAdmissionPolicy", "spec": policy})
    api.ask("POST", bindings, {**whole, "kind": "ValidatingAdmissionPolicyBinding", "spec": binding})
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}

    def in_force() -> bool:
        try:
            api.create("Job", "x", spec={"template": {"spec": pod}}, dry_run=True)
        except ApiError as error:
            return "denied request" in error.message
        return False

    try:
        wait_for("the policy", in_force)
        start().until_ready()
        tune(api)
        status = api.until_reason("FineTuneJob", "tune", "PolicyDenied")
        assert status["phase"] == "Waiting"
        assert "label team is missing" in status["conditions"][0]["message"]
    finally:
        for url in (bindings, policies):
            api.ask("DELETE", f"{url}/{name}")
    wait_for("the Job", lambda: api.get("Job", "tune-finetune"), 60)


BROKEN = {"no YAML": "{", "no list": "[]", "no context": "apiVersion: v1\nkind: Config\ncurrent-context: gone\n"}


@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_kubeconfig_is_said_in_a_sentence(start: Start, tmp_path: Path, text: str) -> None:
    (tmp_path / "broken").write_text(text)
    operator = start(KUBECONFIG=str(tmp_path / "broken"))
    assert operator.process.wait(20) == 1
    (line,) = operator.log.read_text().splitlines()
    assert "Could not start" in line
