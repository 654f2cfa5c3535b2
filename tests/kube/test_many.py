"""A thousand objects of the four kinds: the operator settles, then rests, and a restart changes nothing."""

import time
from pathlib import Path
from typing import Any

import pytest
from tests.kube.api import Api, Object, wait_for
from tests.kube.conftest import Operator, Start
from tests.kube.proxy import Proxy

from slmops.api.times import stamp
from slmops.reconcile.driver import utc_now

pytestmark = pytest.mark.slow

KINDS = ("DistillationJob", "FineTuneJob", "QuantizedModel", "ModelDeployment")
EACH = 250
CHAIN = 10  # objects of which each waits for the one before
SETTLE_SECONDS, RESTART_SECONDS = 240.0, 120.0  # measured alone: 50 and 30, of which most is the API server's work
DATA: Object = {"uri": "oci://r/data:1"}
MODEL: Object = {"uri": "hf://org/model", "secretRef": {"name": "missing"}}


def spec(kind: str, number: int) -> Object:
    """Waiting for a source in chains, for a Secret, suspended; by kind and number."""
    if kind == "FineTuneJob":
        before = f"chain-{number - 1}" if number % CHAIN else "never"
        return {"base": {"ref": {"kind": "FineTuneJob", "name": before}}, "dataset": DATA}
    if kind == "DistillationJob":
        teacher = {"endpoint": {"url": "http://teacher/v1", "model": "m"}}
        return {"suspend": True, "teacher": teacher, "student": {"uri": "oci://r/s:1"}, "data": {"prompts": DATA}}
    if kind == "QuantizedModel":
        return {"source": MODEL}
    return {"model": {"ref": {"kind": "QuantizedModel", "name": f"many-{number}"}}}


def name(kind: str, number: int) -> str:
    return f"{'chain' if kind == 'FineTuneJob' else 'many'}-{number}"


def finished(number: int) -> Object:
    """The status of a QuantizedModel that ended long ago."""
    common = {"status": "True", "reason": "Succeeded", "message": "", "observedGeneration": 1}
    at = stamp(utc_now())
    said: list[Object] = [{"type": kind, "lastTransitionTime": at, **common} for kind in ("Ready", "Complete")]
    digest = "sha256:" + f"{number:064x}"
    artifact = {"uri": f"oci://r/m@{digest}", "digest": digest, "sizeBytes": 1}
    return {"observedGeneration": 1, "phase": "Succeeded", "conditions": said, "artifact": artifact}


def passes(operator: Operator) -> float:
    answer = operator.get("/metrics", metrics=True)
    lines = answer.text.splitlines() if answer else []
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("slmops_reconcile_seconds_count"))


def unsettled(api: Api) -> list[str]:
    """Some of those that have not been looked at."""
    return [
        f"{kind} {found['metadata']['name']}: {found.get('status')}"
        for kind in KINDS
        for found in api.list(kind)
        if (found.get("status") or {}).get("observedGeneration") != 1
    ][:5]


def memory(operator: Operator) -> int:
    """Resident bytes."""
    text = Path(f"/proc/{operator.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


def at_rest(proxy: Proxy, operator: Operator) -> float:
    """Wait until a whole round of looking at what is missing has written nothing; seconds that it took."""
    began = time.monotonic()

    def round_without_writes() -> bool:
        writes, before = len(proxy.writes), passes(operator)
        wait_for("a round of passes", lambda: passes(operator) >= before + EACH, 60)
        return len(proxy.writes) == writes

    wait_for("rest", round_without_writes, SETTLE_SECONDS)
    return time.monotonic() - began


def test_a_thousand_objects(api: Api, start: Start, proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        for number in range(EACH):
            api.create(kind, name(kind, number), spec=spec(kind, number))
    for number in range(0, EACH, 5):  # every fifth deployment has a model
        api.patch("QuantizedModel", f"many-{number}", {"status": finished(number)}, "status")
    settings: dict[str, Any] = {"SLMOPS_ROUTER_KEY": "k" * 32}
    began = time.monotonic()
    first = start(**settings).until_ready()
    count = len(KINDS) * EACH
    wait_for("a pass over each", lambda: passes(first) >= count, SETTLE_SECONDS)  # asks little of this process
    wait_for("all to be looked at", lambda: not unsettled(api), SETTLE_SECONDS)
    took = time.monotonic() - began
    at_rest(proxy, first)
    rss, written = memory(first), list(proxy.writes)
    assert first.terminate() < 10
    assert proxy.writes == written

    began = time.monotonic()
    second = start(**settings).until_ready()
    wait_for("a pass over each", lambda: passes(second) >= count, RESTART_SECONDS)
    again = time.monotonic() - began
    assert proxy.writes == written, proxy.writes[len(written) :][:20]
    with capsys.disabled():
        print(
            f"\n1,000 objects: {took:.1f} s to settle, {len(written)} writes; restart {again:.1f} s, 0 writes; "
            f"{rss >> 20} MiB, after the restart {memory(second) >> 20} MiB"
        )
