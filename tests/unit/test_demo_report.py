"""The demo's closing table, its bars and its view of the chain."""

import io
import json
from typing import Any

import pytest

from demo import pods, report
from demo.bench import sizes
from demo.show import Board, row


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
    return [bar.met for bar in report.bars(report.figures(measured, sent, lost), 0.9)]


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
    found = report.bars(report.figures(bench(int4=change), 300, 0), 0.9)
    assert [index for index, bar in enumerate(found) if not bar.met] == [missed]
    assert "because: " in "\n".join(report.verdicts(found))


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


def test_the_code_fits_a_config_map_and_the_pods_are_restricted() -> None:
    assert sum(len(text.encode()) for text in pods.code()["data"].values()) < 900_000
    made = pods.pod("seed", "image", "demo.seed", "oci://r/demo", env={"A": "b"})["spec"]
    assert made["securityContext"]["runAsNonRoot"] is True
    assert made["automountServiceAccountToken"] is False
    context = made["containers"][0]["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
