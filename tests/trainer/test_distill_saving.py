"""Keeping what a teacher answered: in the checkpoint while it answers, and beside the output for later objects."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ask import ask, context
from asking import STORE, TEXTS, in_thread, saved, upper, wait_until
from fake_teacher import FakeTeacher, Fault, answer

from slmops_artifacts import ArtifactError, pull, push
from slmops_trainer import answers, checkpoints, generation, teacher
from slmops_trainer.context import Context
from slmops_trainer.failure import RunFailure
from slmops_trainer.replies import Reply


def test_asking_holds_while_the_store_takes_nothing(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "HOLD_SECONDS", 0.1)
    texts = [f"question {number}" for number in range(300)]
    down, up = threading.Event(), threading.Event()
    ctx = pod()
    save = ctx.checkpoints.save
    monkeypatch.setattr(ctx.checkpoints, "save", lambda **_: (down.set(), up.wait(60), save())[2])
    slow = lambda number, question, _: Fault(body=answer(upper(question)), wait=down) if number > 20 else None  # noqa: E731
    with FakeTeacher(upper, slow) as fake:
        thread, found = in_thread(lambda: ask(ctx, fake.url, texts))
        wait_until(lambda: ctx.board.progress.message.startswith("The store does not take the answers"))
        assert len(fake.requests) < len(texts)
        monkeypatch.setattr(generation, "HOLD_SECONDS", 60.0)
        up.set()
        thread.join(60)
        assert fake.asked == dict.fromkeys(texts, 1)
    assert found[0][1] == [text.upper() for text in texts]


def test_sigterm_saves_what_came_and_lets_requests_in_flight_finish(pod: Callable[[], Context], tmp_path: Path) -> None:
    gate = threading.Event()
    script = lambda number, *_: Fault(body=answer(f"answer {number}"), wait=gate) if number > 4 else None  # noqa: E731
    with FakeTeacher(upper, script) as fake:
        ctx = pod()
        thread, found = in_thread(lambda: ask(ctx, fake.url, TEXTS))
        fake.wait_for(8)  # four answered, four in flight
        ctx.stop.set()
        gate.set()
        thread.join(60)
        assert found[0].reason == "Interrupted"
        assert found[0].exit_code == 143
        assert saved(tmp_path) == 8
        _, texts = ask(pod(), fake.url, TEXTS)
        assert all(texts)
        assert fake.asked == dict.fromkeys(TEXTS, 1)


def test_sigterm_ends_the_waiting_for_a_store_that_is_away(
    pod: Callable[[], Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pod has a minute: what is in flight gets its seconds, the last save and the sharing what is left."""
    monkeypatch.setenv("SLMOPS_PLAIN_HTTP", "127.0.0.1:9")
    monkeypatch.setattr(generation, "SAVE_PATIENCE", 0.5)
    away, gate = "oci://127.0.0.1:9/away:tag", threading.Event()
    ctx = pod()
    ctx.spec = ctx.spec.model_copy(update={"output": away})
    waits: list[bool] = []
    publish = generation._Run._publish

    def counted(run: generation._Run, *, last: bool = False) -> str:
        ctx.checkpoints.uri = away
        waits.append(last)
        return publish(run, last=last)

    def share() -> float:
        with pytest.raises(RunFailure, match="cannot be reached") as caught:
            ask(ctx, fake.url, TEXTS)
        assert caught.value.reason == "StoreUnavailable"
        store = answers.Answers(ctx.checkpoints.folder / answers.PART)
        with ctx.told("Leaving answers", "store"):
            store.share(answers.shared(ctx, "answers"), patience=0.5)
        return len(store)

    monkeypatch.setattr(generation._Run, "_publish", counted)
    script = lambda number, *_: Fault(body=answer("late"), wait=gate) if number > 4 else None  # noqa: E731
    with FakeTeacher(upper, script) as fake:
        thread, found = in_thread(share)
        fake.wait_for(8)  # four answered, four in flight
        wait_until(lambda: len(waits) == 1)
        stopped = time.monotonic()
        ctx.stop.set()
        gate.set()
        thread.join(60)
        assert not thread.is_alive()
        assert time.monotonic() - stopped < 30  # not the five minutes of a run that nobody stops
    assert found == [8]  # those in flight came, too
    assert waits == [False, True]


def test_sigterm_ends_the_waiting_of_the_last_save(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLMOPS_PLAIN_HTTP", "127.0.0.1:9")
    monkeypatch.setattr(generation, "SAVE_SECONDS", 60.0)
    monkeypatch.setattr(generation, "SAVE_PATIENCE", 0.5)
    ctx = pod()
    ctx.checkpoints.load()
    ctx.checkpoints.uri = "oci://127.0.0.1:9/away:tag"
    with FakeTeacher(upper) as fake:
        thread, found = in_thread(lambda: ask(ctx, fake.url, TEXTS))
        wait_until(lambda: "Waits for the store" in caplog.text)
        ctx.stop.set()
        thread.join(30)
        assert not thread.is_alive()
    assert found[0].reason == "StoreUnavailable"
    assert len(answers.Answers(ctx.checkpoints.folder / answers.PART)) == len(TEXTS)


def test_a_store_that_lets_no_tag_be_replaced_ends_no_asking(
    pod: Callable[[], Context], tmp_path: Path, fixed_tags: list[None]
) -> None:
    def script(number: int, *_: object) -> None:
        if number > 6:
            wait_until(lambda: saved(tmp_path) > 0)

    with FakeTeacher(upper, script) as fake:
        _, texts = ask(pod(), fake.url, TEXTS)
        assert texts == [text.upper() for text in TEXTS]
        assert len(fixed_tags) > 1
        assert 0 < saved(tmp_path) < len(TEXTS)
        ctx = pod()
        ctx.stop.set()
        with pytest.raises(RunFailure, match="which the store refused: the registry refused") as caught:
            ask(ctx, fake.url, TEXTS)
    assert caught.value.reason == "Interrupted"


def test_a_registry_without_the_repository_ends_the_asking_at_the_first_save(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For it would not take the student either."""
    monkeypatch.setattr(generation, "SAVE_SECONDS", 0.1)
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0.4")
    ended = threading.Event()

    def lacking(*_: object, **__: object) -> None:
        raise ArtifactError("NoRepository", "the registry has no such repository. Create it there first.")

    monkeypatch.setattr(checkpoints, "push", lacking)
    script = lambda number, *_: Fault(body=answer("late"), wait=ended) if number > 4 else None  # noqa: E731
    with FakeTeacher(upper, script) as fake:
        with pytest.raises(RunFailure, match="Create it there first") as caught:
            ask(pod(), fake.url, TEXTS, concurrency=2, timeout=5.0)
        ended.set()
        assert caught.value.reason == "StoreUnavailable"
        assert len(fake.requests) <= 6  # four were answered, two are under way


def deny(monkeypatch: pytest.MonkeyPatch, denied: range) -> list[None]:
    """The store refuses the credentials of these pushes, counted from 1. One item for each that was tried."""
    pushes: list[None] = []

    def denying(*arguments: Any, **more: Any) -> Any:
        pushes.append(None)
        if len(pushes) in denied:
            raise ArtifactError("AccessDenied", "the store refused access (HTTP 401).")
        return push(*arguments, **more)

    monkeypatch.setattr(checkpoints, "push", denying)
    monkeypatch.setattr(generation, "STORE_PAUSE", 0.01)
    return pushes


def test_credentials_that_are_being_replaced_cost_no_answer(
    pod: Callable[[], Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushes = deny(monkeypatch, range(2, 4))

    def script(number: int, *_: object) -> None:
        if number > 4:
            wait_until(lambda: len(pushes) >= (4 if number > 8 else 1))

    with FakeTeacher(upper, script) as fake:
        _, texts = ask(pod(), fake.url, TEXTS)
        assert texts == [text.upper() for text in TEXTS]
        assert fake.asked == dict.fromkeys(TEXTS, 1)
    assert saved(tmp_path) == len(TEXTS)


@pytest.mark.parametrize("again", [False, True])
def test_a_pod_that_ends_while_credentials_are_replaced_tries_again(
    pod: Callable[[], Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """And was interrupted, whether the store takes them in time or not: that is no failure of the run."""
    ctx = pod()
    monkeypatch.setattr(generation, "SAVE_PATIENCE", 20.0 if again else 0.1)
    monkeypatch.setattr(generation, "LAST_PAUSE", 0.01)
    denied = [True]
    pushes: list[None] = []

    def denying(*arguments: Any, **more: Any) -> Any:
        pushes.append(None)
        if len(pushes) > 1 and denied:
            if ctx.stop.is_set() and again:
                denied.clear()
            raise ArtifactError("AccessDenied", "the store refused access (HTTP 401).")
        return push(*arguments, **more)

    monkeypatch.setattr(checkpoints, "push", denying)
    monkeypatch.setattr(generation, "STORE_PAUSE", 0.01)

    def script(number: int, *_: object) -> None:
        if number > 4:
            wait_until(lambda: len(pushes) > 0)
        if number > 8:
            wait_until(lambda: len(pushes) > 2)
            ctx.stop.set()

    with FakeTeacher(upper, script) as fake, pytest.raises(RunFailure) as caught:
        ask(ctx, fake.url, TEXTS)
    assert caught.value.reason == "Interrupted"
    assert (saved(tmp_path) >= 8) == again


@pytest.mark.parametrize(("taken", "patience"), [(0, 600.0), (1, 0.05)], ids=["from the first", "for long"])
def test_credentials_that_stay_refused_end_the_asking(
    pod: Callable[[], Context], monkeypatch: pytest.MonkeyPatch, taken: int, patience: float
) -> None:
    monkeypatch.setattr(generation, "ACCESS_PATIENCE", patience)
    pushes = deny(monkeypatch, range(taken + 1, 1000))

    def script(number: int, *_: object) -> None:
        if number > 4:
            wait_until(lambda: len(pushes) > 0)

    with FakeTeacher(upper, script) as fake, pytest.raises(RunFailure) as caught:
        ask(pod(), fake.url, TEXTS)
    assert caught.value.reason == "AccessDenied"


def test_a_killed_pod_has_to_ask_again_only_what_was_not_saved(pod: Callable[[], Context], tmp_path: Path) -> None:
    gate = threading.Event()
    script = lambda number, *_: Fault(body=answer("late"), wait=gate) if number > 6 else None  # noqa: E731
    with FakeTeacher(upper, script) as fake:
        order = {"pod": str(tmp_path / "killed"), "checkpoint": STORE, "url": fake.url, "texts": TEXTS}
        (tmp_path / "order.json").write_text(json.dumps(order))
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ask.py")), str(tmp_path / "order.json")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        fake.wait_for(10, 120)  # six answered, four in flight
        wait_until(lambda: saved(tmp_path) == 6)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        gate.set()
        fake.script = None
        _, texts = ask(pod(), fake.url, TEXTS)
    assert texts == [text.upper() for text in TEXTS]
    first = {request["messages"][-1]["content"] for request in fake.requests[:6]}
    in_flight = {request["messages"][-1]["content"] for request in fake.requests[6:10]}
    assert fake.asked == {text: 2 if text in in_flight else 1 for text in TEXTS}
    assert not first & in_flight


def test_many_saves_make_few_files(pod: Callable[[], Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MERGED", 4)
    store = answers.Answers(tmp_path / "answers")
    for number in range(26):
        store.add(f"key {number}", Reply(f"text\u2028{number}\r\n", "stop", 3))
        assert store.seal()
    assert not store.seal()
    names = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert names == ["huge-000021.jsonl", "large-000026.jsonl", "large-000031.jsonl", "small-000032.jsonl",
                     "small-000033.jsonl"]  # fmt: skip
    again = answers.Answers(tmp_path / "answers")
    assert len(again) == 26
    assert again.get("key 7") == Reply("text\u20287\r\n", "stop", 3)


def test_what_was_spent_in_vain_is_kept_and_is_no_answer(tmp_path: Path) -> None:
    store = answers.Answers(tmp_path / "answers")
    assert store.empty
    store.spend("key", 4)
    store.spend("key", 3)
    assert store.seal()
    again = answers.Answers(tmp_path / "answers")
    assert (again.empty, len(again), again.get("key"), again.spent("key")) == (False, 0, None, 7)


def test_a_disk_that_fills_up_spoils_no_answer(tmp_path: Path) -> None:
    store = answers.Answers(tmp_path / "answers")
    store.add("one", Reply("first", "stop", 3))
    used = sum(path.stat().st_size for path in (tmp_path / "answers").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (used + 20, limits[1]))  # as a full disk: a part of the line fits
    try:
        with pytest.raises(OSError, match="File too large"):
            store.add("two", Reply("second", "stop", 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.seal()
    again = answers.Answers(tmp_path / "answers")
    assert (again.get("one"), again.get("two")) == (Reply("first", "stop", 3), None)


def test_what_another_version_shared_is_ignored(pod: Callable[[], Context], tmp_path: Path) -> None:
    other = answers.shared(pod(), "answers")
    other.folder.mkdir()
    (other.folder / answers.SHARED).write_text('{"question": "who?"}\n')
    other.save()
    store = answers.Answers(tmp_path / "answers")
    store.recall(answers.shared(pod(), "answers"))
    assert store.get("who?") is None
    store.add("who", Reply("me", "stop", 1))
    store.share(answers.shared(pod(), "answers"))
    later = answers.Answers(tmp_path / "later")
    later.recall(answers.shared(pod(), "answers"))
    assert later.get("who") == Reply("me", "stop", 1)


def test_objects_that_ask_at_the_same_time_leave_the_answers_of_all(pod: Callable[[], Context], tmp_path: Path) -> None:
    stores = [answers.Answers(tmp_path / name) for name in ("one", "two", "three")]
    for store in stores:
        store.recall(answers.shared(pod(), "answers"))
    for number, store in enumerate(stores):
        store.add("of all", Reply("same", "stop", 1))
        store.add(f"of {number}", Reply(f"text {number}", "stop", 1))
    for store in stores:
        store.share(answers.shared(pod(), "answers"))
    later = answers.Answers(tmp_path / "later")
    later.recall(answers.shared(pod(), "answers"))
    assert later.get("of all") == Reply("same", "stop", 1)
    assert [later.get(f"of {number}") for number in range(3)] == [
        Reply(f"text {number}", "stop", 1) for number in range(3)
    ]
    assert later.recalled == 4
    lines = (tmp_path / "store/out-answers/answers.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_answers_of_earlier_objects_lie_on_the_disk_until_they_are_asked_for(
    pod: Callable[[], Context], tmp_path: Path
) -> None:
    store = answers.Answers(tmp_path / "store")
    texts = {f"key {number}": f"{number}\u2028ä" * 30_000 for number in range(50)}
    for key, text in texts.items():
        store.add(key, Reply(text, "stop", 1))
    store.share(answers.shared(pod(), "answers"))
    later = answers.Answers(tmp_path / "later")
    tracemalloc.start()
    try:
        later.recall(answers.shared(pod(), "answers"))
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
    for key in ("key 7", "key 0", "key 49"):
        assert later.get(key) == Reply(texts[key], "stop", 1)
    assert (len(later), later.recalled) == (3, 3)


def test_answers_that_an_earlier_object_paid_for_cost_no_budget(pod: Callable[[], Context], tmp_path: Path) -> None:
    with FakeTeacher(upper) as fake:
        first = pod()
        ask(first, fake.url, TEXTS[:3])
        answers.Answers(first.checkpoints.folder / answers.PART).share(answers.shared(pod(), "answers"))
        for number in range(2):  # the second pod finds them among its own
            later = context(tmp_path / f"later-{number}", "pvc://store/later")
            outcome, texts = ask(later, fake.url, TEXTS, recall=True, budget=20, concurrency=1)
            assert (outcome.tokens, outcome.unasked) == (21, 6)
            assert texts == [text.upper() for text in TEXTS[:6]] + [None] * 6
            assert answers.Answers(later.checkpoints.folder / answers.PART).recalled == 3
    assert fake.asked == dict.fromkeys(TEXTS[:6], 1)


@pytest.mark.parametrize(
    ("output", "uri"),
    [
        ("oci://reg:5000/ns/distillationjob-x:0123abcd", "oci://reg:5000/ns/distillationjob-x:slmops-answers"),
        ("oci://reg/x", "oci://reg/x:slmops-answers"),
        ("pvc://models/x/", "pvc://models/x-answers"),
    ],
)
def test_answers_are_shared_by_the_objects_of_one_output(tmp_path: Path, output: str, uri: str) -> None:
    ctx = context(tmp_path / "pod", STORE)
    ctx.spec = ctx.spec.model_copy(update={"output": output})
    assert answers.shared(ctx, "answers").uri == uri


def test_checkpoints_hold_whole_chunks_only(pod: Callable[[], Context], tmp_path: Path) -> None:
    with FakeTeacher(upper) as fake:
        ask(pod(), fake.url, TEXTS)
    pull(STORE, tmp_path / "pulled")
    chunks = (tmp_path / "pulled/generation").glob("*.jsonl")
    lines = [line for path in chunks for line in path.read_text().splitlines()]
    assert sorted(json.loads(line)["text"] for line in lines) == sorted(text.upper() for text in TEXTS)
