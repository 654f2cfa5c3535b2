"""The evaluation of a model on held-out examples, as fine-tuning and distillation both do it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slmops.api.batch import Evaluation
from slmops_trainer import encoding, evaluate, generate
from slmops_trainer.data import Example, Examples
from slmops_trainer.models import Loaded

if TYPE_CHECKING:
    from slmops_trainer.context import Context

PART = "evaluation"  # the checkpoint's subfolder


def measure(
    ctx: "Context", loaded: Loaded, examples: Examples, evaluation: Evaluation, stage: str
) -> tuple[list[str], dict[str, float]]:
    """Answer every held-out question greedily. Returns the answers, in order, and each metric asked for.

    Raises RunFailure(Interrupted) between two tokens, RunFailure(BadDataset) when a metric cannot be taken.
    """
    # A metric that the references do not allow is known before any answer is paid for.
    evaluate.check(examples.references, evaluation.metrics)
    texts = evaluate.of_answers(evaluation.metrics)
    total = len(examples.items)

    def on_batch(done: int, _: int) -> None:
        ctx.check()
        ctx.report(stage, done, total, f"{done} of {total} answers")

    answers: list[str] = []
    if texts:
        answers = generate.generate(
            loaded.model, loaded.tokenizer, examples.items, evaluation.max_tokens, evaluation.batch_size,
            stop_ids=loaded.stop_ids, on_batch=on_batch, check=ctx.check,
        )  # fmt: skip
    values = evaluate.evaluate(answers, examples.references, texts) if texts else {}
    if "perplexity" in evaluation.metrics:
        values["perplexity"] = _perplexity(loaded, examples.items, evaluation.batch_size, on_batch)
    return answers, {name: values[name] for name in evaluation.metrics}


def once(
    ctx: "Context", loaded: Loaded, examples: Examples, evaluation: Evaluation, stage: str, origin: str
) -> dict[str, float]:
    """The metrics of a model that the run did not make: what an earlier pod measured is not measured again.

    `origin`: the model's digest. Raises the failures of `measure` and of the store.
    """
    # What the run is to learn decides over the template that all are asked with (chat_text.complete).
    template = hashlib.sha256((loaded.tokenizer.chat_template or "").encode()).hexdigest()
    return kept(
        ctx, stage, examples, f"{origin} {template}", lambda: measure(ctx, loaded, examples, evaluation, stage)[1]
    )


def kept(
    ctx: "Context", stage: str, examples: Examples, origin: str, take: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """What an earlier pod measured in `stage`, else what `take` gives.

    Only of the same model, which `origin` identifies with how it is asked, on the same examples and by the same scores
    is it the same: a tag may have moved, a ConfigMap been edited and the trainer been upgraded since. The measurement
    goes into the checkpoint's folder; the next save publishes it.
    """
    ctx.resume()
    path = ctx.checkpoints.folder / PART / f"{stage}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    of = {"examples": examples.digest, "model": origin, "scoring": evaluate.SCORING}
    if {name: found.get(name) for name in of} != of:
        found = {**of, "metrics": take()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    metrics: dict[str, float] = found["metrics"]
    return metrics


def _perplexity(loaded: Loaded, items: Sequence[Example], batch_size: int, on_batch: generate.OnBatch) -> float:
    encoded = encoding.encode(loaded.tokenizer, items, loaded.stop_ids, "assistant", loaded.tokenizer.model_max_length)
    return generate.perplexity(loaded.model, encoded.items, generate.pad_id(loaded.tokenizer), batch_size, on_batch)
