"""DistillationJob: a teacher writes the training set, a student learns it, both are held against the gold answers."""

import hashlib
import json
import ssl
from dataclasses import replace
from typing import Any

from slmops.api.batch import Evaluation
from slmops.api.distillation import DistillationJobSpec
from slmops.api.run import RunResult, TeacherEndpoint
from slmops_artifacts.errors import ArtifactError
from slmops_artifacts.trust import trusted
from slmops_trainer import (
    answers,
    chat_text,
    data,
    encoding,
    evaluate,
    filters,
    generation,
    measure,
    models,
    publish,
    questions,
    synthetic,
)
from slmops_trainer.checkpoints import QUICK
from slmops_trainer.context import Context, read_secret
from slmops_trainer.data import Examples
from slmops_trainer.failure import RunFailure, from_artifact
from slmops_trainer.progress import Stage
from slmops_trainer.teacher import Sampling, recorded
from slmops_trainer.train import TrainReport, train

TEACHER, BEFORE, TRAINING, AFTER = "Evaluating teacher", "Evaluating base", "Training", "Evaluating"
PLAN = [
    Stage("Pulling prompts data", 1), Stage("Pulling evaluation data", 1), Stage("Pulling", 1), Stage("Loading", 1),
    Stage(synthetic.GENERATING, 38), Stage(synthetic.FILTERING, 1), Stage(TEACHER, 6), Stage(BEFORE, 4),
    Stage(TRAINING, 40), Stage(AFTER, 5), Stage("Publishing", 2),
]  # fmt: skip


def run(ctx: Context) -> RunResult:
    """Ask, filter, measure, train, measure, publish. What can be known to fail does so before the teacher is asked.

    Raises RunFailure.
    """
    spec = ctx.spec.distill
    assert spec is not None  # main chose this recipe by it
    ctx.board.plan(PLAN)
    done = publish.earlier(ctx, spec.evaluation)
    if done is not None:
        return done
    settings, rules = spec.data.generation, spec.data.filters
    schema = filters.load_schema(rules.json_schema.name, rules.json_schema.key) if rules.json_schema else None
    terms = _terms(ctx, spec)
    prompts = data.load(ctx, spec.data.prompts, "prompts")
    held_out = _held_out(ctx, spec, prompts)
    inputs = publish.inputs_of(
        prompts.digest, held_out.digest if held_out else None, json.dumps(schema.schema) if schema else None
    )
    publish.check_rejected(ctx, spec.evaluation, inputs)
    folder, base = models.fetch(ctx, "student")
    ctx.report("Loading", 0, 1, ctx.spec.model.uri)
    began = ctx.began()
    loaded = models.load(folder, ctx.spec.model.uri, began)
    gold = _instructed(held_out, settings.system_prompt)
    # As for training, or thoughts of earlier answers would not fit the template of a student that was tuned before.
    known = (replace(example, answer=None) for example in prompts.items)
    chat_text.complete(loaded.tokenizer, (*known, *(gold.items if gold else ())))
    unfit = synthetic.unfit(ctx, loaded, prompts, spec)
    _watched(loaded, spec, gold)  # for what it raises, before any answer is paid for
    _check_held_out(loaded, gold, spec.evaluation)
    store = answers.Answers(ctx.checkpoints.folder / answers.PART)
    with ctx.told("Looking for answers", "store"):
        store.recall(answers.shared(ctx, "answers"))
    try:
        examples, manifest = synthetic.make(ctx, spec, terms, loaded, prompts, held_out, schema, store, unfit, inputs)
        _measure_teacher(ctx, spec, terms, gold, store)
    finally:
        with ctx.told("Leaving answers", "store"):  # which ends at once when the pod is asked to stop
            store.share(answers.shared(ctx, "answers-now"), patience=QUICK if ctx.stop.is_set() else None)
    del store, prompts  # training needs their memory
    chat_text.complete(loaded.tokenizer, (*examples.items, *(gold.items if gold else ())))
    watched = _watched(loaded, spec, gold)
    limit = spec.training.max_length
    encoded = encoding.encode(
        loaded.tokenizer, examples.items, loaded.stop_ids, "assistant", limit, examples.source, ctx.check
    )
    kept = len(examples.items)
    examples = replace(examples, items=())  # its text is not held while it is trained on
    ctx.check()
    _measure(ctx, loaded, spec.evaluation, gold, BEFORE, "base_", base.digest)
    ctx.keep()
    report = train(
        ctx, loaded.model, loaded.tokenizer, encoded.items, spec.training,
        base=base.digest, evaluation=watched, stage=TRAINING,
    )  # fmt: skip
    ctx.check()
    student = ctx.work / "trained"
    models.write(loaded, loaded.model, student)
    _measure(ctx, models.load(student, "the trained student", began), spec.evaluation, gold, AFTER, "")
    _count(ctx, report, kept, encoded.too_long, spec.evaluation)
    origin = publish.Origin(
        ctx.spec.model.uri,
        # The set's own ancestors, the teacher among them, are the student's too.
        base.model_copy(update={"lineage": (*manifest.lineage, *base.lineage)}),
        ctx.spec.model.name,
        (examples.parent,),
    )
    recipe = {
        **spec.wire(),
        "teacher": recorded(terms.endpoint),
        "evaluationDigest": gold.digest if gold else None,
    }
    title = f"A student of {terms.endpoint.name or terms.endpoint.model}, distilled for {spec.task_type}."
    return publish.publish(
        ctx, student, origin, spec.evaluation, inputs=inputs, recipe=recipe, seed=spec.training.seed, title=title
    )


def _terms(ctx: Context, spec: DistillationJobSpec) -> generation.Terms:
    """How training answers are asked for. Raises RunFailure(BadSpec) without a teacher, AccessDenied without a key."""
    endpoint, settings = ctx.spec.teacher, spec.data.generation
    if endpoint is None:
        raise RunFailure("BadSpec", "The run names no teacher.")
    key, secret = None, read_secret(endpoint.secret)
    if secret is not None:
        key = secret.get(endpoint.key or "", "").strip()
        if not key or not key.isascii() or not key.isprintable():
            where = f"Secret {endpoint.secret}, key {endpoint.key},"
            raise RunFailure("AccessDenied", f"{where} holds no usable API key. Put the teacher's key there.")
    return generation.Terms(
        endpoint=endpoint,
        key=key,
        sampling=synthetic.sampling(settings),
        concurrency=settings.concurrency,
        timeout=settings.request_timeout_seconds,
        min_success_ratio=settings.min_success_ratio,
        budget=settings.max_total_tokens,
        trust=_trust(endpoint, secret),
    )


def _trust(endpoint: TeacherEndpoint, secret: dict[str, str] | None) -> ssl.SSLContext:
    """The usual authorities, and what stands as ca.crt in the Secret. Raises RunFailure(AccessDenied)."""
    try:
        return trusted(secret)
    except ArtifactError as error:
        raise from_artifact(error.from_secret(endpoint.secret)) from error


def _held_out(ctx: Context, spec: DistillationJobSpec, prompts: Examples) -> Examples | None:
    """The evaluation set. Raises RunFailure(BadDataset) if the prompts hold some of it and nobody takes them out."""
    if spec.evaluation is None:
        return None
    found = data.load(ctx, spec.evaluation.dataset, "evaluation")
    if not spec.data.filters.decontaminate:
        data.refuse_leaks(prompts, found)
    # A metric that the references do not allow is known before any answer is paid for.
    evaluate.check(found.references, spec.evaluation.metrics)
    return found


def _instructed(held_out: Examples | None, system: str | None) -> Examples | None:
    """The held-out questions as they are asked: behind the system prompt that the student learns with."""
    if held_out is None:
        return None
    return replace(held_out, items=tuple(synthetic.instructed(item, system) for item in held_out.items))


def _check_held_out(loaded: models.Loaded, gold: Examples | None, evaluation: Evaluation | None) -> None:
    """Raise what the student's evaluation would: its chat template may take the prompts and not what is held out."""
    if gold is None or evaluation is None:
        return
    for item in gold.items:
        encoding.encode_prompt(loaded.tokenizer, item)
    if "perplexity" in evaluation.metrics:
        longest = loaded.tokenizer.model_max_length
        encoding.encode(loaded.tokenizer, gold.items, loaded.stop_ids, "assistant", longest)


def _measure_teacher(
    ctx: Context, spec: DistillationJobSpec, terms: generation.Terms, held_out: Examples | None, store: answers.Answers
) -> None:
    """The teacher's own score on the held-out questions; a question that it does not answer counts as wrong.

    It is taken once, for such a question would be asked and paid for by each pod anew.
    """
    if held_out is None or spec.evaluation is None or not evaluate.of_answers(spec.evaluation.metrics):
        return
    gold, evaluation, settings = held_out, spec.evaluation, spec.data.generation
    teacher, seed = answers.teacher_key(terms.endpoint), spec.training.seed

    def take() -> dict[str, float]:
        # Thoughts need room before the answer, and many teachers think aside, unasked.
        longest = max(evaluation.max_tokens, settings.max_tokens)
        greedy = replace(terms, sampling=Sampling(0.0, 1.0, longest), min_success_ratio=0.0, budget=None)
        prompted = [synthetic.instructed(item, None, think=settings.chain_of_thought) for item in gold.items]
        asked = questions.make(synthetic.wire(prompted), 1, teacher, greedy.sampling, seed, ctx.check)
        generation.ask_all(ctx, asked, greedy, store, TEACHER)
        replies = [store.get(question.key) for question in asked]
        texts = [_answer(reply.text, think=settings.chain_of_thought) if reply else "" for reply in replies]
        return evaluate.evaluate(texts, gold.references, evaluation.metrics)

    whom = hashlib.sha256(teacher.encode()).hexdigest()  # the URL, which may hold a key, is nothing for the store
    for name, value in measure.kept(ctx, TEACHER, gold, whom, take).items():
        ctx.metric(f"teacher_{name}", value)


def _answer(text: str, *, think: bool) -> str:
    return (filters.after_thoughts(text) or "") if think else text


def _measure(
    ctx: Context,
    loaded: models.Loaded,
    evaluation: Evaluation | None,
    held_out: Examples | None,
    stage: str,
    prefix: str,
    origin: str = "",
) -> None:
    """Evaluate and put the metrics into the result; what an earlier pod measured of the base, `origin`, stands."""
    if held_out is None or evaluation is None:
        return
    if origin:
        values = measure.once(ctx, loaded, held_out, evaluation, stage, origin)
    else:
        _, values = measure.measure(ctx, loaded, held_out, evaluation, stage)
    for name, value in values.items():
        ctx.metric(f"{prefix}{name}", value)


def _watched(loaded: models.Loaded, spec: DistillationJobSpec, held_out: Examples | None) -> tuple[Any, ...]:
    """The evaluation set as early stopping measures it."""
    if spec.training.early_stopping is None:
        return ()
    if held_out is None:
        raise RunFailure("BadSpec", "training.earlyStopping needs an evaluation set: give spec.evaluation.")
    limit = spec.training.max_length
    return encoding.encode(loaded.tokenizer, held_out.items, loaded.stop_ids, "assistant", limit).items


def _count(ctx: Context, report: TrainReport, examples: int, too_long: int, evaluation: Evaluation | None) -> None:
    """The rest of the metrics, and their order: what does not fit into the termination message goes from the end."""
    wanted = list(evaluation.metrics) if evaluation else []
    for name in wanted:
        teacher, student = ctx.metrics.get(f"teacher_{name}"), ctx.metrics.get(name)
        if teacher and student is not None:
            ctx.metric(f"teacher_share_{name}", student / teacher)
    report.tell(ctx, examples, too_long)
    first = [f"{prefix}{name}" for prefix in ("", "teacher_", "teacher_share_", "base_") for name in wanted]
    ctx.metrics = {name: ctx.metrics[name] for name in dict.fromkeys((*first, *ctx.metrics)) if name in ctx.metrics}
