"""QuantizedModel: a transformers model becomes an ONNX model at a precision, checked, measured, and held at a gate."""

import gc
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from slmops.api.batch import Evaluation
from slmops.api.meta import Artifact
from slmops.api.quantized import Gate
from slmops.api.run import RunResult
from slmops_artifacts import Manifest, Parent, pinned
from slmops_trainer import (
    conversion,
    convertible,
    data,
    encoding,
    evaluate,
    generate,
    measure,
    models,
    onnx_build,
    onnx_graph,
    publish,
    result,
)
from slmops_trainer.context import Context
from slmops_trainer.data import Example, Examples, Message
from slmops_trainer.failure import RunFailure
from slmops_trainer.onnx_generate import OnnxModel
from slmops_trainer.progress import Stage

CHECKING, BEFORE, AFTER = "Checking", "Evaluating source", "Evaluating"
PLAN = [
    Stage("Pulling evaluation data", 1), Stage("Pulling", 5), Stage(onnx_build.STAGE, 40), Stage("Loading", 4),
    Stage(BEFORE, 20), Stage(CHECKING, 5), Stage(AFTER, 20), Stage("Publishing", 5),
]  # fmt: skip
PACKAGES = ("olive-ai", "onnx", "onnxruntime", "onnxruntime-genai")
FORM = 2  # raise it when another folder is made of what Olive builds: a run then takes over none of an older trainer
CONFIG = "genai_config.json"
EPSILON = 1e-9  # that sums of floats may be off
EXCERPT = 160  # characters of an answer in messages
LOOKED_AT = 8  # examples, for one that the source answers wrongly
PROBE = Example((Message("user", "Hello"),), None)

log = logging.getLogger("slmops")


def run(ctx: Context) -> RunResult:
    """Pull, convert, check the graph, generate, compare with the source, publish. Raises RunFailure."""
    spec = ctx.spec.quantize
    assert spec is not None  # main chose this recipe by it
    ctx.board.plan(PLAN)
    done = _earlier(ctx, spec.gate)
    if done is not None:
        return done
    held_out = _held_out(ctx, spec.gate)
    _check_rejected(ctx, spec.gate, held_out)
    uri = ctx.spec.model.uri
    folder, source = models.fetch(ctx, "source", convertible.refuse)
    convertible.refuse(models.check(folder, uri), uri)
    origin = {"source": source.digest, "olive": onnx_build.options(spec), "versions": _versions(), "form": FORM}
    made, fresh = conversion.recall(ctx, origin), ctx.work / "onnx"
    if made is None:
        onnx_build.build(ctx, folder, fresh, onnx_build.options(spec), uri)
        ctx.check()
    ctx.report("Loading", 0, 1, uri)
    loaded = models.load(folder, uri, ctx.began())
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    if made is None:
        onnx_graph.slide(fresh, onnx_graph.windows(loaded.model.config), uri)
    facts = onnx_graph.read(made or fresh)
    if made is None:
        onnx_graph.check(facts, spec, parameters)
        finish(loaded, fresh)
    out = made or conversion.keep(ctx, fresh, origin)
    _measure_source(ctx, loaded, spec.gate, held_out, source.digest)
    _warn_of_blind_gate(ctx, loaded, spec.gate, held_out)
    # What the source says is known: its memory is needed by now, its tokenizer goes on being used.
    loaded = replace(loaded, model=None)
    gc.collect()
    ctx.report(CHECKING, 0, 1, "Loading the converted model")
    model = OnnxModel(out)
    ctx.metric("load_seconds", model.load_seconds)
    model.probe(encoding.encode_prompt(loaded.tokenizer, PROBE))
    _measure_result(ctx, loaded, model, spec.gate, held_out)
    _sizes(ctx, folder, out, parameters, facts.kv_bytes)
    return _publish(ctx, out, source, held_out)


def finish(loaded: models.Loaded, out: Path) -> None:
    """Make the builder's folder complete: the source's tokenizer files, every stop token, no provider but the CPU."""
    models.copy_tokenizer(loaded, out)
    path = out / CONFIG
    config = json.loads(path.read_text())
    model = config["model"]
    declared = model.get("eos_token_id")
    known = declared if isinstance(declared, list) else [] if declared is None else [declared]
    model["eos_token_id"] = list(dict.fromkeys((*loaded.stop_ids, *known)))
    # The fp16 graph is built for CUDA (see onnx_build), but our server has the CPU alone; others choose for themselves.
    model["decoder"]["session_options"]["provider_options"] = []
    path.write_text(json.dumps(config, indent=2))
    # Some tokenizers say 1e30 where they mean no limit: too large an integer for the JSON readers of other languages.
    settings = out / "tokenizer_config.json"
    if settings.is_file():
        found = json.loads(settings.read_text())
        found["model_max_length"] = model["context_length"]
        settings.write_text(json.dumps(found, indent=2, ensure_ascii=False))


def delta(metric: str, before: float, after: float) -> float:
    """How much the gate's metric got worse: absolute, and for perplexity the relative rise; below 0 it got better."""
    return (after - before) / before if metric == "perplexity" else before - after


def columns(metrics: Mapping[str, float], gate: Gate | None) -> dict[str, str]:
    """The texts of the table, from the metrics of the run."""
    found = {"size": f"{_human(metrics['size_bytes'])} ({metrics['size_ratio'] - 1:+.0%})".replace("%", " %")}
    if gate is not None:
        drop = metrics["drop"]
        value = f"{drop:+.1%} perplexity".replace("%", " %") if gate.metric == "perplexity" else f"{0 - drop:+.3f}"
        found |= {"delta": value, "quality": result.quality(gate.metric, metrics[gate.metric])}
    return found


def _earlier(ctx: Context, gate: Gate | None) -> RunResult | None:
    """The result, if an earlier pod published it."""
    found = ctx.existing()
    if found is None:
        return None
    artifact, manifest = found
    return result.success(artifact, manifest, **columns(manifest.metrics, gate))


def _check_rejected(ctx: Context, gate: Gate | None, held_out: Examples | None) -> None:
    """Raise RunFailure(GateFailed) if an earlier pod published a model that this very gate rejected."""
    if gate is None:
        return
    rejected = publish.existing(ctx, publish.rejected_uri(ctx.spec.output), _inputs(held_out))
    if rejected is not None:
        ctx.metrics.update(rejected[1].metrics)
        raise _failed(gate, ctx.metrics, rejected[0])


def _inputs(held_out: Examples | None) -> str:
    return publish.inputs_of(held_out.digest if held_out else None)


def _held_out(ctx: Context, gate: Gate | None) -> Examples | None:
    if gate is None:
        return None
    found = data.load(ctx, gate.dataset, "evaluation")
    # A metric that the references do not allow is known before anything is converted.
    evaluate.check(found.references, [gate.metric])
    return found


def _measure_source(
    ctx: Context, loaded: models.Loaded, gate: Gate | None, held_out: Examples | None, origin: str
) -> None:
    """The score of the source, `origin`; what an earlier pod measured is not measured again."""
    if gate is None or held_out is None:
        return
    asked = Evaluation(dataset=gate.dataset, metrics=[gate.metric], max_tokens=gate.max_tokens)
    values = measure.once(ctx, loaded, held_out, asked, BEFORE, origin)
    ctx.keep()
    ctx.metric(f"source_{gate.metric}", values[gate.metric])


def _warn_of_blind_gate(ctx: Context, loaded: models.Loaded, gate: Gate | None, held_out: Examples | None) -> None:
    """Say so if nothing could fail the gate: the source itself gets too little right, and what it answers instead."""
    if gate is None or held_out is None or gate.metric == "perplexity" or gate.max_drop >= 1:
        return
    score = ctx.metrics[f"source_{gate.metric}"]
    if score > gate.max_drop + EPSILON:
        return
    log.warning(
        "No result can fail the gate: %s of the source is %.4g on its %d examples, and maxDrop allows a loss of %g. "
        "%sUse examples of what the source answers, a larger gate.maxTokens if it is cut off, or gate.metric: "
        "perplexity.",
        gate.metric, score, len(held_out.items), gate.max_drop, _wrong_answer(ctx, loaded, gate, held_out),
    )  # fmt: skip


def _wrong_answer(ctx: Context, loaded: models.Loaded, gate: Gate, held_out: Examples) -> str:
    """What the source answers wrongly, in a sentence; empty if it gets the first examples right."""
    asked = held_out.items[:LOOKED_AT]
    answers = generate.generate(
        loaded.model, loaded.tokenizer, asked, gate.max_tokens, LOOKED_AT, stop_ids=loaded.stop_ids, check=ctx.check
    )
    for example, said in zip(asked, answers, strict=True):
        wanted = example.answer or ""
        if evaluate.SCORES[gate.metric](said, wanted) < 1:
            return (
                f"To line {example.line} of {held_out.source} the source answers {said[:EXCERPT]!r}; wanted is "
                f"{wanted[:EXCERPT]!r}. "
            )
    return ""


def _measure_result(
    ctx: Context, loaded: models.Loaded, model: OnnxModel, gate: Gate | None, held_out: Examples | None
) -> None:
    """The converted model's score on the same examples, and what was lost; what an earlier pod measured stands."""
    if gate is None or held_out is None:
        return
    found = conversion.measured(ctx, held_out.digest)
    if not found:
        found = _answer_all(ctx, loaded, model, gate, held_out)
        conversion.note(ctx, held_out.digest, found)
    for name, value in found.items():
        ctx.metric(name, value)
    ctx.metric("drop", delta(gate.metric, ctx.metrics[f"source_{gate.metric}"], ctx.metrics[gate.metric]))


def _answer_all(
    ctx: Context, loaded: models.Loaded, model: OnnxModel, gate: Gate, held_out: Examples
) -> dict[str, float]:
    """The gate's metric of the converted model, and its speed where it had to answer."""
    total = len(held_out.items)

    def on_row(done: int, of: int) -> None:
        ctx.check()
        ctx.report(AFTER, done, of, f"{done} of {of} answers")

    if gate.metric == "perplexity":
        rows = encoding.encode(loaded.tokenizer, held_out.items, loaded.stop_ids, "assistant", model.context).items
        return {gate.metric: math.exp(min(700.0, model.mean_loss(rows, on_row)))}
    answers: list[str] = []
    began, tokens = time.monotonic(), 0
    for number, example in enumerate(held_out.items, 1):
        ids = model.answer(encoding.encode_prompt(loaded.tokenizer, example), gate.max_tokens)
        answers.append(encoding.decode_answer(loaded.tokenizer, ids))
        tokens += len(ids)
        on_row(number, total)
    speed = tokens / max(1e-9, time.monotonic() - began)  # one stream, prompts included
    return {"tokens_per_second": speed, **evaluate.evaluate(answers, held_out.references, [gate.metric])}


def _sizes(ctx: Context, folder: Path, out: Path, parameters: int, kv_bytes: int) -> None:
    """Bytes of the files that hold weights, against the weights in fp32 and against the source's files."""
    size = onnx_graph.weight_bytes(out)
    before = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    ctx.metric("size_bytes", size)
    ctx.metric("size_ratio", size / (4 * parameters))
    ctx.metric("source_size_bytes", before)
    ctx.metric("source_size_ratio", size / before)
    ctx.metric("parameters", parameters)
    ctx.metric("kv_bytes_per_token", kv_bytes)


def _publish(ctx: Context, out: Path, source: Manifest, held_out: Examples | None) -> RunResult:
    spec = ctx.spec.quantize
    assert spec is not None
    gate = spec.gate
    if gate is not None:
        # The main metrics first: what does not fit into the termination message goes from the end.
        first = (gate.metric, f"source_{gate.metric}", "drop")
        ctx.metrics = {name: ctx.metrics[name] for name in dict.fromkeys((*first, *ctx.metrics))}
    manifest = Manifest(
        kind="model",
        parents=(
            Parent(
                kind="model",
                uri=pinned(ctx.spec.model.uri, source),
                digest=source.digest,
                name=ctx.spec.model.name,
            ),
        ),
        lineage=source.lineage,
        dataset_digest=source.dataset_digest,
        recipe={**spec.wire(), "olive": onnx_build.options(spec), "gateDigest": held_out.digest if held_out else None},
        versions=_versions(),
        metrics=dict(ctx.metrics),
        annotations={publish.ANNOTATION_INPUTS: _inputs(held_out)},
        created=ctx.started,
    )
    title = f"An ONNX model for onnxruntime-genai, weights in {spec.precision}."
    (out / "README.md").write_text(publish.card(ctx, manifest, title, "onnxruntime-genai"), encoding="utf-8")
    failed = gate is not None and ctx.metrics["drop"] > gate.max_drop + EPSILON
    artifact, pushed = ctx.push(out, manifest, publish.rejected_uri(ctx.spec.output) if failed else ctx.spec.output)
    if failed and gate is not None:
        raise _failed(gate, ctx.metrics, artifact)
    return result.success(artifact, pushed, **columns(ctx.metrics, gate))


def _versions() -> dict[str, str]:
    return {**publish.versions(), **{name: metadata.version(name) for name in PACKAGES}}


def _failed(gate: Gate, metrics: Mapping[str, float], artifact: Artifact) -> RunFailure:
    name = gate.metric
    verb = "rose" if name == "perplexity" else "fell"
    return RunFailure(
        "GateFailed",
        f"{name} {verb} from {metrics[f'source_{name}']:.4g} to {metrics[name]:.4g}, a loss of {metrics['drop']:.4g}; "
        f"gate.maxDrop allows {gate.max_drop:g}. The model is kept at {artifact.uri}. Use a smaller blockSize, "
        "symmetric: false, precision fp16, or allow more.",
    )


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.1f} GB"
