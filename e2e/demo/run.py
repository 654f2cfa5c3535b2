"""`make demo`: the whole chain on a cluster that has SLMOps, then a canary under traffic, then the measured table.

python -m demo.run        needs the chart installed; CLUSTER=current takes the user's kube context
"""

import json
import os
import sys
import time
from pathlib import Path

from demo import pods, report
from demo.show import CHAIN, Board, Row, clock, condition, row
from kit import chart
from kit.kubectl import LOCAL, Kubectl, KubectlError, Object, TimedOut, wait_for

NAMESPACE = "slmops-demo"
MANIFESTS = Path(__file__).resolve().parent / "manifests"
CHAIN_TIMEOUT = 45 * 60.0
CANARY_TIMEOUT = 15 * 60.0
BENCH = {"teacher": "teacher-fp32", "student": "student-fp32", "tuned": "student-tuned-fp32", "int4": "student-int4"}
KINDS = {kind for kind, _, _ in CHAIN}


class DemoError(Exception):
    """The demo cannot go on; the message says what failed and how to go on."""


def operator_settings(kube: Kubectl) -> dict[str, str]:
    """The SLMOPS_* variables of the installed operator: images, store. Raises DemoError if there is none."""
    found = kube.within(chart.NAMESPACE).get("deployment", f"{chart.RELEASE}-operator")
    if found is None:
        raise DemoError(
            f"No SLMOps operator runs in namespace {chart.NAMESPACE}. Install the chart first: make install"
        )
    env = found["spec"]["template"]["spec"]["containers"][0].get("env") or []
    return {item["name"]: item.get("value", "") for item in env}


def seed(kube: Kubectl, board: Board, settings: dict[str, str]) -> None:
    """An empty namespace, the demo's code, and the artifacts that the chain starts from."""
    board.say(f"Preparing namespace {NAMESPACE}; a demo of an earlier run in it is removed")
    kube.delete("namespace", NAMESPACE)
    kube.apply(chart.namespace(NAMESPACE))
    kube.apply(pods.code())
    store = settings.get("SLMOPS_STORE", "").rstrip("/")
    expected = "oci://slmops-registry.slmops-system.svc:5000"
    if store != expected:
        raise DemoError(
            f"The demo's YAML reads from {expected}, the operator's store is {store or 'not set'}. "
            "Install the chart with registry.enabled=true and no store.url."
        )
    kube.apply(
        pods.pod("seed", settings["SLMOPS_TRAINER_IMAGE"], "demo.seed", f"{store}/demo", env=_store_env(settings))
    )
    for line in pods.finish(kube, "seed", 300):
        board.say(line)


def _store_env(settings: dict[str, str]) -> dict[str, str]:
    return {"SLMOPS_PLAIN_HTTP": settings.get("SLMOPS_PLAIN_HTTP", "")}


def read_rows(kube: Kubectl) -> tuple[list[Row], dict[tuple[str, str], Object]]:
    """The chain as it is now. One request."""
    items: list[Object] = json.loads(kube.run("get", "slm", "-o", "json"))["items"]
    found = {(item["kind"], item["metadata"]["name"]): item for item in items if item["kind"] in KINDS}
    now = time.time()
    return [row(kind, name, what, found.get((kind, name)), now) for kind, name, what in CHAIN], found


def run_chain(kube: Kubectl, board: Board) -> list[Row]:
    """Apply the YAML and follow it until every object is Ready. Raises DemoError naming what failed."""
    names = " ".join(path.name for path in sorted(MANIFESTS.glob("*.yaml")))
    board.say(f"kubectl apply -f e2e/demo/manifests/  ({names})")
    kube.run("apply", "-f", str(MANIFESTS))
    began = time.monotonic()
    while True:
        try:
            rows, _ = read_rows(kube)
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


def canary(kube: Kubectl, board: Board, image: str) -> Object:
    """Traffic on, the new model in, until it is promoted; returns the last count. Raises DemoError on a rollback."""
    url = _status(kube)["endpoint"]
    kube.apply(pods.pod("traffic", image, "demo.traffic", url, "assistant", env={}))
    wait_for("the traffic pod answers", lambda: _traffic(kube).get("sent", 0) >= 20, 120)
    board.say("Traffic runs. Next: kubectl patch modeldeployment assistant, spec.model -> QuantizedModel/student-int4")
    wanted = _digest(kube, "student-int4")
    kube.patch(
        "modeldeployment", "assistant", {"spec": {"model": {"ref": {"kind": "QuantizedModel", "name": "student-int4"}}}}
    )
    began, told = time.monotonic(), ""
    while True:
        found = kube.get("modeldeployment", "assistant") or {}
        status, count = found.get("status") or {}, _traffic(kube)
        rollout = status.get("rollout") or {}
        where = describe(status)
        footer = f"{where}; {count.get('sent', 0)} requests sent, {count.get('lost', 0)} lost"
        if board.live:
            board.show([row("ModelDeployment", "assistant", "", found, time.time())], footer)
        elif where != told:
            board.say(footer)
            told = where
        if (status.get("stable") or {}).get("digest") == wanted and condition(found, "Ready").get("status") == "True":
            break
        if rollout.get("phase") == "RollingBack" or condition(found, "Stalled").get("status") == "True":
            raise DemoError(
                f"The canary was rolled back: {rollout.get('outcome') or condition(found, 'Ready').get('message')}"
            )
        if time.monotonic() - began > CANARY_TIMEOUT:
            raise DemoError(
                f"The canary was not promoted within {clock(CANARY_TIMEOUT)}: {rollout.get('hold') or where}"
            )
        time.sleep(1)
    kube.run("exec", "traffic", "--", "python3", "-c", "import os, signal; os.kill(1, signal.SIGTERM)")
    count = pods.last_json(pods.finish(kube, "traffic", 90))
    if not count["final"]:
        raise DemoError("The traffic pod ended without its last count")
    board.say(f"Promoted after {clock(time.monotonic() - began)}; {count['sent']} requests sent, {count['lost']} lost")
    return count


def describe(status: Object) -> str:
    """Where a rollout stands, in a line."""
    rollout = status.get("rollout") or {}
    verdicts = ", ".join(f"{each['name']} {each['verdict']}" for each in rollout.get("verdicts") or [])
    where = f"canary: {rollout.get('phase', '')}, step {rollout.get('step', 0) + 1}"
    where += f", {status.get('weight') or 0} % of the requests"
    return f"{where}; {verdicts}" if verdicts else where


def _status(kube: Kubectl) -> Object:
    status: Object = (kube.get("modeldeployment", "assistant") or {}).get("status") or {}
    return status


def _digest(kube: Kubectl, name: str) -> str:
    return str((kube.get("quantizedmodel", name) or {})["status"]["artifact"]["digest"])


def _traffic(kube: Kubectl) -> Object:
    """The traffic pod's last count; empty before it has one."""
    try:
        return pods.last_json(kube.run("logs", "traffic", "--tail=2").splitlines())
    except (KubectlError, ValueError):
        return {}


def bench(kube: Kubectl, board: Board, settings: dict[str, str]) -> Object:
    """Every model measured in the same way, in one pod of the server image."""
    board.say("Measuring: each model alone on the same CPUs, the same held-out messages")
    uris = {
        name: (kube.get("quantizedmodel", source) or {})["status"]["artifact"]["uri"] for name, source in BENCH.items()
    }
    kube.apply(
        pods.pod("bench", settings["SLMOPS_SERVER_IMAGE"], "demo.bench", json.dumps(uris), env=_store_env(settings))
    )
    return pods.last_json(pods.finish(kube, "bench", 900))


def close(board: Board, measured: Object, count: Object, rows: list[Row]) -> None:
    """Write the results, print the table."""
    found = report.figures(measured, count["sent"], count["lost"])
    bars = report.bars(found, report.new_label(measured["models"]["tuned"]))
    LOCAL.mkdir(exist_ok=True)
    (LOCAL / "demo.json").write_text(json.dumps(found, indent=2) + "\n")
    details: Object = {
        "bench": measured,
        "canary": count,
        "bars": [vars(bar) for bar in bars],
        "seconds": {f"{each.kind}/{each.name}": each.seconds for each in rows if each.seconds is not None},
        "total_seconds": time.monotonic() - board.began,
    }
    (LOCAL / "demo-details.json").write_text(json.dumps(details, indent=2) + "\n")
    for line in [*report.table(measured, found), *report.verdicts(bars), ""]:
        print(line)
    print(
        "The figures: .local/demo.json, more of them: .local/demo-details.json. "
        f"It took {clock(details['total_seconds'])}."
    )


def hints(current: bool) -> str:
    """How to go on by hand."""
    prefix = "" if current else "export KUBECONFIG=$PWD/.local/kubeconfig PATH=$PWD/.local/bin:$PATH\n  "
    return (
        f"Go on:\n  {prefix}kubectl -n {NAMESPACE} get slm\n"
        f"  kubectl -n {NAMESPACE} port-forward service/assistant 8000 &\n"
        '  curl localhost:8000/v1/chat/completions -d \'{"model": "assistant", "messages": '
        '[{"role": "user", "content": "the beamer in room atlas keeps crashing, asap! fix it by Friday"}]}\''
    )


def main() -> int:
    """Run it; returns the exit code."""
    current = os.environ.get("CLUSTER") == "current"
    kube, board = Kubectl(NAMESPACE, current=current), Board()
    try:
        settings = operator_settings(kube)
        seed(kube, board, settings)
        rows = run_chain(kube, board)
        count = canary(kube, board, settings["SLMOPS_SERVER_IMAGE"])
        measured = bench(kube, board, settings)
        close(board, measured, count, rows)
    except (DemoError, KubectlError, TimedOut) as error:
        print(f"\nThe demo failed.\n{error}\nThe cluster is still up; `make demo` starts over.", file=sys.stderr)
        print(hints(current), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was applied goes on in the cluster.\n{hints(current)}", file=sys.stderr)
        return 130
    print(hints(current))
    return 0


if __name__ == "__main__":
    sys.exit(main())
