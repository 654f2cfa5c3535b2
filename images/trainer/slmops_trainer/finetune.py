"""FineTuneJob: full or LoRA fine-tuning of a causal language model."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from slmops.api.finetune import FineTuneJobSpec, Lora
from slmops.api.run import RunResult
from slmops_trainer import chat_text, data, encoding, measure, models, publish
from slmops_trainer.context import Context
from slmops_trainer.failure import RunFailure
from slmops_trainer.progress import Stage
from slmops_trainer.train import train

BEFORE, TRAINING, AFTER = "Evaluating base", "Training", "Evaluating"
PLAN = [
    Stage("Pulling", 2), Stage("Pulling training data", 1), Stage("Pulling evaluation data", 1), Stage(BEFORE, 8),
    Stage(TRAINING, 78), Stage(AFTER, 8), Stage("Publishing", 2),
]  # fmt: skip


def run(ctx: Context) -> RunResult:
    """Pull, measure, train, measure, publish. Raises RunFailure."""
    spec = ctx.spec.finetune
    assert spec is not None  # main chose this recipe by it
    ctx.board.plan(PLAN)
    done = publish.earlier(ctx, spec.evaluation)
    if done is not None:
        return done
    training = data.load(ctx, spec.dataset, "training")
    held_out = data.load(ctx, spec.evaluation.dataset, "evaluation") if spec.evaluation else None
    if held_out is not None:
        data.refuse_leaks(training, held_out)
    inputs = publish.inputs_of(training.digest, held_out.digest if held_out else None)
    publish.check_rejected(ctx, spec.evaluation, inputs)
    folder, base = models.fetch(ctx, "base")
    ctx.report("Loading", 0, 1, ctx.spec.model.uri)
    began = ctx.began()
    loaded = models.load(folder, ctx.spec.model.uri, began)
    chat_text.complete(loaded.tokenizer, (*training.items, *(held_out.items if held_out else ())))
    limit = spec.training.max_length
    encoded = encoding.encode(
        loaded.tokenizer, training.items, loaded.stop_ids, spec.loss_on, limit, training.source, ctx.check
    )
    examples, training = len(training.items), replace(training, items=())  # its text is not held while it is trained on
    ctx.check()
    # What can be known to fail does so before anything is measured.
    watched = _watched(loaded, spec, held_out)
    model = adapt(loaded.model, spec.lora or Lora(), spec.training.seed) if spec.method == "lora" else loaded.model
    with model.disable_adapter() if spec.method == "lora" else nullcontext():
        _measure(ctx, loaded, spec, held_out, BEFORE, "base_", base.digest)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    report = train(
        ctx, model, loaded.tokenizer, encoded.items, spec.training,
        base=base.digest, evaluation=watched, stage=TRAINING,
    )  # fmt: skip
    ctx.check()
    tuned = ctx.work / "tuned"
    written = write(loaded, model, spec, tuned, ctx.spec.model.uri, began)
    _measure(ctx, written, spec, held_out, AFTER, "")
    report.tell(ctx, examples, encoded.too_long)
    # The main metrics first: what does not fit into the termination message goes from the end.
    ctx.metrics = dict(sorted(ctx.metrics.items(), key=lambda item: _rank(item[0], spec)))
    origin = publish.Origin(ctx.spec.model.uri, base, ctx.spec.model.name, (training.parent,))
    recipe = {
        **spec.wire(),
        "evaluationDigest": held_out.digest if held_out else None,
        "trainableParameters": trainable,
    }
    title = f"A causal language model, fine-tuned ({spec.method})."
    return publish.publish(
        ctx, tuned, origin, spec.evaluation, inputs=inputs, recipe=recipe, seed=spec.training.seed, title=title
    )


def adapt(model: Any, lora: Lora, seed: int) -> Any:
    """Put fresh LoRA adapters on the model; only they are trainable. Raises RunFailure(BadSpec)."""
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora.target_modules or [])
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else "all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        what = (str(error).strip().splitlines() or [""])[0][:300]
        raise RunFailure("BadSpec", f"lora.targetModules {lora.target_modules} cannot be adapted: {what}") from error


def _check_targets(model: Any, wanted: Sequence[str]) -> None:
    """Every name has to mean something: peft is content when one of them does. Raises RunFailure(BadSpec)."""
    names = [name for name, _ in model.named_modules()]
    absent = [target for target in wanted if not any(_means(target, name) for name in names)]
    if absent:
        leaves = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
        raise RunFailure(
            "BadSpec",
            f"lora.targetModules {', '.join(absent)} fits no module of the model; it has {', '.join(leaves)}.",
        )
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    shared = [name for name, module in model.named_modules() if module in ends]
    tied = [target for target in wanted if any(_means(target, name) for name in shared)]
    if tied and model.config.tie_word_embeddings:
        raise RunFailure(
            "BadSpec",
            f"lora.targetModules {tied[0]}: the model's first and last layer share their weights, "
            "so an adapter for one of them cannot be merged. Leave it out.",
        )


def _means(target: str, name: str) -> bool:
    """Whether peft takes the module of this name for the target: by its whole name, or by the end of it."""
    return name == target or name.endswith(f".{target}")


def write(
    loaded: models.Loaded, model: Any, spec: FineTuneJobSpec, folder: Path, base_uri: str, began: datetime
) -> models.Loaded:
    """Write the result and give it back as it will be read: evaluation judges what is published, not what was meant.

    A model that is written whole has lost its weights afterwards, in `model` as in `loaded`.
    """
    if spec.method == "lora" and spec.merge is False:
        model.peft_config["default"].base_model_name_or_path = base_uri
        # Without save_embedding_layers=False peft would look the base up on the Hub.
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        models.copy_tokenizer(loaded, folder)
        return models.Loaded(folder, model, loaded.tokenizer, loaded.stop_ids, loaded.dtype)
    whole = model.merge_and_unload() if spec.method == "lora" else model
    models.write(loaded, whole, folder)
    whole.to("meta")  # two models side by side need more memory than the training of an adapter did
    return models.load(folder, "the tuned model", began)


def _measure(
    ctx: Context,
    loaded: models.Loaded,
    spec: FineTuneJobSpec,
    held_out: data.Examples | None,
    stage: str,
    prefix: str,
    origin: str = "",
) -> None:
    """Evaluate and put the metrics into the result; what an earlier pod measured of the base, `origin`, stands."""
    if held_out is None or spec.evaluation is None:
        return
    if origin:
        values = measure.once(ctx, loaded, held_out, spec.evaluation, stage, origin)
    else:
        _, values = measure.measure(ctx, loaded, held_out, spec.evaluation, stage)
    for name, value in values.items():
        ctx.metric(f"{prefix}{name}", value)


def _watched(
    loaded: models.Loaded, spec: FineTuneJobSpec, held_out: data.Examples | None
) -> tuple[encoding.Encoded, ...]:
    """The evaluation set as early stopping measures it."""
    if spec.training.early_stopping is None:
        return ()
    if held_out is None:
        raise RunFailure("BadSpec", "training.earlyStopping needs an evaluation set: give spec.evaluation.")
    return encoding.encode(
        loaded.tokenizer, held_out.items, loaded.stop_ids, spec.loss_on, spec.training.max_length
    ).items


def _rank(name: str, spec: FineTuneJobSpec) -> int:
    wanted = list(spec.evaluation.metrics) if spec.evaluation else []
    order = [*wanted, *(f"base_{metric}" for metric in wanted), "loss"]
    return order.index(name) if name in order else len(order)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D)
