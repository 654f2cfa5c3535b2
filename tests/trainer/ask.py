"""A process that asks a teacher the questions of a file, to be killed by tests: ask.py SPEC.json."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from slmops.api.run import Input, RunSpec, TeacherEndpoint
from slmops_trainer import answers, generation, questions
from slmops_trainer.context import Context
from slmops_trainer.teacher import Sampling


def context(pod: Path, checkpoint: str) -> Context:
    run = RunSpec(
        namespace="ml",
        name="ask",
        uid="uid-1",
        model=Input(uri="pvc://none/x"),
        output="pvc://store/out",
        checkpoint=checkpoint,
    )
    return Context(run, pod)


def ask(
    ctx: Context, url: str, texts: list[str], samples: int = 1, *, recall: bool = False, **terms: Any
) -> tuple[generation.Outcome, list[str | None]]:
    """All answers, in order, as a distillation run asks for them. `recall`: also those of earlier objects."""
    ctx.checkpoints.load()
    store = answers.Answers(ctx.checkpoints.folder / answers.PART)
    if recall:
        store.recall(answers.shared(ctx, "answers"))
    endpoint = TeacherEndpoint(url=url, model="big")
    settings = replace(generation.Terms(endpoint, None, Sampling(0.7, 0.9, 16), concurrency=4, timeout=30.0), **terms)
    prompts = [[{"role": "user", "content": text}] for text in texts]
    asked = questions.make(prompts, samples, "big", settings.sampling, 1, lambda: None)
    outcome = generation.ask_all(ctx, asked, settings, store, "Generating")
    replies = [store.get(question.key) for question in asked]
    return outcome, [reply.text if reply else None for reply in replies]


if __name__ == "__main__":
    order = json.loads(Path(sys.argv[1]).read_text())
    generation.SAVE_SECONDS = 0.1
    ask(context(Path(order["pod"]), order["checkpoint"]), order["url"], order["texts"])
