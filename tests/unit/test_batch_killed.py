"""A batch object that is tried again, by an operator that is killed right after a write: any one of them, or each."""

import contextlib
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.objects import NOW, RUNNING, Object, condition, exited, finetune, pod, said, waiting
from tests.unit.test_batch_life import FAILED_JOB, FATAL_JOB

from slmops.api.times import stamp
from slmops.cluster.memory import MemoryCluster, key_of
from slmops.cluster.port import ClusterError, Key
from slmops.reconcile.driver import Driver
from slmops.reconcile.table import reconcilers
from slmops.settings import Settings

KEY, JOB = Key("FineTuneJob", "ns", "tune"), Key("Job", "ns", "tune-finetune")
DATA, HUB = Key("ConfigMap", "ns", "data"), Key("Secret", "ns", "hub")
SPEC: dict[str, Any] = {
    "base": {"uri": "hf://a/b", "secretRef": {"name": "hub"}},
    "dataset": {"configMap": {"name": "data", "key": "train"}},
}


class KilledError(Exception):
    """The operator is gone in the middle of a pass."""


class Mortal(MemoryCluster):
    """With a clock; the operator is killed right after the writes whose numbers are in `deadly`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.deadly: Collection[int] = ()
        self.jobs: set[str] = set()  # uids of all that were ever made

    def put(self, obj: Object) -> Object:
        if key_of(obj) not in self.objects:
            obj = {**obj, "metadata": {"creationTimestamp": stamp(self.now), **obj["metadata"]}}
        return super().put(obj)

    def apply(self, obj: Object, *, current: Object | None = None) -> Object:
        before = len(self.writes)
        made = super().apply(obj, current=current)
        self.jobs.add(made["metadata"]["uid"])
        self._survive(before)
        return made

    def delete(self, key: Key, *, uid: str | None = None) -> None:
        before = len(self.writes)
        super().delete(key, uid=uid)
        self._survive(before)

    def patch_status(self, obj: Object, status: Object) -> Object:
        before = len(self.writes)
        written = super().patch_status(obj, status)
        self._survive(before)
        return written

    def _survive(self, before: int) -> None:
        if len(self.writes) > before and len(self.writes) in self.deadly:
            raise KilledError


class World:
    """A FineTuneJob whose first Job is there; `fail` ends it, and every later Job gets a pod that runs."""

    def __init__(self, **spec: Any) -> None:
        self.cluster, self.first = Mortal(), ""
        self.settings = Settings(store="oci://s", trainer_image="trainer:1")
        self.config_map('{"prompt": "a", "completion": 1}')
        self.secret("old")
        self.cluster.put(finetune(**{**SPEC, **spec}))
        self.passes(2)
        self.first = self.cluster.objects[JOB]["metadata"]["uid"]

    def config_map(self, line: str) -> None:
        self._put(DATA, train=line)

    def secret(self, token: str) -> None:
        self._put(HUB, token=token)

    def _put(self, key: Key, **data: str) -> None:
        self.cluster.put({"kind": key.kind, "metadata": {"name": key.name, "namespace": key.namespace}, "data": data})

    def edit(self, **spec: Any) -> None:
        obj = self.cluster.objects[KEY]
        self.cluster.put({**obj, "spec": {**obj["spec"], **spec}})

    def fail(self, state: Object, age: float = 50, **job: Any) -> None:
        self.pod("first", self.first, age=age, phase="Failed", state=state)
        self.cluster.set_status(JOB, job)
        self.passes(2)

    def pod(self, name: str, job: str, **how: Any) -> None:
        made = pod(self.cluster.objects[KEY], name=name, of=job, **how)
        self.cluster.put(made)
        self.cluster.set_status(key_of(made), made["status"])

    def passes(self, count: int = 12) -> None:
        """An operator each, should it be killed; seconds go by."""
        for _ in range(count):
            self.cluster.now += timedelta(seconds=2)
            driver = Driver(
                self.cluster,
                self.settings,
                reconcilers(lambda address: None),
                lambda routes: None,
                clock=lambda: self.cluster.now,
            )
            with contextlib.suppress(KilledError):
                driver.run(KEY)
            found = self.cluster.objects.get(JOB)
            if found and self.first and found["metadata"]["uid"] != self.first:
                self.pod("second", found["metadata"]["uid"], state=RUNNING)

    @property
    def status(self) -> Object:
        found: Object = self.cluster.objects[KEY]["status"]
        return found

    def told(self) -> Object:
        """What the status says, times apart."""
        plain = {name: self.status.get(name) for name in ("phase", "retries", "attempts", "inputs", "lastFailure")}
        said_now = [(c["type"], c["status"], c["reason"], c["message"]) for c in self.status["conditions"]]
        return {**plain, "waits": "nextRetryTime" in self.status, "conditions": said_now}


LATE = {"conditions": [condition("Failed", "DeadlineExceeded")]}


def mended_dataset() -> World:
    world = World()
    world.fail(said("BadDataset", "line 1: 'completion' must be text", 3), **FATAL_JOB)
    assert world.status["phase"] == "Failed"
    world.config_map('{"prompt": "a", "completion": "b"}')
    return world


def mended_dataset_without_a_job() -> World:
    world = mended_dataset()
    world.cluster.delete(JOB)
    return world


def more_attempts() -> World:
    world = World()
    world.fail(exited(1), **FAILED_JOB)
    assert world.status["phase"] == "Failed"
    world.edit(backoffLimit=9)
    return world


def longer_deadline() -> World:
    """The run as a whole took an hour, its last Job a minute: two minutes are more, as long as that Job is there."""
    world = World(activeDeadlineSeconds=60)
    world.fail(said("Interrupted", "", 143), age=3600, **LATE)
    assert world.status["phase"] == "Failed"
    world.edit(activeDeadlineSeconds=120)
    return world


def refused_model() -> World:
    world = World()
    world.fail(said("UnsupportedModel", "a BertModel", 3), **FATAL_JOB)
    assert "nextRetryTime" in world.status
    return world


def mended_model() -> World:
    """Looked at again from time to time, until a ConfigMap is changed."""
    world = refused_model()
    world.config_map('{"prompt": "a", "completion": "b"}')
    return world


def new_secret() -> World:
    world = World()
    world.fail(said("AccessDenied", "401", 3), **FATAL_JOB)
    assert (world.status["phase"], "nextRetryTime" in world.status) == ("Waiting", True)
    world.secret("new")
    return world


def new_secret_without_a_job() -> World:
    world = new_secret()
    world.cluster.delete(JOB)
    return world


def mended_image() -> World:
    world = World()
    world.pod("first", world.first, phase="Pending", state=waiting("ErrImagePull", "not found"))
    world.passes(2)
    assert ("Ready", "False", "ImagePullBackOff") in [one[:3] for one in world.told()["conditions"]]
    world.settings = world.settings.model_copy(update={"trainer_image": "trainer:2"})
    return world


STORIES = (
    mended_dataset,
    mended_dataset_without_a_job,
    more_attempts,
    longer_deadline,
    mended_model,
    new_secret,
    new_secret_without_a_job,
    mended_image,
)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_kill_after_any_write_changes_nothing(story: Callable[[], World]) -> None:
    calm = story()
    before = len(calm.cluster.writes)
    calm.passes()
    assert (calm.status["phase"], len(calm.cluster.jobs)) == ("Running", 2)
    after = len(calm.cluster.writes)
    assert [verb for verb, _ in calm.cluster.writes[before:]].count("patch_status") == 3  # tried again, starts, runs
    for number in range(before + 1, after + 1):
        world = story()
        world.cluster.deadly = (number,)
        world.passes()
        assert (world.told(), len(world.cluster.jobs)) == (calm.told(), 2), calm.cluster.writes[number - 1]


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_kill_after_every_write_changes_nothing(story: Callable[[], World]) -> None:
    calm, world = story(), story()
    calm.passes()
    world.cluster.deadly = range(10_000)
    world.passes()
    assert (world.told(), len(world.cluster.jobs)) == (calm.told(), 2)


def test_a_kill_while_it_is_suspended_and_resumed_changes_nothing() -> None:
    """Meanwhile it waited for a look that is ten minutes away."""

    def resumed(deadly: Collection[int]) -> World:
        world = refused_model()
        world.cluster.deadly = deadly
        world.edit(suspend=True)
        world.passes()
        assert (world.status["phase"], JOB in world.cluster.objects) == ("Suspended", False)
        world.edit(suspend=False)
        world.passes()
        return world

    calm = resumed(())
    assert (calm.status["phase"], calm.status["retries"]) == ("Running", 1)
    for deadly in [*((number,) for number in range(1, len(calm.cluster.writes) + 1)), range(10_000)]:
        world = resumed(deadly)
        assert (world.told(), len(world.cluster.jobs)) == (calm.told(), 2), deadly


def test_a_status_that_cannot_be_written_costs_no_job() -> None:
    world = mended_dataset_without_a_job()
    world.passes(1)
    world.cluster.refuse["FineTuneJob"] = ClusterError(503, "ServiceUnavailable", "etcdserver: request timed out")
    with pytest.raises(ClusterError):
        world.passes(1)
    world.passes()
    assert (world.status["phase"], len(world.cluster.jobs)) == ("Running", 2)


def test_a_secret_that_is_changed_back_does_not_undo_the_try() -> None:
    world = new_secret()
    world.passes(1)
    world.secret("old")
    world.passes()
    assert (world.status["phase"], len(world.cluster.jobs)) == ("Running", 2)


def test_a_new_try_that_is_refused_is_told() -> None:
    """The user has mended the dataset: to go on reading of the old failure would tell nothing of the quota."""
    world = mended_dataset()
    world.passes(2)
    world.cluster.refuse["Job"] = ClusterError(403, "Forbidden", "exceeded quota: team")
    world.passes(1)
    said_now = {c["type"]: c["reason"] for c in world.status["conditions"]}
    assert said_now == {"Ready": "QuotaExceeded", "Reconciling": "QuotaExceeded"}
    world.passes()
    assert (world.status["phase"], len(world.cluster.jobs)) == ("Running", 2)
