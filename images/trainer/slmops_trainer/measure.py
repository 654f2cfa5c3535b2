"""The evaluation of a model on held-out examples, as fine-tuning and distillation both do it."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

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

    Raises RunFailure(Interrupted) between two batches, RunFailure(BadDataset) when a metric cannot be taken.
    """
    # A metric that the references do not allow is known before any answer is paid for.
    evaluate.evaluate(examples.references, examples.references, evaluation.metrics)
    texts = [name for name in evaluation.metrics if name != "perplexity"]
    total = len(examples.items)

    def on_batch(done: int, _: int) -> None:
        ctx.check()
        ctx.report(stage, done, total, f"{done} of {total} answers")

    answers: list[str] = []
    if texts:
        answers = generate.generate(
            loaded.model, loaded.tokenizer, examples.items, evaluation.max_tokens, evaluation.batch_size,
            stop_ids=loaded.stop_ids, on_batch=on_batch,
        )  # fmt: skip
    values = evaluate.evaluate(answers, examples.references, texts) if texts else {}
    if "perplexity" in evaluation.metrics:
        values["perplexity"] = _perplexity(loaded, examples.items, evaluation.batch_size)
    return answers, {name: values[name] for name in evaluation.metrics}


def remembered(ctx: "Context", name: str) -> dict[str, float] | None:
    """A measurement that an earlier pod of this run left in the checkpoint."""
    ctx.checkpoints.load()
    path = ctx.checkpoints.folder / PART / f"{name}.json"
    found: dict[str, float] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def remember(ctx: "Context", name: str, values: dict[str, float]) -> None:
    """Put a measurement into the checkpoint's folder; the next save publishes it."""
    path = ctx.checkpoints.folder / PART / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _perplexity(loaded: Loaded, items: Sequence[Example], batch_size: int) -> float:
    encoded = encoding.encode(loaded.tokenizer, items, loaded.stop_ids, "assistant", loaded.tokenizer.model_max_length)
    return generate.perplexity(loaded.model, encoded.items, generate.pad_id(loaded.tokenizer), batch_size)
