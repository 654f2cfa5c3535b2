"""The whole chain, applied at once in the wrong order: teacher, student, int4, canary, an answer over HTTP."""

import json

from openai import OpenAI

from kit.kubectl import Kubectl, wait_for
from kit.load import traffic
from kit.objects import (
    SMALL_POD,
    STORE,
    TRAINING,
    dataset,
    deployment,
    describe,
    evaluation,
    finetune,
    obj,
    quantize,
)

CANARY = {
    "steps": [{"weight": 20, "pauseSeconds": 5}, {"weight": 60, "pauseSeconds": 5}],
    "analysis": {
        "intervalSeconds": 3,
        "windowSeconds": 20,
        "minSamples": 10,
        "passes": 2,
        "metrics": [
            {"name": "errors", "builtin": "errorRate", "max": 0.05},
            {"name": "p95", "builtin": "latencyP95", "max": 20},
        ],
    },
    "scaleDownDelaySeconds": 5,
}


def chain() -> list[dict[str, object]]:
    """Last step first: nothing that an object refers to exists when it is applied."""
    return [
        deployment("shop", "student-fp32", rollout=CANARY),
        quantize(
            "student-int4",
            "DistillationJob",
            "student",
            "int4",
            gate={"dataset": dataset("heldout.jsonl"), "metric": "exactMatch", "maxDrop": 1.0, "maxTokens": 40},
        ),
        quantize("student-fp32", "DistillationJob", "student", "fp32"),
        obj(
            "DistillationJob",
            "student",
            {
                "teacher": {"deploymentRef": {"name": "teacher"}},
                "student": {"uri": f"{STORE}/base:tiny"},
                "data": {
                    "prompts": {**dataset("prompts.jsonl"), "limit": 300},
                    "generation": {"temperature": 0, "maxTokens": 40, "concurrency": 4},
                    "filters": {"validJson": True},
                },
                "training": TRAINING,
                "evaluation": evaluation(),
                "pod": SMALL_POD,
            },
        ),
        deployment("teacher", "teacher-fp32"),
        quantize("teacher-fp32", "FineTuneJob", "teacher", "fp32"),
        finetune("teacher"),
    ]


def processes(kube: Kubectl, revision: str) -> set[tuple[str, int]]:
    """Of a revision's pods: which they are, and how often their containers were started again."""
    pods = kube.list("pods", f"slmops.dev/owner=shop,slmops.dev/revision={revision}")
    return {(p["metadata"]["uid"], c["restartCount"]) for p in pods for c in p["status"]["containerStatuses"]}


def test_chain(space: Kubectl, seeded: str, images: dict[str, str]) -> None:
    space.apply(*chain())
    teacher = space.wait_ready("finetunejob", "teacher", 240)
    assert teacher["status"]["metrics"]["exactMatch"] > 0.3, teacher["status"]
    assert teacher["status"]["metrics"]["exactMatch"] > teacher["status"]["metrics"]["base_exactMatch"]
    space.wait_ready("modeldeployment", "teacher", 180)
    student = space.wait_ready("distillationjob", "student", 300)
    assert student["status"]["metrics"]["teacher_exactMatch"] > 0.3, student["status"]
    int4 = space.wait_ready("quantizedmodel", "student-int4", 180)
    assert int4["status"]["metrics"]["size_ratio"] < 0.5, int4["status"]
    space.wait_ready("modeldeployment", "shop", 180)

    with space.port_forward("service/shop", 8000) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = client.chat.completions.create(
            model="shop",
            temperature=0,
            max_tokens=40,
            messages=[{"role": "user", "content": "I want a tiny red box"}],
        )
        assert set(json.loads(answer.choices[0].message.content or "")) == {"colour", "shape"}

    shop = (space.get("modeldeployment", "shop") or {})["status"]
    prompts = ["I want a tiny red box", "blue ring please, huge one"]
    with traffic(space, images["server"], shop["endpoint"], "shop", prompts):
        space.patch("modeldeployment", "shop", {"spec": {"model": {"ref": {"name": "student-int4"}}}})
        weights, candidate = set(), set()

        def promoted() -> bool:
            status = (space.get("modeldeployment", "shop") or {})["status"]
            weights.add(status.get("weight"))
            if not candidate and status.get("weight") == 60:
                candidate.update(processes(space, status["candidate"]["revision"]))
            return bool(status["stable"]["revision"] != shop["stable"]["revision"] and not status.get("candidate"))

        wait_for("the candidate is promoted", promoted, 180)
        promoted_to = space.wait_ready("modeldeployment", "shop", 60)["status"]["stable"]["revision"]
        assert processes(space, promoted_to) == candidate, "promotion is to move and to restart no pod"
    assert {20, 60} <= weights, f"weights seen: {weights}\n{describe(space)}"

    lineage = (space.get("modeldeployment", "shop") or {})["status"]["lineage"]["parents"]
    uris = " ".join(parent["uri"] for parent in lineage)
    for ancestor in ("base", "data", "student", "teacher"):
        assert ancestor in uris, f"{ancestor} is not in the lineage: {uris}"
