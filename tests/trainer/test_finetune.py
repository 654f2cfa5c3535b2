"""Whole fine-tuning runs on a tiny model, through the store."""

import gc
import json
import shutil
from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from tiny import CHATML, EMPTY_THOUGHTS, MARKED, chat, task, write_model

from slmops.api.finetune import Lora
from slmops.api.run import RunResult
from slmops_artifacts import ArtifactError, Manifest, push, read_manifest
from slmops_artifacts.errors import Reason
from slmops_trainer import context, finetune, generate, models
from slmops_trainer.context import Context
from slmops_trainer.data import Example
from slmops_trainer.failure import RunFailure
from slmops_trainer.train import TrainReport, train

FULL: dict[str, Any] = {
    "method": "full",
    "base": {"uri": "pvc://models/tiny"},
    "training": {
        "maxSteps": 300,
        "learningRate": 2e-3,
        "batchSize": 16,
        "seed": 7,
        "checkpoint": {"everySeconds": 3600},
    },
}


def spec(train: str, held_out: str | None = None, **more: Any) -> dict[str, Any]:
    found = {**FULL, "dataset": {"uri": train}, **more}
    if held_out is not None:
        found["evaluation"] = {
            "dataset": {"uri": held_out},
            "metrics": ["exactMatch", "fieldMatch", "jsonValid", "perplexity"],
            "maxTokens": 40,
            **more.get("evaluation", {}),
        }
    return found


@pytest.fixture
def sets(jsonl: Callable[..., str]) -> tuple[str, str]:
    """The task, without every ninth combination of thing and room: those are held out."""
    rows = [chat(*row) for row in task()]
    kept = [row for index, row in enumerate(rows) if index % 9]
    return jsonl(kept, "train"), jsonl(rows[::9], "held-out")


def test_a_full_run_learns_and_says_from_what(
    make_run: Callable[..., Context], sets: tuple[str, str], tmp_path: Path
) -> None:
    ctx = make_run(finetune=spec(*sets))
    result = finetune.run(ctx)
    assert result.succeeded
    assert result.format == "safetensors"
    assert result.metrics["base_exactMatch"] == 0
    assert result.metrics["loss"] < 0.25
    assert result.metrics["exactMatch"] == 1
    assert result.metrics["perplexity"] < result.metrics["base_perplexity"] / 50
    assert list(result.metrics)[:4] == ["exactMatch", "fieldMatch", "jsonValid", "perplexity"]
    assert result.quality.endswith(" exactMatch")
    assert [row.kind for row in result.lineage] == ["model", "dataset"]
    manifest = read_manifest("pvc://store/out")
    assert manifest is not None
    assert manifest.seed == 7
    assert manifest.recipe["training"]["learningRate"] == 2e-3
    assert manifest.versions["transformers"] == "4.57.6"
    assert "fieldMatch" in (tmp_path / "store/out/README.md").read_text()
    assert json.loads((tmp_path / "store/out/generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("there", "output"),
    [
        ("out/notes.txt", "out"),
        ("out/model.bin", "out"),
        ("out", "out"),
        ("out/v1/slmops-manifest.json", "out"),
        ("out/slmops-manifest.json", "out/v1"),
        ("slmops-manifest.json", "out"),
    ],
)
def test_an_output_that_takes_nothing_is_known_before_anything_is_pulled(
    make_run: Callable[..., Context], sets: tuple[str, str], tmp_path: Path, there: str, output: str
) -> None:
    path = tmp_path / "store" / there
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    ctx = make_run(finetune=spec(*sets), output=f"pvc://store/{output}")
    with pytest.raises(RunFailure, match=f"^pvc://store/{output} ") as caught:
        finetune.run(ctx)
    assert caught.value.reason == "StoreUnavailable"
    assert list(ctx.work.iterdir()) == []
    path.unlink()
    assert ctx.existing() is None


def test_a_result_is_found_whatever_lies_beside_it(make_run: Callable[..., Context], tmp_path: Path) -> None:
    ctx = make_run(finetune=None)
    (ctx.work / "model").mkdir()
    (ctx.work / "model/config.json").write_text("{}")
    artifact, _ = ctx.push(ctx.work / "model", Manifest(kind="model"))
    (tmp_path / "store/out/notes.txt").write_text("mine")
    found = ctx.existing()
    assert found is not None
    assert found[0] == artifact
    with pytest.raises(RunFailure, match=r"notes\.txt"):
        make_run(finetune=None, uid="uid-2").existing()


def test_training_holds_no_text_of_its_set_in_memory(
    make_run: Callable[..., Context], sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[set[str]] = []

    def looking(*arguments: Any, **more: Any) -> TrainReport:
        gc.collect()
        held.append({found.messages[-1].content for found in gc.get_objects() if type(found) is Example})
        return train(*arguments, **more)

    monkeypatch.setattr(finetune, "train", looking)
    few = {**FULL["training"], "maxSteps": 1}
    result = finetune.run(make_run(finetune=spec(*sets, training=few)))
    questions = [question for question, _ in task()]
    assert held[0] & set(questions) == set(questions[::9])  # what is held out is measured once more
    assert result.metrics["examples"] == len(questions) - len(questions[::9])


def test_a_model_whose_template_leaves_thoughts_empty_is_asked_as_it_was_trained(
    make_run: Callable[..., Context], sets: tuple[str, str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "thinker", EMPTY_THOUGHTS)
    result = finetune.run(make_run(model=model, finetune=spec(*sets)))
    assert result.metrics["jsonValid"] == 1
    out = tmp_path / "store/out"
    template = (out / "chat_template.jinja").read_text()
    assert template.startswith(EMPTY_THOUGHTS)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == template
    turns = [{"role": "user", "content": "x"}]
    asked = models.load(out, "out").tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_conversation_of_a_template_that_forgets_thoughts_is_trained_answer_by_answer(
    make_run: Callable[..., Context], jsonl: Callable[..., str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "thinker", EMPTY_THOUGHTS)
    turns = [chat(*row)["messages"] for row in task()[:32]]
    talks = jsonl([{"messages": [*turns[at], *turns[at + 1]]} for at in range(0, 32, 2)])
    once = {"epochs": 1, "batchSize": 16, "checkpoint": {"everySeconds": 3600}}
    result = finetune.run(make_run(model=model, finetune=spec(talks, training=once)))
    assert (result.metrics["examples"], result.metrics["steps"]) == (16, 2)


def test_a_pod_that_only_lost_its_last_word_repeats_it(make_run: Callable[..., Context], sets: tuple[str, str]) -> None:
    short = spec(*sets, training={"maxSteps": 2})
    first = finetune.run(make_run(finetune=short))
    again = make_run(finetune=short)
    assert finetune.run(again) == first
    assert again.board.progress.stage == "Starting"  # nothing was done


def test_lora_merges_into_a_model_that_answers_like_the_adapter(
    make_run: Callable[..., Context], tiny_model: Path, sets: tuple[str, str], tmp_path: Path
) -> None:
    lora: dict[str, Any] = {
        "method": "lora",
        "lora": {"r": 8, "alpha": 16},
        "training": {**FULL["training"], "maxSteps": 20},
    }
    result = finetune.run(make_run(finetune=spec(sets[0], **lora)))
    merged = models.load(tmp_path / "store/out", "merged")
    ids = torch.tensor([[5, 9, 200, 17, 300]])
    base = models.load(tiny_model, "base")
    assert not torch.allclose(merged.model(ids).logits, base.model(ids).logits, atol=1e-3)
    ctx = make_run(uid="uid-2", output="pvc://store/adapter", finetune=spec(*sets, **lora, merge=False))
    alone = finetune.run(ctx)
    assert alone.metrics["perplexity"] < alone.metrics["base_perplexity"]
    assert not (tmp_path / "store/adapter/config.json").exists()
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base.model, str(tmp_path / "store/adapter")).eval()
    assert torch.allclose(merged.model(ids).logits, adapted(ids).logits, atol=1e-4)
    assert result.artifact is not None
    assert not list((tmp_path / "store/out").glob("adapter*"))
    manifests = [read_manifest(uri) for uri in ("pvc://store/out", "pvc://store/adapter")]
    sizes = [manifest.recipe["trainableParameters"] for manifest in manifests if manifest]
    assert sizes == [sum(value.numel() for name, value in adapted.named_parameters() if "lora_" in name)] * 2


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_tuned_model_is_loaded_when_the_one_that_was_tuned_is_gone(
    make_run: Callable[..., Context], sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """An adapter's training needs little more than its model: two models would not fit where it did."""
    load, loaded = models.load, list[Any]()

    def loading(*given: Any) -> models.Loaded:
        for model in loaded:
            assert {value.device.type for value in model.parameters()} == {"meta"}
        found = load(*given)
        loaded.append(found.model)
        return found

    monkeypatch.setattr(models, "load", loading)
    assert finetune.run(make_run(finetune=spec(*sets, method=method, training={"maxSteps": 1}))).succeeded
    assert len(loaded) == 2


def stopped_after_two_steps(ctx: Context) -> None:
    """Run in a pod that is asked to stop within the training's second step of four."""
    report = ctx.report

    def stopping(stage: str, step: int, *rest: Any, **more: Any) -> None:
        report(stage, step, *rest, **more)
        if stage == finetune.TRAINING and step == 2:
            ctx.stop.set()

    ctx.report = stopping  # type: ignore[method-assign]
    with pytest.raises(RunFailure, match="Stopped after step 2 of 4; the checkpoint is written"):
        finetune.run(ctx)


def timeless(result: RunResult) -> dict[str, float]:
    """The metrics that equal runs have in common."""
    return {name: value for name, value in result.metrics.items() if name != "training_seconds"}


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "generation-marks"])
def test_a_template_that_writes_the_date_writes_one_date_in_all_pods_of_a_run(
    make_run: Callable[..., Context],
    sets: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    template: str,
) -> None:
    """As Llama 3's does. Else a run that goes on after midnight would begin anew, with other prompts."""

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(2026, 1, cls.day, 23, 59, tzinfo=tz)

    monkeypatch.setattr("slmops_trainer.context.datetime", Clock)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    caplog.set_level("INFO")
    model = write_model(tmp_path / "dated", "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + template)
    asked = spec(*sets, training={"maxSteps": 4, "seed": 7})
    whole = finetune.run(make_run(model=model, uid="uid-2", output="pvc://store/whole", finetune=asked))
    stopped_after_two_steps(make_run(model=model, finetune=asked))
    Clock.day = 2
    torn = finetune.run(make_run(model=model, finetune=asked))
    assert "Resumed at step 2 of 4" in caplog.text
    assert timeless(torn) == timeless(whole)
    weights = [(tmp_path / f"store/{name}/model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]
    later = finetune.run(make_run(model=model, uid="uid-3", output="pvc://store/later", finetune=asked))
    assert later.metrics["base_perplexity"] != whole.metrics["base_perplexity"]  # it does write the date


def test_a_tag_that_moves_between_two_pods_leaves_nothing_of_the_old_base(
    make_run: Callable[..., Context], tiny_model: Path, sets: tuple[str, str], tmp_path: Path
) -> None:
    lora = spec(*sets, method="lora", lora={"r": 4, "alpha": 8}, training={"maxSteps": 4, "seed": 7})
    tag = tmp_path / "tag"
    shutil.copytree(tiny_model, tag)
    stopped_after_two_steps(make_run(model=tag, finetune=lora))
    other = models.load(tiny_model, "tiny")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(3)
    shutil.rmtree(tag)
    models.write(other, other.model, tag)
    found = finetune.run(make_run(model=tag, finetune=lora))
    fresh = finetune.run(make_run(model=tag, uid="uid-2", output="pvc://store/fresh", finetune=lora))
    assert timeless(found) == timeless(fresh)
    weights = [(tmp_path / f"store/{name}/model.safetensors").read_bytes() for name in ("out", "fresh")]
    assert weights[0] == weights[1]


def test_a_model_below_its_threshold_is_kept_aside(
    make_run: Callable[..., Context], sets: tuple[str, str], tmp_path: Path
) -> None:
    strict = spec(*sets, training={"maxSteps": 1}, evaluation={"thresholds": {"exactMatch": 0.9}})
    for _ in range(2):  # the second pod finds what the first one left
        with pytest.raises(RunFailure) as caught:
            finetune.run(make_run(finetune=strict))
        assert caught.value.reason == "QualityBelowThreshold"
        assert "exactMatch 0 is below 0.9" in caught.value.message
        assert "pvc://store/out-rejected" in caught.value.message
        assert not caught.value.retryable
    assert not (tmp_path / "store/out").exists()
    assert (tmp_path / "store/out-rejected/model.safetensors").is_file()


def test_data_that_are_mended_after_a_missed_threshold_are_trained_on(
    make_run: Callable[..., Context], sets: tuple[str, str], tmp_path: Path
) -> None:
    strict = spec(*sets, training={"maxSteps": 1}, evaluation={"thresholds": {"exactMatch": 0.9}})
    rows = tmp_path / "data" / sets[0].rpartition("/")[2] / "rows.jsonl"
    digests: list[str | None] = []
    for mended in (chat("a new one", "{}"), chat("another", "{}")):
        with pytest.raises(RunFailure, match="exactMatch 0 is below"):
            finetune.run(make_run(finetune=strict))
        left = read_manifest("pvc://store/out-rejected")
        assert left is not None
        digests.append(left.dataset_digest)
        with rows.open("a") as stream:
            stream.write(json.dumps(mended) + "\n")
    assert len(set(digests)) == 2


def test_a_held_out_question_in_training_is_refused(
    make_run: Callable[..., Context], jsonl: Callable[..., str]
) -> None:
    rows = [chat(*row) for row in task()]
    leaked = chat("The  PRINTER in the lab is broken", "{}")
    train, held_out = jsonl(rows, "train"), jsonl([chat("a new one", "{}"), leaked], "held-out")
    with pytest.raises(
        RunFailure, match=r"1 of 2 held-out examples also occur in training; the first: line 2 .* line 2 of"
    ):
        finetune.run(make_run(finetune=spec(train, held_out)))


def test_unknown_target_modules_are_listed(make_run: Callable[..., Context], sets: tuple[str, str]) -> None:
    wrong = spec(sets[0], method="lora", lora={"targetModules": ["c_attn"]})
    with pytest.raises(RunFailure, match=r"c_attn.*it has .*down_proj.*q_proj") as caught:
        finetune.run(make_run(finetune=wrong))
    assert caught.value.reason == "BadSpec"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"method": "lora", "lora": {"targetModules": ["c_attn"]}}, "c_attn fits no module"),
        ({"method": "lora", "lora": {"targetModules": ["norm"]}}, "cannot be adapted: Target module"),
        (
            {"training": {**FULL["training"], "maxLength": 60, "earlyStopping": {"patience": 1, "everySteps": 1}}},
            "All 1 examples are longer than 60",
        ),
    ],
    ids=["unknown module", "module of another kind", "nothing to stop by"],
)
def test_what_is_known_to_fail_does_so_before_anything_is_measured(
    make_run: Callable[..., Context],
    jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any],
    message: str,
) -> None:
    train = jsonl([chat(*row) for row in task()], "train")
    held_out = jsonl([chat("lamp " * 100, "{}")], "held-out")
    answers: list[Any] = []
    generated = generate._greedy
    monkeypatch.setattr(generate, "_greedy", lambda *given: (answers.append(given), generated(*given))[1])
    with pytest.raises(RunFailure, match=message):
        finetune.run(make_run(finetune=spec(train, held_out, **fault)))
    assert not answers


def test_an_adapter_does_not_change_what_is_measured_of_its_base(
    make_run: Callable[..., Context], sets: tuple[str, str]
) -> None:
    short = {"training": {**FULL["training"], "maxSteps": 1}}
    full = finetune.run(make_run(finetune=spec(*sets, **short))).metrics
    lora = {**short, "method": "lora", "lora": {"r": 4, "dropout": 0.5}}
    adapted = finetune.run(make_run(uid="uid-2", output="pvc://store/lora", finetune=spec(*sets, **lora))).metrics
    assert {name: value for name, value in adapted.items() if name.startswith("base_")} == {
        name: value for name, value in full.items() if name.startswith("base_")
    }
    assert adapted["perplexity"] != adapted["base_perplexity"]  # and it is trained


def test_every_target_module_has_to_mean_something(tiny_model: Path) -> None:
    """peft itself is content when one of them does, and trains less than was asked for."""
    with pytest.raises(RunFailure, match=r"gate fits no module of the model; it has "):
        finetune.adapt(models.load(tiny_model, "tiny").model, Lora(target_modules=["q_proj", "gate"]), 1)
    found = finetune.adapt(models.load(tiny_model, "tiny").model, Lora(target_modules=["q_proj", "gate_proj"]), 1)
    names = {name.split(".")[-4] for name, value in found.named_parameters() if value.requires_grad}
    assert names == {"q_proj", "gate_proj"}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_layers_that_share_their_weights_take_no_adapter(tiny_model: Path, target: str) -> None:
    with pytest.raises(RunFailure, match="share their weights") as caught:
        finetune.adapt(models.load(tiny_model, "tiny").model, Lora(target_modules=["q_proj", target]), 1)
    assert caught.value.reason == "BadSpec"


def test_what_cannot_be_adapted_is_said(tiny_model: Path) -> None:
    with pytest.raises(RunFailure, match="cannot be adapted: Target module"):
        finetune.adapt(models.load(tiny_model, "tiny").model, Lora(target_modules=["norm"]), 1)


def test_a_result_waits_for_a_store_that_is_full_or_gets_other_credentials(
    make_run: Callable[..., Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the pod exists nowhere else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    tries: list[str] = []
    reasons: tuple[Reason, ...] = ("DiskFull", "SourceUnavailable", "AccessDenied")

    def busy(folder: Path, uri: str, manifest: Manifest, **more: Any) -> tuple[str, Manifest]:
        tries.append(ctx.board.progress.message)
        if len(tries) < 4:
            raise ArtifactError(reasons[len(tries) - 1], "no room.")
        return push(folder, uri, manifest, **more)

    monkeypatch.setattr(context, "push", busy)
    monkeypatch.setattr(context, "STORE_PAUSE", 0.001)
    ctx = make_run(finetune=None)
    ctx.push(tmp_path / "model", Manifest(kind="model"))
    assert tries == ["", *["Waits for the store: no room."] * 3]
    assert read_manifest("pvc://store/out") is not None
    ctx.store_patience, tries = 0.0, []
    with pytest.raises(RunFailure) as caught:
        ctx.push(tmp_path / "model", Manifest(kind="model"))
    assert (caught.value.reason, caught.value.retryable) == ("DiskFull", True)
    ctx.store_patience, tries = 3600.0, []
    with monkeypatch.context() as patch:
        patch.setattr(context, "ACCESS_PATIENCE", 0.0)
        with pytest.raises(RunFailure) as caught:
            ctx.push(tmp_path / "model", Manifest(kind="model"))
    assert (caught.value.reason, len(tries)) == ("AccessDenied", 3)
    tries = []
    ctx.stop.set()
    with pytest.raises(RunFailure, match="waited for the store: no room"):
        ctx.push(tmp_path / "model", Manifest(kind="model"))


def test_early_stopping_stops(make_run: Callable[..., Context], sets: tuple[str, str]) -> None:
    training = {
        **FULL["training"],
        "learningRate": 1e-8,
        "earlyStopping": {"patience": 2, "everySteps": 2, "minDelta": 0.1},
    }
    result = finetune.run(make_run(finetune=spec(*sets, training=training)))
    assert result.metrics["steps"] == 6  # one measurement sets the mark, two do not fall below it
