"""The process: exit status, termination message, /progress and /metrics, SIGTERM; and the small parts around it."""

import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_teacher import FakeTeacher
from safetensors import SafetensorError
from tiny import chat, task

from slmops.api.meta import Ancestor, Artifact
from slmops.api.run import RunResult
from slmops_artifacts import ArtifactError
from slmops_trainer import cpus, main, progress, result
from slmops_trainer.failure import RunFailure, from_artifact, translate
from slmops_trainer.progress import Board, Stage, serve


class Pod:
    """A trainer process with its own scratch folder and termination log."""

    def __init__(self, tmp_path: Path, spec: Any, name: str = "pod") -> None:
        self.log = tmp_path / f"{name}.termination"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.output = (tmp_path / f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slmops_trainer"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "SLMOPS_RUN": spec if isinstance(spec, str) else json.dumps(spec),
                "SLMOPS_WORK": str(tmp_path / f"{name}-work"),
                "SLMOPS_TERMINATION_LOG": str(self.log),
                "SLMOPS_METRICS_PORT": str(self.port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def until(self, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a state of /progress; fails when the process ends first or a minute has passed."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.said()
            try:
                progress: dict[str, Any] = json.loads(self.get("/progress"))
            except OSError:
                continue
            if ready(progress):
                return progress
        raise AssertionError(f"not in time: {self.said()}")

    def end(self) -> tuple[int, dict[str, Any]]:
        code = self.process.wait(timeout=120)
        return code, json.loads(self.log.read_text()) if self.log.exists() else {}

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    started: list[Pod] = []

    def start(spec: Any) -> Pod:
        started.append(Pod(tmp_path, spec, f"pod-{len(started)}"))
        return started[-1]

    yield start
    for pod in started:
        pod.process.kill()
        pod.process.wait()
        pod.output.close()


def run_spec(tiny_model: Path, dataset: str, **training: Any) -> dict[str, Any]:
    return {
        "namespace": "ml", "name": "tune", "uid": "u-1", "model": {"uri": f"file://{tiny_model}"},
        "output": "pvc://store/out", "checkpoint": "pvc://store/checkpoint",
        "finetune": {
            "method": "full", "base": {"uri": "pvc://data/base"}, "dataset": {"uri": dataset},
            "training": {"learningRate": 1e-3, "batchSize": 8, **training},
        },
    }  # fmt: skip


def test_terminated_killed_and_resumed_the_weights_are_those_of_an_undisturbed_run(
    pods: Callable[..., Pod], tiny_model: Path, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    dataset = jsonl([chat(*row) for row in task()])
    spec = run_spec(tiny_model, dataset, maxSteps=200, checkpoint={"everySeconds": 5})
    first = pods(spec)
    seen = first.until(lambda progress: progress["stage"] == "Training" and progress["step"] >= 3)
    assert seen["totalSteps"] == 200
    assert 0 < seen["percent"] < 100
    assert "tokens/s" in seen["message"]
    metrics = first.get("/metrics")
    assert 'slmops_run_live{name="loss"}' in metrics
    assert "process_resident_memory_bytes" in metrics
    first.process.send_signal(signal.SIGTERM)
    code, said = first.end()
    assert (code, said["reason"]) == (143, "Interrupted")
    assert "the checkpoint is written" in said["message"]
    second = pods(spec)
    second.until(lambda progress: progress["stage"] == "Training" and progress["step"] > seen["step"])
    second.process.kill()
    second.process.wait()
    assert not second.log.exists()
    code, said = pods(spec).end()
    assert code == 0
    assert said["succeeded"] is True
    assert said["metrics"]["steps"] == 200
    assert said["artifact"]["uri"] == "pvc://store/out"
    calm = {**spec, "uid": "u-2", "output": "pvc://store/calm", "checkpoint": "pvc://store/calm-checkpoint"}
    assert pods(calm).end()[0] == 0
    assert (tmp_path / "store/out/model.safetensors").read_bytes() == (
        tmp_path / "store/calm/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("spec", "reason", "message"),
    [
        ("", "BadSpec", "SLMOPS_RUN is not set"),
        ("{", "BadSpec", "SLMOPS_RUN cannot be read"),
        ('{"namespace": "a"}', "BadSpec", "name: Field required"),
        (
            {"namespace": "a", "name": "b", "uid": "c", "model": {"uri": "x"}, "output": "o", "checkpoint": "p"},
            "BadSpec",
            "one of distill, finetune and quantize must be set",
        ),
    ],
)
def test_a_bad_spec_ends_at_once_and_for_good(pods: Callable[..., Pod], spec: Any, reason: str, message: str) -> None:
    code, said = pods(spec).end()
    assert (code, said["succeeded"], said["reason"]) == (3, False, reason)
    assert message in said["message"]


EVALUATION = {"dataset": {"uri": "pvc://data/x"}, "metrics": ["rougeL"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"evaluation": {**EVALUATION, "thresholds": {"exactMatch": 0.5}}},
            "names exactMatch, which .* does not measure",
        ),
        ({"training": {"earlyStopping": {"patience": 1, "everySteps": 1}}}, "earlyStopping needs an evaluation set"),
    ],
)
def test_what_the_spec_alone_shows_to_fail_costs_nothing(
    tiny_model: Path, change: dict[str, Any], message: str
) -> None:
    spec = run_spec(tiny_model, "pvc://data/x")
    spec["finetune"] |= change
    with pytest.raises(RunFailure, match=message) as caught:
        main.read_spec({"SLMOPS_RUN": json.dumps(spec)})
    assert caught.value.reason == "BadSpec"


def test_a_bad_dataset_is_known_before_the_model_is_pulled(
    pods: Callable[..., Pod], tiny_model: Path, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    pod = pods(run_spec(tiny_model, jsonl([{"question": "q"}])))
    code, said = pod.end()
    assert (code, said["reason"]) == (3, "BadDataset")
    assert "it has 'question'" in said["message"]
    assert "Traceback" not in pod.said()
    assert not (tmp_path / "pod-0-work/base").exists()


def test_a_gpu_that_is_asked_for_and_not_seen_ends_the_run_at_once(
    pods: Callable[..., Pod], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default image would train on the CPU for days, beside a GPU that nobody else gets."""
    monkeypatch.setenv("SLMOPS_GPU", "nvidia.com/gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, said = pods(run_spec(tiny_model, "pvc://nowhere/x")).end()
    assert (code, said["reason"]) == (3, "BadSpec")
    assert "asks for nvidia.com/gpu" in said["message"]
    assert "spec.pod.image" in said["message"]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, jsonl: Callable[..., str]) -> dict[str, Any]:
    """A run whose base model lies on a Hub that takes no connection."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    spec = run_spec(tiny_model, jsonl([chat(*row) for row in task()]))
    return {**spec, "model": {"uri": "hf://org/base"}}


def test_a_source_that_is_away_is_waited_for_and_costs_one_pod(
    pods: Callable[..., Pod], away: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMOPS_RETRY_SECONDS", "3")
    pod = pods(away)
    seen = pod.until(lambda progress: "Waits" in progress.get("message", ""))
    assert seen["message"].startswith("Waits for the source: hf://org/base")
    code, said = pod.end()
    assert (code, said["reason"]) == (3, "SourceUnavailable")  # 3: no other pod of this Job
    assert "Check the host, DNS" in said["message"]


def test_waiting_ends_when_the_pod_is_asked_to_stop(pods: Callable[..., Pod], away: dict[str, Any]) -> None:
    pod = pods(away)
    pod.until(lambda progress: "Waits" in progress.get("message", ""))
    pod.process.send_signal(signal.SIGTERM)
    code, said = pod.end()  # far sooner than the five minutes of waiting
    assert (code, said["reason"]) == (143, "Interrupted")


def test_the_log_tells_of_no_request_and_so_of_no_key_in_a_url(
    pods: Callable[..., Pod], tiny_model: Path, jsonl: Callable[..., str]
) -> None:
    """With a store on a volume nothing but the teacher is spoken to over HTTP."""
    questions = [question for question, _ in task()][:8]
    with FakeTeacher(dict(task()).__getitem__) as fake:
        spec = run_spec(tiny_model, "")
        del spec["finetune"]
        spec["teacher"] = {"url": f"{fake.url}?key=s3cret", "model": "big"}
        spec["distill"] = {
            "teacher": {"endpoint": {"url": fake.url, "model": "big"}},
            "student": {"uri": "pvc://data/base"},
            "taskType": "extraction",
            "data": {"prompts": {"uri": jsonl([{"prompt": question} for question in questions])}},
            "training": {"maxSteps": 1, "learningRate": 1e-3, "batchSize": 8},
        }
        pod = pods(spec)
        code, said = pod.end()
    assert code == 0, said
    assert sum(fake.asked.values()) == len(questions)
    assert "Run succeeded" in pod.said()
    assert not re.search("s3cret|HTTP Request", pod.said())


def big(lineage: int, metrics: int, message: str = "") -> RunResult:
    return RunResult(
        succeeded=True,
        message=message,
        artifact=Artifact(uri="oci://r/" + "a" * 200, digest="sha256:" + "0" * 64, size_bytes=1),
        lineage=[
            Ancestor(kind="model", uri=f"oci://r/{at}", digest=f"sha256:{at:064}", name=f"n{at}")
            for at in range(lineage)
        ],
        metrics={f"metric_{at}": at / 3 for at in range(metrics)},
    )


@pytest.mark.parametrize(
    ("lineage", "metrics", "message"),
    [(2, 5, ""), (64, 5, ""), (3, 500, ""), (64, 500, "ü" * 1000), (1, 0, "x" * 9000), (9, 9, "\n" * 3000)],
)
def test_the_termination_message_fits_and_keeps_what_matters(lineage: int, metrics: int, message: str) -> None:
    body = result.encode(big(lineage, metrics, message))
    assert len(body) <= 4096
    kept = RunResult.model_validate_json(body)
    assert kept.artifact == big(0, 0).artifact
    assert [row.name for row in kept.lineage] == [f"n{at}" for at in range(len(kept.lineage))]
    assert list(kept.metrics) == [f"metric_{at}" for at in range(len(kept.metrics))]
    assert len(kept.lineage) >= min(lineage, 2)
    if (
        len(message) <= 1000
        and len(big(lineage, metrics, message).model_dump_json(by_alias=True, exclude_none=True).encode()) <= 4096
    ):
        assert kept == big(lineage, metrics, message)


def test_metrics_that_json_cannot_say_are_left_out() -> None:
    body = result.encode(RunResult(succeeded=True, metrics={"a": float("nan"), "b": float("inf"), "c": 1.0}))
    assert json.loads(body)["metrics"] == {"c": 1.0}


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (MemoryError(), "OutOfMemory", 3),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemory", 3),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "OutOfMemory", 3),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "OutOfMemory", 3),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "OutOfMemory", 3),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "DiskFull", 1),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "DiskFull", 1),
        (RuntimeError("something else"), "InternalError", 1),
        (RunFailure("Interrupted", "x", retryable=True), "Interrupted", 143),
        (ArtifactError("AccessDenied", "no"), "AccessDenied", 3),
        (ArtifactError("SourceUnavailable", "no"), "SourceUnavailable", 3),
        (ArtifactError("DiskFull", "no"), "DiskFull", 1),
        (ArtifactError("UnsupportedFormat", "no"), "UnsupportedModel", 3),
    ],
)
def test_every_error_has_a_name_and_an_exit_status(error: BaseException, reason: str, code: int) -> None:
    failure = translate(error)
    assert (failure.reason, failure.exit_code) == (reason, code)
    assert ("new object" in failure.message) == (reason == "OutOfMemory")  # neither memory nor recipe can be changed


def test_an_unreachable_store_is_told_from_an_unreachable_source() -> None:
    assert from_artifact(ArtifactError("SourceUnavailable", "x"), writing=True).reason == "StoreUnavailable"
    for error in (ArtifactError("Refused", "x"), ArtifactError("NoRepository", "x")):
        assert from_artifact(error, writing=True).reason == "StoreUnavailable"


def test_percent_and_eta_follow_the_plan() -> None:
    now = [0.0]
    board = Board(lambda: now[0])
    board.plan([Stage("A", 1), Stage("B", 8), Stage("C", 1)])
    board.report("A", 1, 1)
    assert board.progress.percent == 10
    board.report("B", 0, 100)
    now[0] = 20.0
    board.report("B", 50, 100)
    assert board.progress.percent == 50
    assert board.progress.eta_seconds == 20 + 5  # half of B, and C, an eighth of B
    board.report("B", 0, 100)
    assert board.progress.percent == 50  # never backwards
    board.report("C", 1, 1, "x" * 1000)
    assert board.progress.percent == 99
    assert len(board.progress.message) == 512


def test_progress_is_told_over_ipv4_and_ipv6() -> None:
    with serve(Board(), 0) as server:
        for host in ("127.0.0.1", "::1"):
            connection = http.client.HTTPConnection(host, server.server_address[1], timeout=10)
            connection.request("GET", "/progress")
            assert json.loads(connection.getresponse().read())["stage"] == "Starting"
        server.shutdown()


def test_connections_that_say_nothing_are_few_and_short_and_keep_nobody_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else any pod could take the files and the memory of a run that trains, or blind its operator."""
    monkeypatch.setattr(progress, "CONNECTION_SECONDS", 60.0)
    with serve(Board(), 0) as server, ExitStack() as stack:
        address = ("127.0.0.1", server.server_address[1])
        silent = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(24)]
        last = silent[-1]
        last.sendall(b"GET /prog")
        assert {connection.recv(1) for connection in silent[: -progress.CONNECTIONS]} == {b""}
        connection = http.client.HTTPConnection(*address, timeout=10)
        connection.request("GET", "/progress")
        assert json.loads(connection.getresponse().read())["stage"] == "Starting"
        last.settimeout(0)
        with pytest.raises(BlockingIOError):
            last.recv(1)
        last.settimeout(20)
        monkeypatch.setattr(progress, "CONNECTION_SECONDS", 0.1)
        assert {connection.recv(1) for connection in silent} == {b""}
        server.shutdown()


@pytest.mark.parametrize(
    ("error", "noise"), [(BrokenPipeError(), False), (ConnectionResetError(), False), (KeyError("x"), True)]
)
def test_a_client_that_hangs_up_leaves_no_trace(
    capsys: pytest.CaptureFixture[str], error: Exception, noise: bool
) -> None:
    with serve(Board(), 0) as server:
        try:
            raise error
        except (OSError, KeyError):
            server.handle_error(socket.socket(), ("10.0.0.1", 1))
        server.shutdown()
    assert ("Traceback" in capsys.readouterr().err) is noise


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({}, None),
    ],
)
def test_threads_follow_the_cgroup(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    allowed = len(os.sched_getaffinity(0))
    assert cpus.limit(tmp_path) == (allowed if expected is None else min(allowed, expected))
