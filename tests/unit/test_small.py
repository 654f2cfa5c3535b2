"""Conditions, comparison, progress, settings, pods, logs: the small parts."""

import asyncio
import itertools
import json
import logging
import socket
import sys
import threading
from datetime import timedelta
from typing import Any

import aiohttp
import httpx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.unit.objects import NOW, Object, at, condition, exited, finetune, pod, waiting

from slmops.api import keys
from slmops.api.meta import Condition, Pod, Resources
from slmops.cluster.kinds import OURS
from slmops.cluster.kube import as_yaml
from slmops.cluster.same import covers, merge_patch, stamped
from slmops.handlers import probes, watches
from slmops.handlers.logs import JsonFormatter
from slmops.handlers.watches import Backoffs, InVainError
from slmops.reconcile import conditions
from slmops.reconcile.pods import failure_of, trouble_of
from slmops.remote.progress import BODY_MAX, SILENT_SECONDS, ProgressReader
from slmops.settings import Settings


def test_transition_time_moves_only_with_the_status() -> None:
    first = conditions.reconciling([], "Starting", "a", generation=1, now=NOW)
    later = NOW + timedelta(minutes=1)
    second = conditions.reconciling(first, "Running", "b", generation=2, now=later)
    assert [c.last_transition_time for c in second] == [at(0), at(0)]
    done = conditions.ready(second, "Succeeded", "c", generation=2, now=later)
    assert [(c.type, c.status, c.last_transition_time) for c in done] == [("Ready", "True", at(60))]


def test_never_reconciling_and_stalled_at_once() -> None:
    said: list[Condition] = []
    for step in (conditions.reconciling, conditions.stalled, conditions.reconciling):
        said = step(said, "R", "m", generation=1, now=NOW)
        names = {c.type for c in said}
        assert "Ready" in names
        assert len(names & {"Reconciling", "Stalled"}) == 1


PATIENCE = [(5, 0, 5), (5, 100, 5), (5, 600, 30), (5, 10**6, 60), (300, 10**6, 300)]


@pytest.mark.parametrize(("after", "waited", "seconds"), PATIENCE)
def test_what_has_been_missing_for_long_is_looked_for_less_often(after: float, waited: float, seconds: float) -> None:
    said = conditions.reconciling([], "SecretNotFound", "m", generation=1, now=NOW - timedelta(seconds=waited))
    again = conditions.reconciling(said, "QuotaExceeded", "m", generation=1, now=NOW)  # the time is of Ready's status
    assert conditions.patiently(after, again, NOW) == seconds
    assert conditions.patiently(after, conditions.ready([], "R", "", generation=1, now=NOW), NOW) == after
    assert conditions.patiently(after, [], NOW) == after


def test_messages_are_one_line_of_bounded_length() -> None:
    said = conditions.ready([], "R", "a\nb " + "x" * 5000, generation=1, now=NOW)
    assert said[0].message.startswith("a b x")
    assert len(said[0].message) == conditions.MESSAGE_MAX


# Comparison.

COVERS: list[tuple[Any, Any, bool]] = [
    ({"a": 1, "added": 2}, {"a": 1}, True),
    ({"a": 1}, {"a": 2}, False),
    ({"a": [1, 2]}, {"a": [1]}, False),
    ({"a": [{"x": 1, "y": 2}]}, {"a": [{"x": 1}]}, True),
    ({}, {"emptyDir": {}}, True),
    ({}, {"value": ""}, True),
    ({}, {"value": "x"}, False),
    ({}, {"suspend": False}, False),
    ({"limits": {"cpu": "1", "memory": "1Gi"}}, {"limits": {"cpu": "1000m", "memory": "1024Mi"}}, True),
    ({"limits": {"cpu": "1"}}, {"limits": {"cpu": "2"}}, False),
    ({"limits": {"nvidia.com/gpu": "1"}}, {"limits": {"nvidia.com/gpu": 1}}, True),
    ({"env": [{"value": "1"}]}, {"env": [{"value": "1.0"}]}, False),
    ({"selector": {"a": "b"}, "type": "ClusterIP"}, {"selector": {"a": "b"}}, True),
    ({"selector": {"a": "b", "c": "d"}}, {"selector": {"a": "b"}}, False),
    ({"selector": {"matchLabels": {"a": "b", "c": "d"}}}, {"selector": {"matchLabels": {"a": "b"}}}, False),
    ({"nodeSelector": {"a": "b", "c": "d"}}, {"nodeSelector": {"a": "b"}}, False),
    ({}, {"nodeSelector": {}}, True),
]


@pytest.mark.parametrize(("current", "wanted", "same"), COVERS)
def test_covers(current: Any, wanted: Any, same: bool) -> None:
    assert covers(current, wanted) == same


def test_the_stamp_changes_with_the_object_and_not_with_itself() -> None:
    obj: Object = {"kind": "Job", "metadata": {"name": "a", "annotations": {"x": "y"}}, "spec": {"b": 1, "a": 2}}
    once = stamped(obj)
    assert stamped(once) == once
    assert stamped({**obj, "spec": {"a": 2, "b": 1}}) == once
    assert stamped({**obj, "spec": {"a": 3}}) != once
    later = stamped({**obj, "metadata": {**obj["metadata"], "resourceVersion": "7"}})
    assert later["metadata"] == {**once["metadata"], "resourceVersion": "7"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=8,
)
DOCUMENT = st.dictionaries(st.sampled_from("abcd"), JSON, max_size=4)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def patched(target: Any, patch: Any) -> Any:
    """RFC 7386, as in its text."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = patched(result.get(key), value)
    return result


@given(DOCUMENT, DOCUMENT)
def test_the_merge_patch_leads_there_and_is_empty_only_at_the_end(current: Object, wanted: Object) -> None:
    current, wanted = without_nulls(current), without_nulls(wanted)
    patch = merge_patch(current, wanted)
    assert patched(current, patch) == wanted
    assert (not patch) == (current == wanted)


def test_no_example_fails_for_the_time_it_takes() -> None:
    assert settings().deadline is None


SIGNS = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["\U0001f600", "\u2028\x85\x7f", "\\ud83d"]
)


@given(st.dictionaries(SIGNS, st.lists(SIGNS, max_size=3), max_size=3))
def test_what_is_applied_is_yaml_and_json_whatever_the_signs(obj: Object) -> None:
    text = as_yaml(obj)
    assert yaml.safe_load(text.decode()) == obj
    assert json.loads(text) == obj


# Names.


@given(st.from_regex(r"[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?", fullmatch=True), st.sampled_from(["", "finetune"]))
def test_names_of_children_are_dns_labels(owner: str, role: str) -> None:
    name = keys.child_name(owner, role)
    assert len(name) <= 63
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name[-1] != "-"
    assert name == keys.child_name(owner, role)


@given(st.from_regex(r"[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?", fullmatch=True))
def test_label_values(name: str) -> None:
    value = keys.label_value(name)
    assert len(value) <= 63
    assert value[0].isalnum()
    assert value[-1].isalnum()


# Progress.


def reading(answer: httpx.Response | Exception) -> Any:
    def respond(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://10.0.0.1:9090/progress"
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ProgressReader(client=httpx.Client(transport=httpx.MockTransport(respond)))("10.0.0.1")


def test_progress_is_read() -> None:
    found = reading(httpx.Response(200, json={"percent": 40, "stage": "Training", "etaSeconds": 9}))
    assert (found.percent, found.stage, found.eta_seconds) == (40, "Training", 9)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(500),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"percent": 400}),
        httpx.Response(200, json=[]),
        httpx.Response(200, text='{"percent": 1, "message": "' + "x" * BODY_MAX),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
    ],
    ids=["500", "html", "400 percent", "list", "endless", "refused", "slow"],
)
def test_bad_progress_is_none(answer: httpx.Response | Exception) -> None:
    assert reading(answer) is None


def test_a_pod_that_lets_us_wait_is_left_alone_for_a_while() -> None:
    asked = 0

    def respond(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        raise httpx.ConnectTimeout("silence")

    read, now = ProgressReader(client=httpx.Client(transport=httpx.MockTransport(respond))), 0.0
    for _ in range(5):
        assert read("10.0.0.1", clock=lambda: now) is None
    assert asked == 1
    read("10.0.0.2", clock=lambda: now)
    assert asked == 2
    now = SILENT_SECONDS + 1
    read("10.0.0.1", clock=lambda: now)
    assert asked == 3


# Pods.


def test_evictions_are_named() -> None:
    found = failure_of(pod(finetune(), phase="Failed", reason="Evicted", message="low on memory"))
    assert found is not None
    assert (found.reason, found.message) == ("Evicted", "The pod was taken off its node: low on memory")


def test_a_pod_that_never_ran_says_so() -> None:
    found = failure_of(pod(finetune(), phase="Failed"))
    assert found is not None
    assert "before its container ran" in found.message


def test_a_pod_that_was_not_admitted_passes_the_kubelets_words_on() -> None:
    told = {"reason": "UnexpectedAdmissionError", "message": "Allocate failed: no healthy devices"}
    found = failure_of(pod(finetune(), phase="Failed", **told))
    assert found is not None
    assert found.message.endswith("refused pod tune-abc: UnexpectedAdmissionError: Allocate failed: no healthy devices")


def test_a_bare_exit_code_names_the_log() -> None:
    found = failure_of(pod(finetune(), phase="Failed", state=exited(2)))
    assert found is not None
    assert found.message.endswith("kubectl -n ns logs tune-abc")


def test_node_memory_without_a_limit() -> None:
    found = failure_of(pod(finetune(), phase="Failed", state=exited(137, reason="OOMKilled")))
    assert found is not None
    assert "the memory of its node" in found.message


def test_a_pod_being_made_is_no_trouble() -> None:
    assert trouble_of(pod(finetune(), phase="Pending", state=waiting("ContainerCreating"))) is None
    assert trouble_of(pod(finetune(), phase="Pending")) is None
    gated = pod(finetune(), phase="Pending", conditions=[condition("PodScheduled", "SchedulingGated", "", "False")])
    found = trouble_of(gated)
    assert found is not None
    assert found.reason == "SchedulingGated"


# Settings, logs, backoffs.


def test_settings_come_from_the_environment() -> None:
    env = {"SLMOPS_STORE": "oci://s", "SLMOPS_WORKERS": "3", "SLMOPS_NAMESPACES": "", "OTHER": "x"}
    found = Settings.from_env(env)
    assert (found.store, found.workers, found.namespaces) == ("oci://s", 3, "")
    for name, value in (("WORKERS", "many"), ("WORKERS", "0"), ("PROBE_PORT", "99999"), ("STORE", "https://r")):
        with pytest.raises(ValidationError):
            Settings.from_env({f"SLMOPS_{name}": value})


def test_what_the_values_do_not_say_of_the_routers_is_as_by_default() -> None:
    """helm upgrade --reuse-values keeps the values of a release that knew no router.resources."""

    def routers(text: str) -> Pod:
        return Settings.from_env({"SLMOPS_ROUTER_POD": text}).router_pod

    usual = Settings().router_pod
    assert routers("{}") == usual
    assert routers('{"nodeSelector": {"a": "b"}}') == usual.model_copy(update={"node_selector": {"a": "b"}})
    assert routers('{"resources": {}}').resources == Resources()
    assert routers('{"resources": {"requests": {"cpu": "1000m", "memory": "1Gi"}, "limits": {"cpu": 1}}}').resources
    too_much = '{"resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": "512Mi"}}}'  # helm adds that limit
    for text in ("[]", "2", "{", too_much, '{"resources": {"limits": {"memory": "much"}}}'):
        with pytest.raises(ValidationError):
            routers(text)


def test_logs_are_one_json_object_a_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, __file__, 1, "Could not %s", ("x\ny",), sys.exc_info())
    record.object = "tune"
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"], found["object"]) == ("error", "Could not x\ny", "tune")
    assert "ValueError" in found["trace"]


def test_backoffs_stay_short_and_end_the_watches_after_a_while() -> None:
    found: list[float] = []
    with pytest.raises(InVainError):
        found.extend(iter(Backoffs(lambda: sum(found))))
    assert 45 < sum(found) < watches.kopf.OperatorSettings().watching.inactivity_timeout - 5  # the time to connect
    assert max(found) <= 12
    assert min(found[4:]) >= 8
    assert not hasattr(Backoffs(), "__len__")  # kopf would count them


def test_backoffs_tell_whether_a_call_is_tried_again() -> None:
    backoffs = Backoffs()

    def call(attempts: int) -> bool:
        """As kopf does it: a delay is taken before each attempt."""
        for attempt, _delay in enumerate(itertools.chain(backoffs, itertools.repeat(None)), start=1):
            if attempt == attempts:
                return backoffs.failing
        raise AssertionError

    for attempts, failing in ((1, False), (2, True), (5, True)):
        assert (call(attempts), backoffs.failing) == (failing, False)


def test_watches_list_everything_again_now_and_then_though_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was deaf without knowing it hears of what it missed; that is no restart, and it is ready all along."""
    begun, restarted = threading.Semaphore(0), threading.Event()

    async def spawn(*, ready_flag: threading.Event, **_: object) -> list[asyncio.Task[Any]]:
        ready_flag.set()
        begun.release()
        return [asyncio.create_task(asyncio.Event().wait())]

    monkeypatch.setattr(watches.kopf, "spawn_tasks", spawn)
    monkeypatch.setattr(watches, "RELIST", 0.01)
    found = watches.Watches(lambda _note: None, lambda: set(OURS), [], restarted.set)
    found.start()
    assert all(begun.acquire(timeout=5) for _ in range(3))
    assert found.ready
    assert not restarted.is_set()
    found.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_operators_probes_answer_over_ipv4_and_ipv6(host: str) -> None:
    async def asked() -> tuple[int, str]:
        with socket.socket(socket.AF_INET6) as free:
            free.bind(("::", 0))
            port = free.getsockname()[1]
        server = await probes.serve(probes.probes(lambda: "", lambda: "the watches are not up"), port)
        try:
            async with aiohttp.ClientSession() as client:
                where = f"[{host}]" if ":" in host else host
                async with client.get(f"http://{where}:{port}/readyz") as answer:
                    return answer.status, await answer.text()
        finally:
            await server.cleanup()

    assert asyncio.run(asked()) == (503, "the watches are not up\n")
