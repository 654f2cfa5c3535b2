"""`make demo`: the whole chain on a cluster that has SLMOps, then a canary under traffic, then the measured table.

python -m demo.run        needs the chart installed; CLUSTER=current takes the user's kube context
"""

import contextlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from demo import pods as demo_pods
from demo import report
from demo.phrases import KNOWN
from demo.show import CHAIN, Board, Row, clock, condition, row
from demo.task import Writer
from kit import chart, earlier, pods
from kit.alone import BusyError, alone
from kit.kubectl import CURRENT, LOCAL, Kubectl, KubectlError, Object, TimedOut, shell
from kit.load import Count, Load
from localkube.files import write_json
from localkube.say import heartbeat

NAMESPACE = earlier.DEMO
STORE = "oci://slmops-registry.slmops-system.svc:5000"  # in the YAML too
MANIFESTS = Path(__file__).resolve().parent / "manifests"
CHAIN_TIMEOUT = 45 * 60.0
CANARY_TIMEOUT = 15 * 60.0
BENCH = {"teacher": "teacher-fp32", "student": "student-fp32", "tuned": "student-tuned-fp32", "int4": "student-int4"}
FIGURES, DETAILS = LOCAL / "demo.json", LOCAL / "demo-details.json"
HEARTBEAT = 5.0  # seconds
GONE = f"was removed while the demo ran: somebody else works in namespace {NAMESPACE}, another `make demo` perhaps."


class DemoError(Exception):
    """The demo cannot go on; the message says what failed and how to go on."""


def operator_settings(kube: Kubectl) -> dict[str, str]:
    """The SLMOPS_* variables of the installed operator. Raises DemoError where it cannot serve the demo."""
    return fit(chart.settings(kube))


def fit(settings: dict[str, str]) -> dict[str, str]:
    """These variables. Raises DemoError where an operator with them cannot serve the demo."""
    if not settings:
        raise DemoError(
            f"No SLMOps operator runs in namespace {chart.NAMESPACE}. Install the chart first: make install"
        )
    store = settings.get("SLMOPS_STORE", "").rstrip("/")
    if store != STORE:
        raise DemoError(
            f"The demo's YAML reads from {STORE}, the operator's store is {store or 'not set'}. "
            "Install the chart with registry.enabled=true and no store.url."
        )
    if not settings.get("SLMOPS_PROMETHEUS_URL"):
        raise DemoError(
            "The canary is judged by Prometheus, and the operator knows of none. "
            "Install the chart with prometheus.bundled.enabled=true, or give prometheus.url."
        )
    watched = settings.get("SLMOPS_NAMESPACES", "")
    if watched and NAMESPACE not in watched.split(","):
        raise DemoError(
            f"The operator watches {watched} alone, and the demo's namespace is {NAMESPACE}. "
            "Add it to watchNamespaces of the chart's values."
        )
    return settings


def seed(kube: Kubectl, board: Board, settings: dict[str, str]) -> None:
    """An empty namespace, the demo's code, and the artifacts that the chain starts from."""
    if not CURRENT and (names := earlier.remove(kube, NAMESPACE)):
        board.say(f"Removed what earlier runs left to work on beside this one: {', '.join(names)}")
    board.say(f"Preparing namespace {NAMESPACE}; a demo of an earlier run in it is removed")
    with heartbeat(f"namespace {NAMESPACE}", tell=board.say):
        chart.fresh_namespace(kube)
    kube.apply(demo_pods.code())
    kube.apply(
        demo_pods.pod("seed", settings["SLMOPS_TRAINER_IMAGE"], "demo.seed", f"{STORE}/demo", env=_store_env(settings))
    )
    for line in pods.finish(kube, "seed", 300, tell=board.say):
        board.say(line)


def _store_env(settings: dict[str, str]) -> dict[str, str]:
    return {"SLMOPS_PLAIN_HTTP": settings.get("SLMOPS_PLAIN_HTTP", "")}


def read_rows(kube: Kubectl) -> list[Row]:
    """The chain as it is now. One request."""
    items: list[Object] = json.loads(kube.run("get", "slm", "-o", "json"))["items"]
    found = {(item["kind"], item["metadata"]["name"]): item for item in items}
    now = time.time()
    return [row(kind, name, what, found.get((kind, name)), now) for kind, name, what in CHAIN]


def run_chain(kube: Kubectl, board: Board) -> list[Row]:
    """Apply the YAML and follow it until every object is Ready. Raises DemoError naming what failed."""
    names = " ".join(path.name for path in sorted(MANIFESTS.glob("*.yaml")))
    board.say(f"kubectl apply -f e2e/demo/manifests/  ({names})")
    kube.run("apply", "-f", str(MANIFESTS))
    began, heart, known = time.monotonic(), Heart(kube), dict[str, str]()
    while True:
        try:
            rows = [heart.beat(each) for each in same(known, read_rows(kube))]
        except KubectlError as error:
            board.say(f"Could not look: {error}")
            rows = []
        if rows:
            board.show(rows, "the chain, in the order in which its parts become ready")
        if broken := [each for each in rows if each.stalled]:
            raise DemoError(
                "\n".join(f"{each.kind}/{each.name} failed: {each.detail}" for each in broken)
                + f"\nLook: kubectl -n {NAMESPACE} describe slm"
                + f"\nLogs: kubectl -n {NAMESPACE} logs -l slmops.dev/owner={broken[0].name}"
            )
        if rows and all(each.ready for each in rows):
            board.say(f"The chain is ready after {clock(time.monotonic() - began)}")
            return rows
        if time.monotonic() - began > CHAIN_TIMEOUT:
            late = ", ".join(f"{each.kind}/{each.name} ({each.phase})" for each in rows if not each.ready)
            raise DemoError(
                f"Not ready within {clock(CHAIN_TIMEOUT)}: {late}. Look: kubectl -n {NAMESPACE} get slm,pods,events"
            )
        time.sleep(1)


def same(known: dict[str, str], rows: list[Row]) -> list[Row]:
    """The rows. `known`: uids by kind/name, added to. Raises DemoError when an object is gone or is another by now."""
    for each in rows:
        name = f"{each.kind}/{each.name}"
        if each.uid != (known.setdefault(name, each.uid) if each.uid else known.get(name, "")):
            raise DemoError(f"{name} {GONE}")
    return rows


class Heart:
    """Adds the newest line of a running pod's log to its row, read again every HEARTBEAT seconds."""

    def __init__(self, kube: Kubectl) -> None:
        self.kube = kube
        self.read: dict[tuple[str, str], tuple[float, str]] = {}

    def beat(self, each: Row) -> Row:
        """The row, with the line where it is a batch run in progress."""
        if not each.moving or each.kind == "ModelDeployment":
            return each
        key, now = (each.kind, each.name), time.monotonic()
        at, line = self.read.get(key, (0.0, ""))
        if not at or now - at >= HEARTBEAT:
            line = self.newest(each) or line
            self.read[key] = (now, line)
        return replace(each, detail=" | ".join(part for part in (each.detail, line) if part))

    def newest(self, each: Row) -> str:
        """The last line; empty before the container has one."""
        selector = f"slmops.dev/kind={each.kind},slmops.dev/owner={each.name}"
        try:
            lines = self.kube.run("logs", "-l", selector, "--tail=1").splitlines()
        except KubectlError:
            return ""
        return lines[-1].strip() if lines else ""


def canary(kube: Kubectl, board: Board, image: str) -> Count:
    """Traffic on, the new model in, until it is promoted; returns the last count. Raises DemoError on a rollback."""
    load = Load(kube)
    writer = Writer(KNOWN, "traffic")
    prompts = [writer.example().text for _ in range(500)]
    endpoint = _status(kube, "modeldeployment", "assistant")["endpoint"]
    load.start(image, endpoint, "assistant", prompts, clients=3, max_tokens=48)
    load.flows(20, timeout=120)
    board.say("Traffic runs. Next: kubectl patch modeldeployment assistant, spec.model -> QuantizedModel/student-int4")
    wanted = str(_status(kube, "quantizedmodel", "student-int4")["artifact"]["digest"])
    kube.patch(
        "modeldeployment", "assistant", {"spec": {"model": {"ref": {"kind": "QuantizedModel", "name": "student-int4"}}}}
    )
    began = time.monotonic()
    while not promoted(kube, board, load, wanted):
        if time.monotonic() - began > CANARY_TIMEOUT:
            raise DemoError(
                f"The canary was not promoted within {clock(CANARY_TIMEOUT)}: "
                f"{describe(_status(kube, 'modeldeployment', 'assistant'))}\n"
                f"Look: kubectl -n {NAMESPACE} describe modeldeployment assistant"
            )
        time.sleep(1)
    count = load.stop()
    board.say(f"Promoted after {clock(time.monotonic() - began)}; {count.sent} requests sent, {count.lost} lost")
    return count


def promoted(kube: Kubectl, board: Board, load: Load, wanted: str) -> bool:
    """Show where the canary stands; whether the wanted model serves everything. Raises DemoError on a rollback."""
    try:
        found = kube.get("modeldeployment", "assistant")
    except KubectlError as error:
        board.say(f"Could not look: {error}")
        return False
    if found is None:
        raise DemoError(f"ModelDeployment/assistant {GONE}")
    status, count = found.get("status") or {}, load.count()
    rollout, stalled = status.get("rollout") or {}, condition(found, "Stalled")
    if rollout.get("phase") in ("RollingBack", "RolledBack") or stalled.get("status") == "True":
        raise DemoError(f"The canary was rolled back: {rollout.get('outcome') or stalled.get('message')}")
    where = describe(status)
    board.show(
        [row("ModelDeployment", "assistant", "", found, time.time())],
        f"{where}; {count.sent} requests sent, {count.lost} lost",
        key=where,
    )
    return (status.get("stable") or {}).get("digest") == wanted and condition(found, "Ready").get("status") == "True"


def describe(status: Object) -> str:
    """Where a rollout stands, in a line."""
    rollout = status.get("rollout") or {}
    verdicts = ", ".join(f"{each['name']} {each['verdict']}" for each in rollout.get("verdicts") or [])
    where = f"canary: {rollout.get('phase', '')}, step {rollout.get('step', 0) + 1}"
    where += f", {status.get('weight') or 0} % of the requests"
    return f"{where}; {verdicts}" if verdicts else where


def _status(kube: Kubectl, kind: str, name: str) -> Object:
    found = kube.get(kind, name)
    if found is None:
        raise DemoError(f"{kind}/{name} {GONE}")
    status: Object = found.get("status") or {}
    return status


def bench(kube: Kubectl, board: Board, settings: dict[str, str]) -> Object:
    """Every model measured in the same way, in one pod of the server image."""
    board.say("Measuring: the models in turn on the same CPUs, with the same held-out messages")
    uris = {name: _status(kube, "quantizedmodel", source)["artifact"]["uri"] for name, source in BENCH.items()}
    kube.apply(
        demo_pods.pod(
            "bench", settings["SLMOPS_SERVER_IMAGE"], "demo.bench", json.dumps(uris), env=_store_env(settings)
        )
    )
    return pods.last_json(pods.finish(kube, "bench", 900, tell=board.say))


def close(board: Board, measured: Object, count: Count, rows: list[Row]) -> None:
    """Print the table, write the results. Raises DemoError where they cannot be written."""
    found = report.figures(measured, count.sent, count.lost)
    bars = report.bars(measured, found, count.reasons)
    details: Object = {
        "bench": measured,
        "canary": vars(count),
        "bars": [vars(bar) for bar in bars],
        "seconds": {f"{each.kind}/{each.name}": each.seconds for each in rows if each.seconds is not None},
        "total_seconds": time.monotonic() - board.began,
    }
    for line in [*report.table(measured, found), *report.verdicts(bars), ""]:
        print(line)  # first of all: no full disk may take what was measured
    try:
        write_json(DETAILS, details)
        write_json(FIGURES, found)
    except OSError as problem:
        raise DemoError(f"The figures above are not in {LOCAL}: {problem}. Look: df -h {LOCAL}") from None
    print(
        "The figures: .local/demo.json, more of them: .local/demo-details.json. "
        f"It took {clock(details['total_seconds'])}."
    )


def tidy(kube: Kubectl) -> None:
    """After an interruption nothing of the demo's own goes on: its pods ask, measure and seed for nobody."""
    for name in ("traffic", "bench", "seed"):
        with contextlib.suppress(KubectlError, KeyboardInterrupt):  # a second Ctrl-C hurries
            kube.delete("pod", name, wait=False)


def hints() -> str:
    """How to go on by hand after it worked."""
    return (
        f"Go on:\n  {shell()}kubectl -n {NAMESPACE} get slm\n"
        f"  kubectl -n {NAMESPACE} port-forward service/assistant 8000 &\n"
        '  curl localhost:8000/v1/chat/completions -d \'{"model": "assistant", "messages": '
        '[{"role": "user", "content": "the beamer in room atlas keeps crashing, asap! fix it by Friday"}]}\''
    )


def look() -> str:
    """How to see what is there after it did not."""
    return f"Look:\n  {shell()}kubectl -n {NAMESPACE} get slm,pods,events\n`make demo` starts over."


def main() -> int:
    """Run it; returns the exit code."""
    try:
        with alone("make demo"):
            return demonstrate(Kubectl(NAMESPACE), Board())
    except (BusyError, OSError) as problem:
        print(f"The demo did not start. {problem}", file=sys.stderr)
        return 1


def demonstrate(kube: Kubectl, board: Board) -> int:
    """From an empty namespace to the table; returns the exit code."""
    try:
        for file in (FIGURES, DETAILS):  # never the figures of another run
            file.unlink(missing_ok=True)
        settings = operator_settings(kube)
        seed(kube, board, settings)
        rows = run_chain(kube, board)
        count = canary(kube, board, settings["SLMOPS_SERVER_IMAGE"])
        measured = bench(kube, board, settings)
        close(board, measured, count, rows)
    except (DemoError, KubectlError, TimedOut, OSError) as error:
        tidy(kube)
        print(f"\nThe demo failed.\n{error}\n{look()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        tidy(kube)
        print(f"\nInterrupted. What was applied goes on in the cluster.\n{look()}", file=sys.stderr)
        return 130
    print(hints())
    return 0


if __name__ == "__main__":
    sys.exit(main())
