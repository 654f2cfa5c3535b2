"""Real Olive runs on a tiny model: what the graph holds, what it answers, what the gate lets pass."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import chat, task

from slmops.api.quantized import Gate, QuantizedModelSpec
from slmops.api.run import Input, RunResult
from slmops_artifacts import ArtifactError, Manifest, Parent, hub, read_manifest
from slmops_trainer import context, evaluate, generate, models, onnx_build, onnx_graph, quantize
from slmops_trainer.context import Context
from slmops_trainer.data import Example, Examples, Message
from slmops_trainer.failure import RunFailure
from slmops_trainer.onnx_generate import OnnxModel

PARAMETERS = 139_840  # of the tiny model: the tied embedding counts once
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def spec(**more: Any) -> QuantizedModelSpec:
    return QuantizedModelSpec.model_validate({"source": {"uri": "pvc://models/tiny"}, **more})


def graph(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


@pytest.fixture(scope="module")
def lively(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with wilder weights: as it comes, it repeats its last token for ever."""
    folder = tmp_path_factory.mktemp("lively")
    loaded = models.load(tiny_model, "tiny")
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
            else:  # the builder leaves out biases that are all zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    models.write(loaded, loaded.model, folder)
    return folder


@pytest.fixture(scope="module")
def own_answers(lively: Path) -> list[tuple[str, str]]:
    """What the model itself answers: an exact conversion matches all of it."""
    loaded = models.load(lively, "lively")
    questions = [question for question, _ in task()[:12]]
    examples = [Example((Message("user", question),), None) for question in questions]
    answers = generate.generate(loaded.model, loaded.tokenizer, examples, 12, 12, stop_ids=loaded.stop_ids)
    found = [(question, answer) for question, answer in zip(questions, answers, strict=True) if answer.strip()]
    assert len(found) > 6
    return found


def test_the_converted_model_is_judged_by_what_it_says_to_the_letter(
    make_run: Callable[..., Context], tiny_model: Path
) -> None:
    loaded = models.load(tiny_model, "tiny")
    loaded.tokenizer.clean_up_tokenization_spaces = True
    said = loaded.tokenizer("Ça va ?", add_special_tokens=False)["input_ids"]
    gate = Gate.model_validate({"dataset": {"uri": "pvc://data/x"}, "metric": "exactMatch", "maxDrop": 0})
    parent = Parent(kind="dataset", uri="configmap://x/y", digest="sha256:" + "1" * 64)
    held_out = Examples((Example((Message("user", "x"),), "Ça va ?"),), "prompt-completion", "gold", parent)
    model: Any = SimpleNamespace(answer=lambda ids, limit: said)
    assert quantize._answer_all(make_run(), loaded, model, gate, held_out)["exactMatch"] == 1


@pytest.fixture
def quantized(make_run: Callable[..., Context], lively: Path) -> Callable[..., RunResult]:
    """Runs a QuantizedModel of the lively model in a new pod."""
    return lambda **more: quantize.run(make_run(model=lively, quantize=spec(**more).wire()))


@pytest.fixture
def gold(jsonl: Callable[..., str], own_answers: list[tuple[str, str]]) -> str:
    return jsonl([chat(*row) for row in own_answers], "gold")


def test_int4_quantizes_every_matrix_and_the_embedding(
    quantized: Callable[..., RunResult], gold: str, tmp_path: Path, lively: Path
) -> None:
    gate = {"dataset": {"uri": gold}, "metric": "tokenF1", "maxDrop": 1.0, "maxTokens": 12}
    result = quantized(gate=gate)
    out = tmp_path / "store/out"
    assert (result.succeeded, result.format) == (True, "onnx")
    nodes = graph(out).node
    by_type = Counter(node.op_type for node in nodes)
    assert by_type["MatMulNBits"] == 2 * 5 + 1  # qkv, out, gate, up, down of two layers, and the head
    assert by_type["MatMul"] == 0
    assert by_type["GatherBlockQuantized"] == 1
    for node in nodes:
        if node.op_type == "MatMulNBits":
            found = {attribute.name: attribute.i for attribute in node.attribute}
            assert (found["bits"], found["block_size"], found["accuracy_level"]) == (4, 32, 4)
            assert len(node.input) == 3  # no zero points
    found_metrics = result.metrics
    files = sum((out / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert found_metrics["size_bytes"] == files
    assert found_metrics["parameters"] == PARAMETERS
    assert found_metrics["size_ratio"] == pytest.approx(files / (4 * PARAMETERS))
    assert found_metrics["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # k and v, layers, kv heads, head size, fp32
    assert found_metrics["source_tokenF1"] == 1.0
    assert found_metrics["drop"] == pytest.approx(1.0 - found_metrics["tokenF1"])
    assert result.delta == f"{-found_metrics['drop']:+.3f}"
    assert result.size.startswith(f"{files / 1000:.1f} kB (-")
    assert list(found_metrics)[:3] == ["tokenF1", "source_tokenF1", "drop"]
    _is_servable(out, lively)
    assert quantized(gate=gate) == result  # a pod that lost its last word only


def test_the_lineage_names_what_was_converted_though_its_branch_moves(
    make_run: Callable[..., Context], tiny_model: Path, tmp_path: Path
) -> None:
    ctx = make_run(quantize=spec().wire())
    ctx.spec = ctx.spec.model_copy(update={"model": Input(uri="hf://org/tiny@main")})
    ctx.metrics = {"size_bytes": 1.0, "size_ratio": 0.5}
    commit = f"hf://org/tiny@{'c' * 40}"
    source = Manifest(kind="model", digest="sha256:" + "1" * 64, annotations={hub.SOURCE: commit})
    out = Path(shutil.copytree(tiny_model, tmp_path / "converted"))
    quantize._publish(ctx, out, source, None)
    manifest = read_manifest("pvc://store/out")
    assert manifest is not None
    assert [(row.uri, row.digest) for row in manifest.parents] == [(commit, source.digest)]


def _is_servable(out: Path, source: Path) -> None:
    names = {path.name for path in out.iterdir()}
    assert {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "generation_config.json", "config.json", "README.md"} <= names  # fmt: skip
    assert "model_config.json" not in names  # Olive's own, with this machine's paths in it
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 256
    config = json.loads((out / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2]
    assert config["model"]["decoder"]["session_options"]["provider_options"] == []
    assert "library_name: onnxruntime-genai" in (out / "README.md").read_text()
    manifest = read_manifest("pvc://store/out")
    assert manifest is not None
    assert manifest.recipe["olive"]["int4_block_size"] == 32
    assert manifest.versions["olive-ai"] == "0.13.0"
    assert [row.kind for row in manifest.parents] == ["model"]


@pytest.mark.parametrize(("precision", "kind", "share"), [("fp32", FLOAT, 1.0), ("fp16", FLOAT16, 0.5)])
def test_float_precisions_are_what_they_say_and_answer_like_the_source(
    quantized: Callable[..., RunResult],
    gold: str,
    tmp_path: Path,
    lively: Path,
    precision: str,
    kind: int,
    share: float,
) -> None:
    # Rounding may turn a close choice of a wild model, and with it the rest of an answer: fp16 is held to its numbers.
    metric, drop = ("exactMatch", 0.0) if precision == "fp32" else ("perplexity", 0.01)
    gate = {"dataset": {"uri": gold}, "metric": metric, "maxDrop": drop, "maxTokens": 12}
    result = quantized(precision=precision, gate=gate)
    out = tmp_path / "store/out"
    found = graph(out)
    assert {tensor.data_type for tensor in found.initializer if tensor.data_type in (FLOAT, FLOAT16)} == {kind}
    assert {value.type.tensor_type.elem_type for value in found.input if value.name.startswith("past")} == {kind}
    assert not {node.op_type for node in found.node} & set(onnx_graph.QUANTIZED)
    assert onnx_graph.read(out).floats == {precision: PARAMETERS}  # every one is there, the tied embedding once
    assert result.metrics[f"source_{metric}"] >= 1.0
    assert abs(result.metrics["drop"]) <= drop
    assert result.metrics["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4 * share
    weights = onnx.load(out / "model.onnx").graph.initializer  # with the data: what is stored is what was trained
    embedding = next(numpy_helper.to_array(tensor) for tensor in weights if tensor.name == "model.embed_tokens.weight")
    source = models.load(lively, "source").model.get_input_embeddings().weight
    assert np.allclose(embedding.astype(np.float32), source.detach().numpy(), atol=1e-6 if kind == FLOAT else 1e-3)


def test_block_size_zero_points_and_accuracy_level_reach_the_graph_and_perplexity_is_a_gate(
    quantized: Callable[..., RunResult], gold: str, tmp_path: Path
) -> None:
    gate = {"dataset": {"uri": gold}, "metric": "perplexity", "maxDrop": 1.0}
    result = quantized(blockSize=64, symmetric=False, accuracyLevel=0, gate=gate)
    settings = onnx_graph.read(tmp_path / "store/out").settings
    assert settings == {("MatMulNBits", 4, 64, 0, True), ("GatherBlockQuantized", 4, 64, 0, True)}
    found = result.metrics
    assert found["drop"] == pytest.approx(found["perplexity"] / found["source_perplexity"] - 1)
    assert found["perplexity"] == pytest.approx(found["source_perplexity"], rel=0.5)
    assert result.delta.endswith(" % perplexity")


def test_a_model_that_lost_too_much_fails_its_gate_and_is_kept_aside(
    quantized: Callable[..., RunResult], gold: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"dataset": {"uri": gold}, "metric": "exactMatch", "maxDrop": 0.5, "maxTokens": 12}
    answering = OnnxModel.answer
    monkeypatch.setattr(OnnxModel, "answer", lambda *_: [])
    for _ in range(2):  # the second pod finds what the first one left
        with pytest.raises(RunFailure) as caught:
            quantized(precision="fp32", gate=gate)
        monkeypatch.setattr(OnnxModel, "answer", answering)
        assert caught.value.reason == "GateFailed"
        assert not caught.value.retryable
        assert "exactMatch fell from 1 to 0, a loss of 1; gate.maxDrop allows 0.5" in caught.value.message
        assert "pvc://store/out-rejected" in caught.value.message
    assert not (tmp_path / "store/out").exists()
    assert (tmp_path / "store/out-rejected/model.onnx").is_file()
    with (tmp_path / "data" / gold.rpartition("/")[2] / "rows.jsonl").open("a") as stream:
        stream.write(json.dumps(chat("a mended one", "{}")) + "\n")
    assert quantized(precision="fp32", gate=gate).succeeded


def test_a_gate_that_nothing_can_fail_is_warned_of_with_what_the_source_answers(
    quantized: Callable[..., RunResult],
    jsonl: Callable[..., str],
    own_answers: list[tuple[str, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (question, said), right = own_answers[:2]
    gate = {"dataset": {"uri": jsonl([chat(*right), chat(question, "wanted")])}, "maxDrop": 0.5, "maxTokens": 12}
    assert quantized(precision="fp32", gate=gate).succeeded
    (told,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING" and "gate" in one.getMessage()]
    assert "exactMatch of the source is 0.5 on its 2 examples, and maxDrop allows a loss of 0.5" in told
    assert f"To line 2 of {gate['dataset']['uri']}" in told
    assert f"answers {said!r}; wanted is 'wanted'" in told


@pytest.mark.parametrize(
    ("metric", "allowed", "score", "warned"),
    [
        ("exactMatch", 0.02, 0.0, True),
        ("jsonValid", 0.0, 0.0, True),
        ("exactMatch", 0.02, 0.03, False),
        ("exactMatch", 1.0, 0.0, False),  # no gate is meant
        ("perplexity", 0.02, 1.0, False),
    ],
)
def test_only_gates_that_cannot_fail_are_warned_of(
    make_run: Callable[..., Context],
    tiny_model: Path,
    caplog: pytest.LogCaptureFixture,
    metric: str,
    allowed: float,
    score: float,
    warned: bool,
) -> None:
    gate = Gate.model_validate({"dataset": {"uri": "pvc://x/y"}, "metric": metric, "maxDrop": allowed, "maxTokens": 1})
    parent = Parent(kind="dataset", uri="configmap://x/y", digest="sha256:" + "1" * 64)
    held_out = Examples((Example((Message("user", "x"),), "y"),), "prompt-completion", "gold", parent)
    ctx = make_run()
    ctx.metrics[f"source_{metric}"] = score
    quantize._warn_of_blind_gate(ctx, models.load(tiny_model, "tiny"), gate, held_out)
    assert ("No result can fail the gate" in caplog.text) == warned


@pytest.mark.parametrize(("right", "told"), [(7, True), (8, False), (20, False)])
def test_few_examples_are_asked_again_for_one_that_the_source_answers_wrongly(
    make_run: Callable[..., Context],
    tiny_model: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    right: int,
    told: bool,
) -> None:
    asked: list[Example] = []

    def answer_all(model: Any, tokenizer: Any, examples: Sequence[Example], *_: Any, **__: Any) -> list[str]:
        asked.extend(examples)
        return ["y"] * len(examples)

    monkeypatch.setattr(generate, "generate", answer_all)
    gate = Gate.model_validate({"dataset": {"uri": "pvc://x/y"}, "metric": "exactMatch", "maxDrop": 0.9})
    parent = Parent(kind="dataset", uri="configmap://x/y", digest="sha256:" + "1" * 64)
    items = tuple(Example((Message("user", "x"),), "y" if at < right else "z") for at in range(30))
    ctx = make_run()
    ctx.metrics["source_exactMatch"] = right / 30
    held_out = Examples(items, "prompt-completion", "gold", parent)
    quantize._warn_of_blind_gate(ctx, models.load(tiny_model, "tiny"), gate, held_out)
    assert "No result can fail the gate" in caplog.text
    assert ("answers 'y'; wanted is 'z'. Use examples" in caplog.text) == told
    assert len(asked) == quantize.LOOKED_AT


def test_penalties_in_a_models_config_are_not_measured_with(
    make_run: Callable[..., Context], lively: Path, gold: str, tmp_path: Path
) -> None:
    """As transformers wrote them into it before there was a generation_config.json."""
    model = Path(shutil.copytree(lively, tmp_path / "old"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "repetition_penalty": 9.0}))
    gate = {"dataset": {"uri": gold}, "metric": "exactMatch", "maxDrop": 0.0, "maxTokens": 12}
    result = quantize.run(make_run(model=model, quantize=spec(precision="fp32", gate=gate).wire()))
    assert (result.metrics["source_exactMatch"], result.metrics["drop"]) == (1.0, 0.0)
    made = json.loads((tmp_path / "store/out/genai_config.json").read_text())
    assert made["search"]["repetition_penalty"] == 9.0  # for those who run it so


def test_a_store_that_is_away_in_the_end_costs_no_second_conversion(
    make_run: Callable[..., Context], lively: Path, tiny_model: Path, gold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"dataset": {"uri": gold}, "metric": "tokenF1", "maxDrop": 1.0, "maxTokens": 12}
    wanted = spec(gate=gate).wire()
    ctx = make_run(model=lively, quantize=wanted)
    ctx.store_patience = 0.0

    def away(*_: Any, **__: Any) -> Any:
        raise ArtifactError("SourceUnavailable", "The registry is away.")

    with monkeypatch.context() as patch:
        patch.setattr(context, "push", away)
        with pytest.raises(RunFailure, match="registry is away"):
            quantize.run(ctx)
    builds: list[Path] = []
    build = onnx_build.build

    def counted(ctx: Context, source: Path, *rest: Any) -> None:
        builds.append(source)
        build(ctx, source, *rest)

    def never(*_: Any) -> Any:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(onnx_build, "build", counted)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxModel, "answer", never)
        patch.setattr(generate, "generate", never)
        result = quantize.run(make_run(model=lively, quantize=wanted))
    assert (result.succeeded, builds) == (True, [])
    assert {name: result.metrics[name] for name in ctx.metrics if name != "load_seconds"} == {
        name: value for name, value in ctx.metrics.items() if name != "load_seconds"
    }
    other = make_run(model=tiny_model, output="pvc://store/other", quantize=wanted)
    moved = quantize.run(other).metrics  # the tag has moved: what was converted and measured was another model
    assert len(builds) == 1
    assert ctx.metrics["source_tokenF1"] == 1.0
    assert moved["source_tokenF1"] < 1.0


def test_an_upgraded_trainer_takes_over_neither_a_score_nor_a_model_that_it_would_make_otherwise(
    make_run: Callable[..., Context], lively: Path, gold: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = {"dataset": {"uri": gold}, "metric": "tokenF1", "maxDrop": 1.0, "maxTokens": 12}

    def pod() -> Context:
        ctx = make_run(model=lively, quantize=spec(precision="fp32", gate=gate).wire())
        ctx.store_patience = 0.0
        return ctx

    def away(*_: Any, **__: Any) -> Any:
        raise ArtifactError("SourceUnavailable", "The registry is away.")

    slide, windows = onnx_graph.slide, onnx_graph.windows
    with monkeypatch.context() as patch:
        patch.setattr(context, "push", away)
        patch.setattr(quantize, "FORM", quantize.FORM - 1)
        patch.setattr(onnx_graph, "slide", lambda folder, wanted, uri: slide(folder, [7 for _ in wanted], uri))
        with monkeypatch.context() as older:
            older.setattr(evaluate, "SCORING", evaluate.SCORING - 1)
            older.setitem(evaluate.SCORES, "tokenF1", lambda *_: -1.0)
            with pytest.raises(RunFailure, match="registry is away"):
                quantize.run(pod())
        patch.setattr(onnx_build, "build", None)  # what was converted goes on to be taken over
        ctx = pod()
        with pytest.raises(RunFailure, match="registry is away"):
            quantize.run(ctx)
        assert ctx.metrics["source_tokenF1"] == 1.0
        assert 0.0 <= ctx.metrics["tokenF1"] <= 1.0
    metrics = quantize.run(pod()).metrics
    assert (metrics["source_tokenF1"], metrics["tokenF1"]) == (1.0, 1.0)
    nodes = [node for node in graph(tmp_path / "store/out").node if node.op_type == onnx_graph.ATTENTION]
    assert [onnx_graph._window(node) for node in nodes] == windows(models.load(lively, "lively").model.config)


def test_what_olive_cannot_convert_is_named(make_run: Callable[..., Context], tiny_model: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    for path in tiny_model.iterdir():
        (odd / path.name).write_bytes(path.read_bytes())
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "architectures": ["Phi3ForCausalLM"]}))
    with pytest.raises(RunFailure, match="cannot convert") as caught:
        quantize.run(make_run(model=odd, quantize=spec(precision="fp32").wire()))
    assert caught.value.reason == "UnsupportedModel"
    assert f"file://{odd}" in caught.value.message


def test_a_pod_asked_to_stop_ends_olive(make_run: Callable[..., Context], tiny_model: Path, tmp_path: Path) -> None:
    ctx = make_run()
    report = ctx.report

    def stop(stage: str, *args: Any, **more: Any) -> None:
        report(stage, *args, **more)
        ctx.stop.set()

    ctx.report = stop  # type: ignore[method-assign]
    with pytest.raises(RunFailure) as caught:
        onnx_build.build(ctx, tiny_model, tmp_path / "never", onnx_build.options(spec()), "tiny")
    assert caught.value.reason == "Interrupted"
    assert not (tmp_path / "never").exists()


def test_being_killed_in_conversion_is_out_of_memory(
    make_run: Callable[..., Context], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = onnx_build._wait

    def kill(ctx: Context, process: Any) -> None:
        process.send_signal(signal.SIGKILL)
        wait(ctx, process)

    monkeypatch.setattr(onnx_build, "_wait", kill)
    with pytest.raises(RunFailure, match="18 bytes for each parameter") as caught:
        onnx_build.build(make_run(), tiny_model, tmp_path / "never", onnx_build.options(spec()), "tiny")
    assert caught.value.reason == "OutOfMemory"


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({}, {"precision": "int4", "int4_block_size": 32, "int4_is_symmetric": True, "int4_accuracy_level": 4,
              "int4_op_types_to_quantize": ["MatMul", "Gather"]}),
        ({"blockSize": 128, "symmetric": False, "accuracyLevel": 1},
         {"precision": "int4", "int4_block_size": 128, "int4_is_symmetric": False, "int4_accuracy_level": 1,
          "int4_op_types_to_quantize": ["MatMul", "Gather"]}),
        ({"precision": "fp16"}, {"precision": "fp16"}),
    ],
)  # fmt: skip
def test_the_spec_becomes_olives_options(more: dict[str, Any], options: dict[str, Any]) -> None:
    found = onnx_build.options(spec(**more))
    assert found.pop("extra_options") == {"hf_remote": False, "hf_token": "false"}
    assert found == options


def test_options_that_would_be_ignored_are_refused() -> None:
    known = {"precision": None, "extra_options": None}
    onnx_build.check_options({"precision": "fp32", "extra_options": {"hf_remote": False}}, known)
    with pytest.raises(RunFailure, match="does not know quantization_config, block_sise"):
        onnx_build.check_options({"quantization_config": {}, "extra_options": {"block_sise": 3}}, known)


GOOD = frozenset({("MatMulNBits", 4, 32, 4, False), ("GatherBlockQuantized", 4, 32, 0, False)})


@pytest.mark.parametrize(
    ("facts", "wanted", "what"),
    [
        ({}, {}, ""),
        ({"operators": Counter()}, {}, "no MatMulNBits node"),
        ({}, {"blockSize": 64}, "a GatherBlockQuantized with bits 4, block size 32"),
        ({}, {"accuracyLevel": 1}, "a MatMulNBits with bits 4, block size 32, accuracy level 4"),
        ({}, {"symmetric": False}, "zero points: False"),
        ({"largest": ("model.embed_tokens.weight", 65536)}, {}, "weight with 65536 values is not quantized"),
        ({}, {"precision": "fp32"}, "2 kinds of quantized nodes"),
        ({"settings": frozenset(), "floats": Counter(fp32=3, fp16=9)}, {"precision": "fp16"}, r"fp32 \(3 values\)"),
        ({"settings": frozenset(), "floats": Counter(fp32=3)}, {"precision": "fp32"}, ""),
        ({"settings": frozenset(), "floats": Counter(fp32=9, fp16=990)}, {"precision": "fp16"}, ""),  # norms in fp32
    ],
)
def test_a_graph_that_is_not_what_was_asked_for_is_refused(
    facts: dict[str, Any], wanted: dict[str, Any], what: str
) -> None:
    usual = {
        "operators": Counter(MatMulNBits=11), "floats": Counter(fp32=900), "largest": ("norm", 64), "settings": GOOD,
        "kv_precision": "fp32", "kv_bytes": 512,
    }  # fmt: skip
    found = onnx_graph.Facts(**{**usual, **facts})
    if not what:
        onnx_graph.check(found, spec(**wanted), PARAMETERS)
        return
    with pytest.raises(RunFailure, match=what) as caught:
        onnx_graph.check(found, spec(**wanted), PARAMETERS)
    assert caught.value.reason == "UnsupportedModel"


@pytest.mark.parametrize(
    ("metrics", "metric", "size", "delta"),
    [
        ({"size_bytes": 1_104_000, "size_ratio": 0.258, "drop": 0.004}, "exactMatch", "1.1 MB (-74 %)", "-0.004"),
        ({"size_bytes": 980, "size_ratio": 1.2, "drop": -0.02}, "rougeL", "980 B (+20 %)", "+0.020"),
        ({"size_bytes": 2.5e9, "size_ratio": 0.5, "drop": 0.0}, "exactMatch", "2.5 GB (-50 %)", "+0.000"),
        ({"size_bytes": 2.5e9, "size_ratio": 0.5, "drop": 0.013}, "perplexity", "2.5 GB (-50 %)", "+1.3 % perplexity"),
    ],
)
def test_the_columns(metrics: dict[str, float], metric: str, size: str, delta: str) -> None:
    gate = Gate.model_validate({"dataset": {"uri": "pvc://data/x"}, "metric": metric})
    found = quantize.columns({**metrics, metric: 0.5}, gate)
    assert (found["size"], found["delta"]) == (size, delta)
    assert "delta" not in quantize.columns(metrics, None)
