"""The same work done twice: two operators at once, answers that get lost, an operator killed amid failures."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.kube.api import Api, Object, wait_for
from tests.kube.conftest import Operator, Start
from tests.kube.kubelet import Kubelet, exited, fail_job, fail_pod, finish_pod, make_pod, now, set_pod
from tests.kube.looking import Looking
from tests.kube.proxy import Proxy
from tests.kube.test_faults import apply_chain, chain_done, clear, digest_of, end_state
from tests.kube.test_life import JOB, started_pod, tune, until_job


def test_two_operators_do_what_one_does(api: Api, start: Start) -> None:
    """No lease: for a moment there may be two, and what they write is the same."""
    both = [start().until_ready(), start().until_ready()]
    apply_chain(api)
    with Kubelet(api, digest_of) as kubelet:
        wait_for("the chain's end", lambda: chain_done(api), 60)
    assert {name: len(uids) for name, uids in kubelet.jobs_seen.items()} == dict.fromkeys(kubelet.jobs_seen, 1)
    together = end_state(api)
    both[0].kill()
    clear(api)
    apply_chain(api)
    with Kubelet(api, digest_of):
        wait_for("the chain's end", lambda: chain_done(api), 60)
    assert end_state(api) == together
    assert both[1].healthy()


def test_the_answer_to_every_second_write_is_lost(api: Api, start: Start, proxy: Proxy) -> None:
    start().until_ready()
    proxy.after_write = lambda number: number % 2 == 1
    apply_chain(api)
    with Kubelet(api, digest_of) as kubelet:
        wait_for("the chain's end", lambda: chain_done(api), 60)
    assert all(len(uids) == 1 for uids in kubelet.jobs_seen.values()), kubelet.jobs_seen


def another_job(api: Api, first: Object) -> Object:
    """The Job that takes the place of the first one."""

    def another() -> Object | None:
        found = api.get("Job", JOB)
        return found if found and found["metadata"]["uid"] != first["metadata"]["uid"] else None

    found = wait_for("another Job", another, 60)
    assert found is not None
    return found


def refused_and_tried_again(api: Api) -> tuple[Object, list[str]]:
    """A refusal by the world, another Job, a fault of the pod's own, and a good end: the status, and the Jobs' uids."""
    api.create("Secret", "hub", stringData={"token": "old"})
    tune(api, base={"uri": "hf://org/m", "secretRef": {"name": "hub"}})
    first = until_job(api)
    fail_pod(api, started_pod(api, first), 1, "AccessDenied", "the token is refused")
    fail_job(api, JOB)
    api.until_reason("FineTuneJob", "tune", "AccessDenied", 40)
    api.patch("Secret", "hub", {"stringData": {"token": "new"}})
    second = another_job(api, first)
    broken = make_pod(api, second)
    set_pod(api, broken, "Failed", exited(1))
    wait_for("the failure", lambda: api.status("FineTuneJob", "tune")["lastFailure"]["reason"] == "InternalError", 40)
    finish_pod(api, started_pod(api, second, "a-second-pod"))
    status = api.until_phase("FineTuneJob", "tune", "Succeeded", 40)
    kept = {name: status[name] for name in ("phase", "artifact", "retries", "attempts", "source")}
    return kept, [first["metadata"]["uid"], api.need("Job", JOB)["metadata"]["uid"]]


@pytest.mark.slow
def test_killed_right_after_every_write_of_a_troubled_life(api: Api, start: Start, proxy: Proxy) -> None:
    operator = start().until_ready()
    undisturbed, uids = refused_and_tried_again(api)
    assert undisturbed["retries"] == 1
    assert len(set(uids)) == 2
    written = len([write for write in proxy.writes if not write.endswith("/events")])
    assert written >= 6
    for number in range(3, written + 1):  # before that it is the life of test_faults
        clear(api)
        api.delete("Secret", "hub")
        proxy.writes.clear()
        killer = Killer(operator, number)
        proxy.after_write = killer
        successor = ThreadPoolExecutor(1).submit(killer.replace, start)
        state, _ = refused_and_tried_again(api)
        proxy.after_write = lambda count: False
        assert killer.done.is_set(), f"write {number} never came"
        assert state == undisturbed, f"killed after write {number}"
        operator = successor.result(10)


def failed_and_allowed_more(api: Api, proxy: Proxy) -> tuple[Object, list[str]]:
    """A run that fails for good and is allowed more attempts: its status at the end, and what was done to its Job."""
    proxy.writes.clear()
    tune(api)
    first = until_job(api)
    fail_pod(api, started_pod(api, first), 1, "OutOfMemory", "it needed more")
    fail_job(api, JOB)
    api.until_phase("FineTuneJob", "tune", "Failed", 60)
    # Times are whole seconds: no Job fails in the one in which it was made.
    wait_for("the next second", lambda: now() > first["metadata"]["creationTimestamp"])
    api.patch("FineTuneJob", "tune", {"spec": {"backoffLimit": 9}})
    second = another_job(api, first)
    pod = started_pod(api, second)
    api.until_phase("FineTuneJob", "tune", "Running", 60)
    finish_pod(api, pod)
    status = api.until_phase("FineTuneJob", "tune", "Succeeded", 60)
    kept = {name: status[name] for name in ("phase", "artifact", "retries", "attempts", "source")}
    return kept, [write.split()[0] for write in proxy.writes if "/jobs/" in write]


@pytest.mark.slow
def test_operators_that_live_for_one_write_make_no_job_twice(api: Api, start: Start, proxy: Proxy) -> None:
    operator = start().until_ready()
    undisturbed = failed_and_allowed_more(api, proxy)
    assert undisturbed[1] == ["PATCH", "DELETE", "PATCH"]
    assert undisturbed[0]["retries"] == 1
    operator.kill()
    clear(api)
    with Undying(api, start, proxy) as operators:
        assert failed_and_allowed_more(api, proxy) == undisturbed
        assert operators.lives >= 7, proxy.writes
    proxy.after_write = lambda number: False


class Undying(Looking):
    """Operators, one after the other: each is killed right after its first write, and another one takes over."""

    def __init__(self, api: Api, start: Start, proxy: Proxy) -> None:
        super().__init__(api)
        self._start, self.lives = start, 0
        self._operator: Operator | None = None
        proxy.after_write = self._kill

    def look(self) -> None:
        """Start another one where none lives."""
        if self._operator is None or self._operator.process.poll() is not None:
            self.lives += 1
            self._operator = self._start()

    def _kill(self, number: int) -> bool:
        if self._operator is not None:
            self._operator.kill()
        return False


class Killer:
    """Kills the operator once, right after one write was carried out; its answer is lost."""

    def __init__(self, victim: Operator, number: int) -> None:
        self.victim, self.number, self.done = victim, number, threading.Event()

    def replace(self, start: Start) -> Operator:
        """The next operator, once this one is dead."""
        assert self.done.wait(90)
        return start()

    def __call__(self, count: int) -> bool:
        if count != self.number or self.done.is_set():
            return False
        self.victim.kill()
        self.done.set()
        return True
