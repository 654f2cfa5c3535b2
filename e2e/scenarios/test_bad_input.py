"""What users get wrong: refused by name when it is applied, or a condition with the remedy; mended, it goes on.

The broken objects are applied together, so that their pods' start-up times overlap.
"""

import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from kit import chart, pods
from kit.kubectl import Kubectl, KubectlError, Object, wait_for
from kit.load import traffic
from kit.objects import (
    LATE,
    REGISTRY,
    SMALL_POD,
    STORE,
    TRAINING,
    deployment,
    describe,
    finetune,
    obj,
    quantize,
)
from kit.teacher import Teacher

NAMESPACE = "e2e-bad-input"
BRIEF = {"training": {**TRAINING, "maxSteps": 3}, "evaluation": None}
EXAMPLE = {"frage": "red box", "antwort": "{}"}
GOOD = "".join(json.dumps(EXAMPLE | {"frage": f"red box {number}"}) + "\n" for number in range(8))


def from_config_map(name: str, **more: object) -> Object:
    """A FineTuneJob on key train.jsonl of the ConfigMap of its own name."""
    return finetune(name, dataset={"configMap": {"name": name, "key": "train.jsonl"}, **more}, **BRIEF)


def data(name: str, text: str) -> Object:
    return pods.config_map(name, {"train.jsonl": text})


def asked(*sentences: str) -> Object:
    """Prompts, in the ConfigMap `misled`."""
    turns = [{"messages": [{"role": "user", "content": sentence}]} for sentence in sentences]
    return pods.config_map("misled", {"prompts.jsonl": "".join(json.dumps(each) + "\n" for each in turns)})


SENTENCES = [f"I saw a red box, number {number}" for number in range(10)]
COLUMNS = {"columns": {"prompt": "frage", "completion": "antwort"}}
BROKEN = {
    "empty": [data("empty", "\n\n"), from_config_map("empty", **COLUMNS)],
    "malformed": [data("malformed", GOOD + "{'single': 'quotes'}\n"), from_config_map("malformed", **COLUMNS)],
    "columnless": [
        data("columnless", GOOD),
        from_config_map("columnless", columns={"prompt": "question", "completion": "antwort"}),
    ],
    "secretless": [finetune("secretless", base={"uri": f"{STORE}/base:tiny", "secretRef": {"name": "later"}}, **BRIEF)],
    "encoder": [finetune("encoder", base={"uri": f"{STORE}/encoder:tiny"}, **BRIEF)],
    "absent": [finetune("absent", base={"uri": f"{STORE}/no-such-model:1"}, **BRIEF)],
}


@pytest.fixture(scope="module")
def namespace(installed: Kubectl) -> Iterator[Kubectl]:
    kube = installed.within(NAMESPACE)
    chart.fresh_namespace(kube)
    yield kube
    kube.delete("namespace", NAMESPACE, wait=False)


@pytest.fixture(scope="module")
def teacher(namespace: Kubectl, images: dict[str, str]) -> Teacher:
    """One that answers garbage."""
    return Teacher(namespace, images["operator"], "garbage")


@pytest.fixture(scope="module")
def broken(namespace: Kubectl, seeded: str, teacher: Teacher) -> Kubectl:
    """A namespace with all of BROKEN, and a student whose teacher answers garbage."""
    namespace.apply(*(each for objects in BROKEN.values() for each in objects))
    spec = {
        "teacher": {"endpoint": teacher.endpoint},
        "student": {"uri": f"{STORE}/base:tiny"},
        "data": {"prompts": {"configMap": {"name": "misled", "key": "prompts.jsonl"}}},
        "training": BRIEF["training"],
        "pod": SMALL_POD,
    }
    namespace.apply(asked(*SENTENCES), obj("DistillationJob", "misled", spec))
    return namespace


def waits(kube: Kubectl, kind: str, name: str, least: timedelta) -> None:
    """Wait until the next try is some time away: it is tried again by itself."""

    def probe() -> bool:
        at = ((kube.get(kind, name) or {}).get("status") or {}).get("nextRetryTime")
        return at is not None and datetime.fromisoformat(at) - datetime.now(UTC) > least

    wait_for(f"the next try of {kind}/{name} to be {least} away", probe, 180)


def says(kube: Kubectl, name: str, reason: str, *patterns: str, kind: str = "finetunejob", timeout: float = 180) -> str:
    """The Ready condition's message, once its reason is `reason`; it has to match every pattern."""

    def probe() -> Object | None:
        ready = kube.condition(kind, name, "Ready") or {}
        return ready if ready.get("reason") == reason else None

    try:
        message = str(wait_for(f"{kind}/{name} {reason}", probe, timeout)["message"])
    except AssertionError as error:
        raise AssertionError(f"{error}\n{describe(kube)}") from None
    missing = [pattern for pattern in patterns if not re.search(pattern, message)]
    assert not missing, f"{missing} not in: {message}"
    return message


def mended(kube: Kubectl, name: str, timeout: float = 240) -> None:
    """Wait until it is Ready, however long it says that it failed."""

    def ready() -> bool:
        return (kube.condition("finetunejob", name, "Ready") or {}).get("status") == "True"

    wait_for(f"finetunejob/{name} is mended", ready, timeout)


def workers(kube: Kubectl, name: str) -> list[Object]:
    return kube.list("pods", f"slmops.dev/owner={name}")


def still(kube: Kubectl, *names: str, seconds: float = 15.0) -> None:
    """Nothing is written and nothing is started for objects that wait for a person."""

    def state() -> dict[str, object]:
        found = {
            each["metadata"]["name"]: each for kind in ("finetunejobs", "distillationjobs") for each in kube.list(kind)
        }
        return {
            name: (
                found[name]["metadata"]["resourceVersion"],
                found[name]["status"].get("attempts"),
                sorted(pod["metadata"]["name"] for pod in workers(kube, name)),
            )
            for name in names
        }

    before, until = state(), time.monotonic() + seconds
    while time.monotonic() < until:
        assert state() == before
        time.sleep(1)  # it is the absence of change that is looked at: no condition to wait for


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learningRate": 1}, r'unknown field "(spec\.)?learningRate"'),
        ({"base": {"uri": "hf://a/b", "ref": {"kind": "FineTuneJob", "name": "x"}}}, "exactly one of uri and ref"),
        ({"base": {"uri": "ftp://a/b"}}, r"spec\.base\.uri"),
        ({"dataset": {}}, "exactly one of uri and configMap"),
    ],
)
def test_what_cannot_be_is_refused_by_name(broken: Kubectl, change: Object, message: str) -> None:
    with pytest.raises(KubectlError, match=message):
        broken.apply(finetune("refused", **{**BRIEF, **change}))
    assert broken.get("finetunejob", "refused") is None


@pytest.mark.parametrize(
    ("name", "why"),
    [("empty", "no example in it"), ("malformed", "ConfigMap malformed, key train.jsonl, line 9: not JSON")],
)
def test_a_broken_file_costs_no_pod_and_is_mended_by_a_better_one(broken: Kubectl, name: str, why: str) -> None:
    says(broken, name, "BadDataset", why)
    assert not workers(broken, name)
    still(broken, name)
    broken.apply(data(name, GOOD))
    broken.wait_ready("finetunejob", name, 180)


def test_a_missing_column_costs_no_pod_and_is_mended_in_the_config_map(broken: Kubectl) -> None:
    says(broken, "columnless", "BadDataset", "ConfigMap columnless, key train.jsonl, line 1 has neither", "'question'")
    assert not workers(broken, "columnless")
    still(broken, "columnless")
    broken.apply(data("columnless", GOOD.replace("frage", "question")))
    mended(broken, "columnless")


def test_a_missing_secret_costs_no_pod_and_is_mended_by_making_it(broken: Kubectl) -> None:
    says(broken, "secretless", "SecretNotFound", "later")
    assert not workers(broken, "secretless")
    still(broken, "secretless")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "later"}}
    auths = {".dockerconfigjson": '{"auths": {}}'}
    broken.apply({**secret, "type": "kubernetes.io/dockerconfigjson", "stringData": auths})
    broken.wait_ready("finetunejob", "secretless", 180)


def test_a_base_that_is_no_causal_lm_is_told_what_it_is_and_looked_at_again_later(broken: Kubectl) -> None:
    says(broken, "encoder", "UnsupportedModel", "BertModel|bert", "causal")
    waits(broken, "finetunejob", "encoder", timedelta(minutes=5))
    still(broken, "encoder")
    assert len(workers(broken, "encoder")) == 1


def test_a_uri_that_names_nothing_says_so(broken: Kubectl) -> None:
    says(broken, "absent", "SourceNotFound", "no-such-model")
    waits(broken, "finetunejob", "absent", timedelta(seconds=20))
    still(broken, "absent")


def test_a_teacher_that_answers_garbage_is_quoted_and_asked_again_once_it_is_mended(
    broken: Kubectl, teacher: Teacher
) -> None:
    says(broken, "misled", "TeacherAnswersRejected", "captive portal", kind="distillationjob")
    waits(broken, "distillationjob", "misled", timedelta(minutes=5))
    still(broken, "misled")
    teacher.revive()
    broken.apply(asked(*SENTENCES, "I saw a blue ball"))  # which ends the wait
    wait_for("it is tried again", lambda: not broken.condition("distillationjob", "misled", "Stalled"), 90)
    done = broken.wait_ready("distillationjob", "misled", 240)
    assert done["status"]["retries"] == 1, done["status"]


def test_an_unreachable_registry_is_waited_for(broken: Kubectl) -> None:
    broken.apply(finetune("unreachable", base={"uri": f"oci://{LATE}/e2e/base:tiny"}, **BRIEF))

    def pulls() -> bool:
        found = (broken.get("finetunejob", "unreachable") or {}).get("status") or {}
        return (found.get("progress") or {}).get("stage", "").startswith("Pulling")

    wait_for("the pod tries to pull", pulls, 180)
    (pod,) = workers(broken, "unreachable")
    assert (broken.condition("finetunejob", "unreachable", "Stalled") or {}).get("status") != "True"
    host, _, namespace = LATE.partition(":")[0].removesuffix(".svc").partition(".")
    assert namespace == NAMESPACE
    target = f"{REGISTRY.partition(':')[0]}.cluster.local"
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": host}}
    broken.apply({**service, "spec": {"type": "ExternalName", "externalName": target}})
    done = broken.wait_ready("finetunejob", "unreachable", 300)
    assert (done["status"]["attempts"], done["status"]["retries"]) == (0, 0), done["status"]
    assert [each["metadata"]["name"] for each in workers(broken, "unreachable")] == [pod["metadata"]["name"]]


def test_quota_forbids_the_pod_then_grows(space: Kubectl, seeded: str) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small"},
        "spec": {"hard": {"limits.memory": "1Gi"}},
    }
    space.apply(quota)
    space.apply(finetune("squeezed", **BRIEF))

    says(space, "squeezed", "QuotaExceeded", "quota", timeout=60)
    still(space, "squeezed")
    space.delete("resourcequota", "small")
    space.wait_ready("finetunejob", "squeezed", 240)


def test_names_of_63_characters(space: Kubectl, seeded: str, images: dict[str, str]) -> None:
    name = "a" * 60 + "-63"
    assert len(name) == 63
    space.apply(finetune(name, **BRIEF), quantize(name, "FineTuneJob", name, "int4"), deployment(name, name))
    served = space.wait_ready("modeldeployment", name, 300)
    with traffic(space, images["server"], served["status"]["endpoint"], name, ["red box"]):
        pass  # it asks a few times before it begins
