"""`make bench`: what the operator costs, on the local node. Prints the tables of docs/benchmarks.md.

- the chain FineTuneJob -> FineTuneJob -> QuantizedModel, applied at once, against the same pods run by hand one after
  the other (same image, same specification), alternated, `ROUNDS` times each
- the gap between a step's end and the creation of the next step's pod, as one watcher sees both
- API writes by the operator for each training object, and its memory
"""

import json
import statistics
import sys
import time
import urllib.request
import uuid
from copy import deepcopy
from pathlib import Path

from kit import chart
from kit.kubectl import Kubectl, KubectlError, Object, TimedOut, wait_for
from kit.objects import STORE, TRAINING, finetune, quantize
from kit.seeding import seed
from kit.watching import Event, Watch

ROUNDS = 3  # unless the command line says another number
CALLS = "slmops_api_requests_total"
WRITING = ("apply", "patch_status", "create", "patch", "delete")
STEPS = {"training": {**TRAINING, "maxSteps": 150}, "evaluation": None}


def chain() -> list[Object]:
    """Three steps, each from the one before."""
    return [
        quantize("c", "FineTuneJob", "b", "int4"),
        finetune("b", base={"ref": {"kind": "FineTuneJob", "name": "a"}}, **STEPS),
        finetune("a", **STEPS),
    ]


def fresh(kube: Kubectl, name: str) -> Kubectl:
    """kubectl in a new namespace."""
    space = kube.within(name)
    chart.fresh_namespace(space)
    return space


def run_chain(kube: Kubectl, number: int) -> tuple[float, list[float], list[Object]]:
    """Wall seconds from apply to the last object's Ready, gaps in seconds, and the pods that ran."""
    space = fresh(kube, f"bench-chain-{number}")
    with Watch(space, "pods") as watch:
        began = time.monotonic()
        space.apply(*chain())
        space.wait_ready("quantizedmodel", "c", 900)
        wall = time.monotonic() - began
    pods = sorted(space.list("pods"), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    return wall, gaps(watch.events), pods


def gaps(events: list[Event]) -> list[float]:
    """Seconds from the event that tells a step's end to the event of the next step's pod, as one watcher saw them."""
    seen: dict[str, float] = {}
    ended: dict[str, float] = {}
    for at, pod in events:
        owner = pod["metadata"]["labels"]["slmops.dev/owner"]
        seen.setdefault(owner, at)
        if pod["status"]["phase"] == "Succeeded":
            ended.setdefault(owner, at)
    return [seen[after] - ended[before] for before, after in (("a", "b"), ("b", "c"))]


def run_bare(kube: Kubectl, number: int, pods: list[Object]) -> float:
    """Wall seconds of the same pods, made by hand one after the other: the next one as soon as the last has ended."""
    space = fresh(kube, f"bench-bare-{number}")
    model = ""
    began = time.monotonic()
    for pod in pods:
        bare = by_hand(pod, space.namespace, number, model)
        space.apply(bare)
        name = bare["metadata"]["name"]

        def ended(name: str = name) -> Object | None:
            found = space.get("pod", name)
            return found if found and found["status"]["phase"] in ("Succeeded", "Failed") else None

        state = wait_for(f"{name} ends", ended, 900, every=0.1)["status"]["containerStatuses"][0]["state"]["terminated"]
        result = json.loads(state["message"])
        if not result["succeeded"]:
            raise SystemExit(f"{name}: {result}")
        model = result["artifact"]["uri"]
    return time.monotonic() - began


def by_hand(pod: Object, namespace: str, number: int, model: str) -> Object:
    """The pod as a person would make it: same image and specification, another output, no owner."""
    spec = deepcopy(pod["spec"])
    for key in ("nodeName", "serviceAccount", "serviceAccountName", "tolerations", "priority", "preemptionPolicy"):
        spec.pop(key, None)
    owner = pod["metadata"]["labels"]["slmops.dev/owner"]
    for entry in spec["containers"][0]["env"]:
        if entry["name"] == "SLMOPS_RUN":
            run = json.loads(entry["value"])
            # A run finds what one of its uid has left, and the registry outlives a benchmark.
            run["uid"] = f"bench-{uuid.uuid4()}"
            run["output"] = f"{STORE}/bench/{owner}:{number}"
            run["checkpoint"] = f"{STORE}/bench/{owner}:ckpt-{number}"
            if model:
                run["model"]["uri"] = model
            entry["value"] = json.dumps(run)
    metadata = {"name": f"bare-{owner}", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def operator_metrics(kube: Kubectl) -> dict[str, float]:
    """The operator's own metrics, by name with labels."""
    with (
        kube.port_forward(f"deployment/{chart.RELEASE}-operator", 9090) as url,
        urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer,
    ):
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and line[0] != "#"}


def writes(metrics: dict[str, float]) -> float:
    """API calls that write, whatever came of them, Events among them."""
    calls = {name: value for name, value in metrics.items() if name.startswith(f"{CALLS}{{")}
    if not calls:
        raise SystemExit(f"the operator has no metric {CALLS}")
    return sum(value for name, value in calls.items() if any(f'verb="{verb}"' in name for verb in WRITING))


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> int:
    """Print the measurements and write them to .local/bench.json."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    kube = Kubectl(chart.NAMESPACE)
    seed(kube, chart.local_images()["trainer"])
    chains, bares, waits, per_object = [], [], [], []
    for number in range(rounds):
        before = writes(operator_metrics(kube))
        wall, gap, pods = run_chain(kube, number)
        per_object.append((writes(operator_metrics(kube)) - before) / 3)
        chains.append(wall)
        waits += gap
        bares.append(run_bare(kube, number, pods))
    memory = operator_metrics(kube)["process_resident_memory_bytes"] / 2**20
    ratios = [a / b for a, b in zip(chains, bares, strict=True)]
    result = {
        "chain_seconds": chains,
        "bare_seconds": bares,
        "ratio": ratios,
        "gap_seconds": waits,
        "writes_per_object": per_object,
        "operator_rss_mib": memory,
    }
    (Path(__file__).resolve().parents[2] / ".local/bench.json").write_text(json.dumps(result, indent=1))
    sys.stdout.write(
        f"chain of three, s         {spread(chains)}\n"
        f"the same pods by hand, s  {spread(bares)}\n"
        f"ratio                     {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n"
        f"gap to the next pod, s    {spread(waits)}\n"
        f"API writes an object      {spread(per_object)}\n"
        f"operator memory, MiB      {memory:.0f}\n"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KubectlError, TimedOut) as error:
        sys.exit(f"Failed: {error}")
