"""The demo's closing table, its bars and its view of the chain."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from demo import pods, report, run, show
from demo.bench import sizes
from demo.show import CHAIN, Board, row
from kit.kubectl import Kubectl
from kit.load import Count, Load


def bench(**changes: dict[str, Any]) -> dict[str, Any]:
    """Figures in which every bar is met; `changes` by model."""
    models: dict[str, Any] = {}
    for name, share, seconds, memory, files in (
        ("teacher", 0.98, 0.070, 42e6, 41e6),
        ("student", 0.96, 0.012, 4.8e6, 4.6e6),
        ("tuned", 0.95, 0.012, 4.8e6, 4.6e6),
        ("int4", 0.94, 0.008, 1.1e6, 0.9e6),
    ):
        models[name] = {
            "accuracy": {"known": share, "new": share, "security_known": 0.9, "security_new": 0.9},
            "latency_seconds": seconds,
            "one_token_seconds": seconds / 4,
            "weight_bytes": files * 0.9,
            "kv_bytes": memory * 0.1,
            "tokens_per_second": 26 / seconds,
            "model_memory_bytes": memory,
            "file_bytes": files,
            "rounds": [{"latency_seconds": seconds}, {"latency_seconds": seconds * 1.1}],
        } | changes.get(name, {})
    return {"models": models}


def test_the_json_has_exactly_the_promised_keys() -> None:
    found = report.figures(bench(), 300, 0)
    assert set(found) == {"teacher", "student", "tuned", "int4", "canary"}
    keys = {"accuracy", "teacher_share", "latency_seconds", "tokens_per_second", "model_memory_bytes", "file_bytes"}
    assert all(set(found[name]) == keys for name in report.ORDER)
    assert found["canary"] == {"sent": 300, "lost": 0}
    assert found["teacher"]["teacher_share"] == 1


def met(measured: dict[str, Any], sent: int = 300, lost: int = 0) -> list[bool]:
    return [bar.met for bar in report.bars(measured, report.figures(measured, sent, lost), ("503",))]


def test_all_bars_are_met_by_good_figures() -> None:
    assert met(bench()) == [True] * 6


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"accuracy": {"known": 0.9, "new": 0.88, "security_known": 1, "security_new": 1}}, 0),
        ({"latency_seconds": 0.011}, 1),
        ({"model_memory_bytes": 2.2e6}, 2),
        ({"file_bytes": 1.2e6}, 3),
    ],
)
def test_each_bar_is_missed_by_its_own_figure_and_says_why(change: dict[str, Any], missed: int) -> None:
    measured = bench(int4=change)
    found = report.bars(measured, report.figures(measured, 300, 0), ())
    assert [index for index, bar in enumerate(found) if not bar.met] == [missed]
    assert "because: " in "\n".join(report.verdicts(found))


def test_a_label_that_was_hardly_learnt_misses_its_bar() -> None:
    assert (
        met(bench(tuned={"accuracy": {"known": 0.95, "new": 0.95, "security_known": 0.9, "security_new": 0.8}}))[5]
        is False
    )


def test_a_missed_accuracy_names_the_step_that_lost_most() -> None:
    worse = {"known": 0.9, "new": 0.7, "security_known": 0.9, "security_new": 0.9}
    measured = bench(student={"accuracy": worse}, tuned={"accuracy": worse}, int4={"accuracy": worse})
    found = report.bars(measured, report.figures(measured, 300, 0), ())
    assert not found[0].met
    assert "most was lost in distillation, 18.0 points" in found[0].reason
    assert "new phrasings 98.0% -> 70.0%" in found[0].reason


def test_lost_requests_say_what_came_back() -> None:
    measured = bench()
    found = report.bars(measured, report.figures(measured, 300, 1), ("12:00:00 ValueError: status 503",))
    assert "status 503" in "\n".join(report.verdicts(found))


@pytest.mark.parametrize(("sent", "lost"), [(300, 1), (0, 0)])
def test_a_lost_request_or_no_traffic_misses_the_canarys_bar(sent: int, lost: int) -> None:
    assert met(bench(), sent, lost)[4] is False


def test_the_table_has_a_line_for_each_model() -> None:
    lines = report.table(bench(), report.figures(bench(), 1, 0))
    assert [line.split()[0] for line in lines if line and line.split()[0] in report.ORDER] == list(report.ORDER)


def test_memory_counts_weights_and_the_cache_of_one_answer(tmp_path: Any) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x" * 100)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 1000)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 10)
    (tmp_path / ".slmops-complete").write_bytes(b"x" * 5)
    decoder = {"num_hidden_layers": 2, "num_key_value_heads": 3, "head_size": 16}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    found = sizes(tmp_path, 50)
    assert found["model_memory_bytes"] == 1100 + 2 * 2 * 3 * 16 * 50 * 4
    assert found["file_bytes"] == 1110 + (tmp_path / "genai_config.json").stat().st_size


def job(**status: Any) -> dict[str, Any]:
    metadata = {"name": "teacher", "generation": 2}
    return {"kind": "FineTuneJob", "metadata": metadata, "status": {"observedGeneration": 2, **status}}


def condition(name: str) -> dict[str, str]:
    return {"type": name, "status": "True", "message": "what happened"}


def test_a_row_tells_ready_stalled_and_how_long() -> None:
    begun = {"startTime": "2026-01-01T00:00:00Z"}
    now = 1767225600.0 + 90
    running = row("FineTuneJob", "teacher", "", job(phase="Running", **begun), now)
    assert (running.ready, running.stalled, running.seconds, running.moving) == (False, False, 90, True)
    done = {**begun, "completionTime": "2026-01-01T00:01:00Z", "conditions": [condition("Ready")]}
    assert row("FineTuneJob", "teacher", "", job(**done), now).ready
    assert row("FineTuneJob", "teacher", "", job(**done), now).seconds == 60
    failed = row("FineTuneJob", "teacher", "", job(conditions=[condition("Stalled")]), now)
    assert (failed.stalled, failed.detail) == (True, "what happened")
    assert row("FineTuneJob", "teacher", "", None, now).phase == "absent"


def test_conditions_of_an_older_generation_do_not_count() -> None:
    old = job(observedGeneration=1, conditions=[condition("Ready")])
    assert not row("FineTuneJob", "teacher", "", old, 0).ready


def test_off_a_terminal_a_state_is_told_once() -> None:
    stream = io.StringIO()
    board = Board(stream)
    waiting = row("FineTuneJob", "teacher", "", job(phase="Waiting"), 0)
    for _ in range(3):
        board.show([waiting], "the chain")
    assert stream.getvalue().count("FineTuneJob/teacher") == 1
    assert stream.getvalue().count("the chain") == 1
    board.show([row("FineTuneJob", "teacher", "", job(phase="Running"), 0)], "the chain")
    assert stream.getvalue().count("FineTuneJob/teacher") == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_no_line_is_wider_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "5")
    stream = Terminal()
    board = Board(stream)
    noisy = job(phase="Running", conditions=[{**condition("Stalled"), "message": "far\ttoo\x1b[2J long\n" * 40}])
    for _ in range(2):
        board.show([row("FineTuneJob", "teacher", "", noisy, 0)] * 9, "the chain " * 20)
    lines = stream.getvalue().split("\n")
    assert len(lines) == 2 * 4 + 1
    assert all(len(line.replace("\x1b[4F", "").replace("\x1b[J", "")) < 60 for line in lines)
    assert "\x1b[2J" not in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Board(stream).show([row("FineTuneJob", "teacher", "", job(phase="Running"), 0)], "the chain")
    assert "\x1b" not in stream.getvalue()


def test_off_a_terminal_a_count_that_grows_is_not_worth_a_line() -> None:
    stream = io.StringIO()
    board = Board(stream)
    for count in range(3):
        board.show([], f"step 1; {count} requests", key="step 1")
    assert stream.getvalue().count("step 1") == 1


def test_the_code_fits_a_config_map_and_finds_its_files() -> None:
    code = pods.code()["data"]
    assert sum(len(text.encode()) for text in code.values()) < 900_000
    made = pods.pod("seed", "image", "demo.seed", "oci://r/demo", env={"A": "b"})["spec"]
    items = next(volume["configMap"]["items"] for volume in made["volumes"] if "configMap" in volume)
    assert {item["key"] for item in items} == set(code)
    assert {"name": "A", "value": "b"} in made["containers"][0]["env"]


def logging(tmp_path: Path, line: str) -> Kubectl:
    """kubectl whose pods' logs end with `line`."""
    file = tmp_path / "kubectl"
    file.write_text(f"#!/bin/sh\necho {line}\n")
    file.chmod(0o755)
    kube = Kubectl("slmops-demo", current=True)
    kube.program = str(file)
    return kube


def test_a_running_step_has_the_newest_line_of_its_log(tmp_path: Path) -> None:
    running = row("FineTuneJob", "teacher", "", job(phase="Running", startTime="2026-01-01T00:00:00Z"), 1767225600.0)
    heart = run.Heart(logging(tmp_path, "step 7 of 9"))
    assert heart.beat(running).detail.endswith("step 7 of 9")
    heart.kube = logging(tmp_path, "step 8 of 9")
    assert heart.beat(running).detail.endswith("step 7 of 9"), "not read again within a few seconds"
    waiting = row("FineTuneJob", "tuned", "", job(phase="Waiting"), 0)
    assert heart.beat(waiting) == waiting


def test_results_are_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    run.write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        run.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["demo.json"]


def test_what_was_measured_is_shown_also_when_it_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "demo-details.part")

    monkeypatch.setattr(run, "write_json", full)
    with pytest.raises(run.DemoError, match="No space left on device"):
        run.close(Board(), bench(), Count(300, 0, 9.0, (), final=True), [])
    assert "no request lost in the canary" in capsys.readouterr().out


def test_off_a_terminal_what_holds_all_up_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    board = Board(stream)
    crashing = row("ModelDeployment", "teacher", "", job(phase="Preparing"), 0)
    waiting = row("FineTuneJob", "student", "", job(phase="Waiting"), 0)
    board.show([crashing, waiting])
    board.show([crashing, waiting])
    assert stream.getvalue().count("ModelDeployment/teacher") == 1, "not before it was quiet for long"
    monkeypatch.setattr(show, "PLAIN_SECONDS", 0.0)
    board.show([crashing, waiting])
    assert stream.getvalue().count("ModelDeployment/teacher") == 2
    assert stream.getvalue().count("FineTuneJob/student") == 1
    board.show([waiting])
    assert stream.getvalue().count("FineTuneJob/student") == 2, "it waits for nothing that is shown"


class Emptied(Kubectl):
    """A cluster with the chain's objects by uid; they are others, or gone, at the second look."""

    def __init__(self, *uids: str) -> None:
        super().__init__("slmops-demo", current=True)
        self.uids = list(uids)

    def run(self, *args: str, stdin: str | None = None, timeout: float = 60.0) -> str:
        if args[0] != "get" or not self.uids:
            return ""
        uid = self.uids.pop(0)
        found = [{"kind": kind, "metadata": {"name": name, "uid": uid}} for kind, name, _ in CHAIN if uid]
        return json.dumps({"items": found})


@pytest.mark.parametrize("later", ["", "2"])
def test_a_chain_that_somebody_removes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, later: str) -> None:
    monkeypatch.setattr(run.time, "sleep", lambda _seconds: None)
    with pytest.raises(run.DemoError, match="FineTuneJob/teacher was removed"):
        run.run_chain(Emptied("", "1", "1", later), Board(io.StringIO()))


def test_a_deployment_that_somebody_removes_ends_the_canary() -> None:
    kube = Emptied()
    with pytest.raises(run.DemoError, match="ModelDeployment/assistant was removed"):
        run.promoted(kube, Board(io.StringIO()), Load(kube), "sha256:x")


READY = {"SLMOPS_STORE": "oci://slmops-registry.slmops-system.svc:5000", "SLMOPS_PROMETHEUS_URL": "http://prometheus"}


@pytest.mark.parametrize("watched", ["", "slmops-demo", "team-a,slmops-demo"])
def test_an_operator_that_watches_the_demos_namespace_serves_it(watched: str) -> None:
    assert run.fit({**READY, "SLMOPS_NAMESPACES": watched})


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "make install"),
        ({**READY, "SLMOPS_STORE": "oci://other"}, "no store.url"),
        ({**READY, "SLMOPS_PROMETHEUS_URL": ""}, "prometheus.bundled.enabled=true"),
        ({**READY, "SLMOPS_NAMESPACES": "team-a"}, "Add it to watchNamespaces"),
    ],
)
def test_an_operator_that_cannot_serve_the_demo_is_told_at_once(settings: dict[str, str], remedy: str) -> None:
    with pytest.raises(run.DemoError, match=remedy):
        run.fit(settings)
