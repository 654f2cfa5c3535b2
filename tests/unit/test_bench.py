"""The benchmark reads the metrics that the operator has."""

import pytest
from prometheus_client import generate_latest

from kit import bench
from slmops.handlers.metrics import Metrics


def parsed(metrics: Metrics) -> dict[str, float]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and line[0] != "#"}


def test_writes_are_counted_and_reads_are_not() -> None:
    metrics = Metrics()
    for verb, kind in (("get", "Job"), ("list", "Pod"), ("apply", "Job"), ("patch_status", "FineTuneJob")):
        metrics.on_call(verb, kind, 200, 0.01)
    for verb in ("create", "patch", "delete"):
        metrics.on_call(verb, "Event", 201, 0.01)
    assert bench.writes(parsed(metrics)) == 5


def test_an_operator_without_that_metric_is_no_operator_without_writes() -> None:
    with pytest.raises(SystemExit, match="slmops_api_requests_total"):
        bench.writes({"up": 1.0})
