"""The synthetic training set: prompts -> the teacher's answers -> filters -> an artifact of its own."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsonschema.protocols import Validator

from slmops.api.distillation import DistillationJobSpec, Generation
from slmops.api.meta import Dataset
from slmops.api.run import Input, TeacherEndpoint
from slmops_artifacts import Manifest, Parent
from slmops_artifacts.model import dedupe
from slmops_trainer import answers, data, encoding, filters, generation, publish, questions
from slmops_trainer.data import Example, Examples, Message
from slmops_trainer.failure import RunFailure
from slmops_trainer.models import Loaded
from slmops_trainer.teacher import Sampling, recorded

if TYPE_CHECKING:
    from slmops_trainer.context import Context

GENERATING, FILTERING = "Generating", "Filtering"
FILE = "train.jsonl"
ROOM = 8  # tokens that the shortest answer and the end of its turn may need
THINK = (
    "Think step by step inside <think></think> first. After </think> write the final answer alone, "
    "without any explanation."
)

log = logging.getLogger("slmops")


class SyntheticSet(NamedTuple):
    """What the student learns from: the examples, and the manifest of the artifact that holds them."""

    examples: Examples
    manifest: Manifest


def make(
    ctx: "Context",
    spec: DistillationJobSpec,
    terms: generation.Terms,
    student: Loaded,
    prompts: Examples,
    held_out: Examples | None,
    schema: Validator | None,
    store: answers.Answers,
    unfit: set[int],
    inputs: str,
) -> SyntheticSet:
    """The set, from the artifact that an earlier pod of this run published, or asked of the teacher and published.

    `unfit`: positions of prompts that the student could not be trained on, which are not asked.
    `inputs`: identity of what the set is made from; a set of something else is made anew.
    Raises RunFailure(NothingToTrain) with the drop report, and those of generation.ask_all and the store.
    """
    found = publish.existing(ctx, uri_of(ctx), inputs)
    if found is not None:
        folder, _ = ctx.pull(Input(uri=found[0].uri), "synthetic", "Pulling synthetic data")
        return _read(ctx, folder, found[0].uri, found[1])
    kept, metrics = _generate(ctx, spec, terms, student, prompts, held_out, schema, store, unfit)
    folder = ctx.work / "synthetic"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("w", encoding="utf-8") as stream:
        for example in kept:
            stream.write(json.dumps(example.row, ensure_ascii=False) + "\n")
    manifest = _manifest(ctx, spec, terms.endpoint, prompts, metrics, inputs)
    artifact, manifest = ctx.push(folder, manifest, uri_of(ctx), FILTERING)
    return _read(ctx, folder, artifact.uri, manifest)


def unfit(ctx: "Context", loaded: Loaded, prompts: Examples, spec: DistillationJobSpec) -> set[int]:
    """Positions of the prompts that leave no room for an answer in what is trained on.

    Raises RunFailure(BadDataset, UnsupportedModel) for a conversation that the student's chat template cannot take:
    known now, or after the last answer is paid for; and RunFailure(Interrupted).
    """
    limit = min(spec.training.max_length, loaded.tokenizer.model_max_length)
    taught = [instructed(example, spec.data.generation.system_prompt) for example in prompts.items]
    found: set[int] = set()
    for index, example in enumerate(taught):
        ctx.check()
        if len(encoding.encode_prompt(loaded.tokenizer, example)) + ROOM > limit:
            found.add(index)
    # The text of an earlier answer may be longer: some templates leave its thoughts out once it is an earlier one.
    talks = [at for at, example in enumerate(taught) if any(m.role == "assistant" for m in example.messages)]
    whole = [replace(taught[at], answer="x") for at in talks]
    lengths = encoding.lengths(loaded.tokenizer, whole, loaded.stop_ids, ctx.check)
    found |= {at for at, length in zip(talks, lengths, strict=True) if length > limit}
    # Earlier answers in a conversation have to be told apart in it: one of each shape shows whether they can.
    shapes = {tuple(m.role for m in taught[i].messages): taught[i] for i in range(len(taught)) if i not in found}
    for example in shapes.values():
        encoding.encode(loaded.tokenizer, [replace(example, answer="x")], loaded.stop_ids, "assistant", limit)
    return found


def uri_of(ctx: "Context") -> str:
    """Beside the output, under a tag of this object alone, for the student's lineage points there."""
    return f"{ctx.spec.output.rstrip('/')}-data-{ctx.spec.uid.replace('-', '')[:8]}"


def instructed(example: Example, system: str | None, *, think: bool = False) -> Example:
    """The prompt with the system prompt before it, and with the wish for thoughts, which is never trained on."""
    parts = [system] if system else []
    own = [message.content for message in example.messages if message.role == "system"]
    text = "\n\n".join([*parts, *own, *([THINK] if think else [])])
    rest = tuple(message for message in example.messages if message.role != "system")
    return replace(example, messages=(Message("system", text), *rest) if text else rest)


def wire(examples: Sequence[Example]) -> list[list[dict[str, str]]]:
    """The questions as the OpenAI API takes them: a wanted answer is not shown."""
    return [[message.wire() for message in example.messages] for example in examples]


def sampling(settings: Generation) -> Sampling:
    """How training answers are drawn."""
    return Sampling(settings.temperature, settings.top_p, settings.max_tokens)


def _generate(
    ctx: "Context",
    spec: DistillationJobSpec,
    terms: generation.Terms,
    student: Loaded,
    prompts: Examples,
    held_out: Examples | None,
    schema: Validator | None,
    store: answers.Answers,
    unfit: set[int],
) -> tuple[list[Example], dict[str, float]]:
    """Ask and filter. Returns what is trained on, and the report as metrics."""
    settings, rules = spec.data.generation, spec.data.filters
    # What would be dropped anyway is not asked: the teacher's tokens are the dear part.
    leaked = filters.contaminated(prompts.items, held_out.items) if held_out and rules.decontaminate else set()
    left_out = leaked | unfit
    asked = [example for index, example in enumerate(prompts.items) if index not in left_out]
    taught = [instructed(example, settings.system_prompt) for example in asked]
    prompted = [instructed(example, settings.system_prompt, think=settings.chain_of_thought) for example in asked]
    samples = settings.samples_per_prompt if settings.temperature else 1  # greedy answers to one prompt are equal
    teacher = answers.teacher_key(terms.endpoint)
    wanted = questions.make(wire(prompted), samples, teacher, terms.sampling, spec.training.seed, ctx.check)
    outcome = generation.ask_all(ctx, wanted, terms, store, GENERATING)
    ctx.report(FILTERING, 0, 1, f"{len(store)} answers")
    replies = [(store.get(question.key), taught[question.prompt]) for question in wanted]
    rows = [filters.Row(example, reply.text, reply.finish) for reply, example in replies if reply is not None]
    kept, drops = filters.apply(rows, rules, schema, thoughts=settings.chain_of_thought, check=ctx.check)
    # A teacher may write the name of a token that the student has no weights for: one such answer ends no paid run.
    lacking = encoding.lacking(student.tokenizer, (example.answer or "" for example in kept), ctx.check)
    kept = [example for at, example in enumerate(kept) if at not in lacking]
    drops["unknownToken"] = len(lacking)
    drops["decontaminate"] = len(leaked) * samples
    drops["maxLength"] = len(unfit - leaked) * samples
    metrics = {
        "prompts": len(prompts.items),
        "answers": len(rows),
        "answers_reused": store.recalled,
        "unanswered": len(wanted) - len(rows),
        "kept": len(kept),
        "teacher_tokens": outcome.tokens,
        **{f"dropped_{name}": drops[name] for name in filters.NAMES},
    }
    log.info("Filtered: %s", _report(drops, len(kept)))
    if not kept:
        for name, value in metrics.items():
            ctx.metric(name, value)
        raise RunFailure(
            "NothingToTrain",
            f"No example is left of {len(prompts.items)} prompts: {len(rows)} answers, {_report(drops, 0)}. "
            "Loosen data.filters, raise generation.maxTokens if answers are truncated or training.maxLength if prompts "
            "are too long, or use other prompts, in a new object: what was answered is kept for it.",
        )
    return kept, {name: float(value) for name, value in metrics.items()}


def _manifest(
    ctx: "Context",
    spec: DistillationJobSpec,
    teacher: TeacherEndpoint,
    prompts: Examples,
    metrics: dict[str, float],
    inputs: str,
) -> Manifest:
    """The set comes from the prompts and, if the teacher is ours, from the model that it serves."""
    line = tuple(Parent(kind=row.kind, uri=row.uri, digest=row.digest, name=row.name) for row in teacher.lineage)
    parents = (prompts.parent, *line[:1])
    return Manifest(
        kind="dataset",
        parents=parents,
        lineage=dedupe((*parents, *line)),
        recipe={
            "teacher": recorded(teacher),
            "data": spec.data.wire(),
        },
        seed=spec.training.seed,
        versions=publish.versions(),
        metrics=metrics,
        annotations={publish.ANNOTATION_INPUTS: inputs},
        created=ctx.started,
    )


def _read(ctx: "Context", folder: Path, uri: str, manifest: Manifest) -> SyntheticSet:
    """Read the set as it was published: what is trained on is what the artifact holds."""
    for name, value in manifest.metrics.items():
        ctx.metric(name, value)
    items, fmt = data.read(folder / FILE, Dataset(format="messages"), "training", f"{uri}, file {FILE}")
    parent = Parent(kind="dataset", uri=uri, digest=manifest.digest, name=f"DistillationJob/{ctx.spec.name}")
    return SyntheticSet(Examples(items, fmt, uri, parent), manifest)


def _report(drops: Counter[str], kept: int) -> str:
    parts = [f"{drops[name]} dropped by {name}" for name in filters.NAMES if drops[name]]
    return ", ".join([f"{kept} kept", *parts])
