"""The loop: exact resume wherever it is stopped, exact loss over accumulated batches, honest failures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import task

from slmops.api.batch import Training
from slmops_artifacts import ArtifactError
from slmops_trainer import checkpoints, encoding, finetune, models, state
from slmops_trainer.context import Context
from slmops_trainer.data import Example, Message
from slmops_trainer.failure import RunFailure
from slmops_trainer.generate import mean_loss
from slmops_trainer.loss import collate, loss_sum
from slmops_trainer.train import TrainReport, train

STEPS = 6


def examples() -> list[Example]:
    return [Example((Message("user", question),), answer, line) for line, (question, answer) in enumerate(task(), 1)]


def recipe(**more: Any) -> Training:
    return Training.model_validate(
        {"maxSteps": STEPS, "learningRate": 1e-3, "batchSize": 4, "seed": 3, "gradientAccumulation": 2,
         "checkpoint": {"everySeconds": 3600}, **more}
    )  # fmt: skip


def fit(
    ctx: Context, folder: Path, training: Training, lora: bool = False, watch: int = 0, base: str = "sha256:a"
) -> tuple[dict[str, torch.Tensor], TrainReport]:
    """Train in this `pod`; the weights as they are afterwards, whether or not it was stopped."""
    loaded = models.load(folder, "tiny")
    encoded = encoding.encode(loaded.tokenizer, examples(), loaded.stop_ids, "assistant", 256)
    model = loaded.model
    if lora:
        from slmops.api.finetune import Lora

        model = finetune.adapt(model, Lora(r=4, dropout=0.3), training.seed)
    report = train(ctx, model, loaded.tokenizer, encoded.items, training, base=base, evaluation=encoded.items[:watch])
    return {name: value.detach().clone() for name, value in state.trainable(model).items()}, report


def stop_after(ctx: Context, count: int) -> None:
    """SIGTERM arrives while step `count` is being computed."""
    report = ctx.report

    def reporting(stage: str, step: int, total: int, message: str = "", percent: int | None = None) -> None:
        report(stage, step, total, message, percent)
        if step >= count:
            ctx.stop.set()

    ctx.report = reporting  # type: ignore[method-assign]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora-with-dropout"])
@pytest.mark.parametrize(("precision", "threads"), [("fp32", 1), ("fp32", 2), ("bf16", 1)])
def test_a_run_stopped_after_every_step_ends_bit_equal(
    make_run: Callable[..., Context], tiny_model: Path, lora: bool, precision: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    training = recipe(precision=precision)
    whole, report = fit(make_run(uid="whole", finetune=None), tiny_model, training, lora)
    for step in range(1, STEPS + 1):
        ctx = make_run(uid="torn", finetune=None)
        stop_after(ctx, step)
        with pytest.raises(RunFailure) as caught:
            fit(ctx, tiny_model, training, lora)
        assert caught.value.reason == "Interrupted"
        assert caught.value.exit_code == 143
    torn, resumed = fit(make_run(uid="torn", finetune=None), tiny_model, training, lora)
    assert resumed.resumed_at == STEPS
    assert (resumed.steps, resumed.tokens, resumed.loss) == (report.steps, report.tokens, report.loss)
    assert all(torch.equal(whole[name], torn[name]) for name in whole)


def test_a_run_stopped_within_a_step_does_that_step_again(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulation may take longer than the pod's grace: no stop waits for its end."""
    training = recipe(gradientAccumulation=4)
    whole, report = fit(make_run(uid="whole", finetune=None), tiny_model, training, lora=True)
    passes = 0

    def stopping(model: Any, batch: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes in (2, 6):  # the second of four passes: of the first step of the first pod and of the second
            ctx.stop.set()
        return loss_sum(model, batch)

    monkeypatch.setattr("slmops_trainer.train.loss_sum", stopping)
    for _ in range(2):
        ctx = make_run(uid="torn", finetune=None)
        with pytest.raises(RunFailure, match="Stopped after step 0 of 6") as caught:
            fit(ctx, tiny_model, training, lora=True)
        assert caught.value.exit_code == 143
        passes = 4
    torn, resumed = fit(make_run(uid="torn", finetune=None), tiny_model, training, lora=True)
    assert (resumed.steps, resumed.tokens, resumed.loss) == (report.steps, report.tokens, report.loss)
    assert all(torch.equal(whole[name], torn[name]) for name in whole)


@pytest.mark.parametrize("stops", [1, 2])
def test_an_evaluation_that_was_stopped_is_done_by_the_next_pod(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, stops: int
) -> None:
    """And by the one after it, if that was stopped in it as well."""
    rule = {"patience": 1, "everySteps": 2, "minDelta": 0.5}
    training = recipe(learningRate=1e-8, gradientAccumulation=1, earlyStopping=rule)  # no step ends within itself
    _, report = fit(make_run(uid="whole", finetune=None), tiny_model, training, lora=True, watch=12)
    measured: list[int] = []

    def stopping(*arguments: Any) -> float:
        measured.append(1)
        if 2 <= len(measured) < 2 + stops:
            ctx.stop.set()
        return mean_loss(*arguments)

    monkeypatch.setattr("slmops_trainer.train.mean_loss", stopping)
    for _ in range(stops):
        ctx = make_run(uid="torn", finetune=None)
        with pytest.raises(RunFailure, match=r"Stopped after step 4 of 6|was asked to stop") as caught:
            fit(ctx, tiny_model, training, lora=True, watch=12)
        assert caught.value.exit_code == 143
    _, resumed = fit(make_run(uid="torn", finetune=None), tiny_model, training, lora=True, watch=12)
    assert resumed.resumed_at == 4
    assert (resumed.steps, resumed.evaluation_loss) == (report.steps, report.evaluation_loss)
    assert resumed.steps == 4  # the second measurement, taken by the second pod, did not fall


def test_a_measurement_that_is_broken_off_leaves_the_model_in_its_mode(tiny_model: Path) -> None:
    loaded = models.load(tiny_model, "tiny")
    encoded = encoding.encode(loaded.tokenizer, examples()[:2], loaded.stop_ids, "assistant", 256).items
    loaded.model.train()

    def stop(done: int, total: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        mean_loss(loaded.model, encoded, 0, 1, stop)
    assert loaded.model.training


def measuring(monkeypatch: pytest.MonkeyPatch, *losses: float) -> list[dict[str, torch.Tensor]]:
    """Make these the evaluation losses; returns the weights that were measured, as they come."""
    left, seen = iter(losses), list[dict[str, torch.Tensor]]()

    def measure(model: Any, *_: Any) -> float:
        seen.append({name: value.detach().clone() for name, value in state.trainable(model).items()})
        return next(left)

    monkeypatch.setattr("slmops_trainer.train.mean_loss", measure)
    return seen


@pytest.mark.parametrize("torn", [False, True])
def test_early_stopping_gives_the_best_weights_not_the_last(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    training = recipe(earlyStopping={"patience": 2, "everySteps": 1})
    seen = measuring(monkeypatch, 3.0, 1.0, 2.0, 2.0)
    if torn:
        ctx = make_run(finetune=None)
        stop_after(ctx, 3)
        with pytest.raises(RunFailure, match="Stopped after step 3 of 6"):
            fit(ctx, tiny_model, training, watch=12)
    weights, report = fit(make_run(finetune=None), tiny_model, training, watch=12)
    assert (report.steps, report.stopped_early, report.evaluation_loss) == (4, True, 1.0)
    assert all(torch.equal(weights[name], seen[1][name]) for name in weights)
    assert not all(torch.equal(weights[name], seen[3][name]) for name in weights)


def test_the_least_fall_that_counts_counts_for_stopping_only(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measuring(monkeypatch, 3.0, 2.8, 2.9)
    training = recipe(earlyStopping={"patience": 2, "everySteps": 1, "minDelta": 0.5})
    weights, report = fit(make_run(finetune=None), tiny_model, training, watch=12)
    assert (report.steps, report.stopped_early, report.evaluation_loss) == (3, True, 2.8)
    assert all(torch.equal(weights[name], seen[1][name]) for name in weights)


@pytest.mark.parametrize(
    ("watch", "last", "expected"),
    [
        (12, (2.0, 2.0), (4, 1.0, 1)),  # the same rows: two more that are worse end it, and the first pod had the best
        (11, (9.0, 8.0, 7.0, 6.0, 5.0), (STEPS, 5.0, 6)),  # step 2 is measured again, and the 1.0 counts no more
    ],
)
def test_losses_on_another_evaluation_set_are_not_compared(
    make_run: Callable[..., Context],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: int,
    last: tuple[float, ...],
    expected: tuple[int, float, int],
) -> None:
    """It may be corrected while the run is suspended."""
    training = recipe(earlyStopping={"patience": 2, "everySteps": 1})
    seen = measuring(monkeypatch, 3.0, 1.0, *last)
    ctx = make_run(finetune=None)
    stop_after(ctx, 2)
    with pytest.raises(RunFailure, match="Stopped after step 2 of 6"):
        fit(ctx, tiny_model, training, watch=12)
    weights, report = fit(make_run(finetune=None), tiny_model, training, watch=watch)
    assert (report.steps, report.evaluation_loss) == expected[:2]
    assert report.resumed_at == 2
    assert all(torch.equal(weights[name], seen[expected[2]][name]) for name in weights)


def test_a_training_that_is_over_is_measured_again_on_another_evaluation_set(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is done over it, and the weights stay those that were the best."""
    training = recipe(earlyStopping={"patience": 2, "everySteps": 1})
    seen = measuring(monkeypatch, 1.0, 2.0, 2.0, 7.0)
    fit(make_run(finetune=None), tiny_model, training, watch=12)
    weights, report = fit(make_run(finetune=None), tiny_model, training, watch=11)
    assert (report.steps, report.evaluation_loss, len(seen)) == (3, 7.0, 4)
    assert all(torch.equal(weights[name], seen[0][name]) for name in weights)


@pytest.mark.parametrize("said", [{"evaluation_loss": None}, {"evaluation_loss": 1.0, "best": 1.0, "waited": 1}])
def test_a_state_of_an_older_trainer_is_gone_on_with(
    make_run: Callable[..., Context], tiny_model: Path, said: dict[str, float | None]
) -> None:
    ctx = make_run(finetune=None)
    stop_after(ctx, 3)
    with pytest.raises(RunFailure, match="Stopped after step 3 of 6"):
        fit(ctx, tiny_model, recipe())
    [counters] = ctx.work.rglob(state.COUNTERS)
    counters.write_text(json.dumps(json.loads(counters.read_text()) | said))
    assert fit(make_run(finetune=None), tiny_model, recipe())[1].resumed_at == 3


@pytest.mark.parametrize(("values", "best"), [((2.0, 1.0), 1), ((1.0, 2.0), 0)])
def test_early_stopping_measures_the_last_weights_too(
    make_run: Callable[..., Context],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: tuple[float, float],
    best: int,
) -> None:
    seen = measuring(monkeypatch, *values)
    training = recipe(earlyStopping={"patience": 2, "everySteps": 4})
    weights, report = fit(make_run(finetune=None), tiny_model, training, watch=12)
    assert (report.steps, report.evaluation_loss) == (STEPS, 1.0)
    assert all(torch.equal(weights[name], seen[best][name]) for name in weights)


@pytest.mark.parametrize("reason", ["StoreUnavailable", "DiskFull", "AccessDenied"])
def test_a_store_that_is_away_or_full_or_gets_other_credentials_ends_no_training(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, reason: Any
) -> None:
    whole, _ = fit(make_run(uid="whole", finetune=None), tiny_model, recipe())
    ctx = make_run(uid="torn", finetune=None)
    ctx.checkpoints.load()
    save, tries = ctx.checkpoints.save, 0

    def saving(folder: Path | None = None, patience: float | None = None) -> None:
        nonlocal tries
        tries += 1
        if tries in (1, 4):
            save(folder, patience)
        else:
            raise RunFailure(reason, "the store has gone.", retryable=True)

    told, report_to = [], ctx.report

    def reporting(stage: str, step: int, total: int, message: str = "", percent: int | None = None) -> None:
        told.append(message.rpartition(" | ")[0])
        report_to(stage, step, total, message, percent)

    clock = iter(float(second) for second in range(0, 100_000, 100))
    training = recipe(checkpoint={"everySeconds": 100})
    with monkeypatch.context() as patch:
        patch.setattr(ctx.checkpoints, "save", saving)
        patch.setattr(ctx, "report", reporting)
        patch.setattr("slmops_trainer.train.time.monotonic", lambda: next(clock))
        fit(ctx, tiny_model, training)
    assert tries == STEPS
    first, second = (f"The last checkpoint is of step {step}: the store has gone." for step in (1, 4))
    assert told[-STEPS:] == ["", "", first, first, "", second]
    age = ctx.board.registry.get_sample_value("slmops_run_live", {"name": "checkpoint_age_seconds"})
    assert age is not None
    assert age >= 200  # two steps, at the least
    torn, report = fit(make_run(uid="torn", finetune=None), tiny_model, training)
    assert report.resumed_at == 4
    assert all(torch.equal(whole[name], torn[name]) for name in whole)


def test_a_store_that_never_took_a_checkpoint_and_refuses_access_ends_the_training(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ArtifactError("AccessDenied", "the store refused access (HTTP 401).")

    monkeypatch.setattr(checkpoints, "push", refused)
    with pytest.raises(RunFailure) as caught:
        fit(make_run(finetune=None), tiny_model, recipe(maxSteps=1))
    assert caught.value.reason == "AccessDenied"


def test_a_store_that_lets_no_tag_be_replaced_ends_no_training(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, fixed_tags: list[None]
) -> None:
    clock = iter(float(second) for second in range(0, 100_000, 100))
    with monkeypatch.context() as patch:
        patch.setattr("slmops_trainer.train.time.monotonic", lambda: next(clock))
        _, report = fit(make_run(finetune=None), tiny_model, recipe(checkpoint={"everySeconds": 100}))
    assert (len(fixed_tags), report.steps) == (STEPS, STEPS)
    ctx = make_run(finetune=None)
    stop_after(ctx, 3)
    with pytest.raises(RunFailure, match=r"after step 3 of 6; saved up to 1: the registry refused the manifest"):
        fit(ctx, tiny_model, recipe(checkpoint={"everySeconds": 100}))


def test_a_pod_stopped_while_the_store_is_away_says_from_where_the_run_goes_on(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(folder: Path | None = None, patience: float | None = None) -> None:
        raise RunFailure("StoreUnavailable", "The registry cannot be reached.", retryable=True)

    ctx = make_run(finetune=None)
    monkeypatch.setattr(ctx.checkpoints, "save", gone)
    stop_after(ctx, 2)
    with pytest.raises(RunFailure, match=r"after step 2 of 6; saved up to 0: The registry cannot") as caught:
        fit(ctx, tiny_model, recipe())
    assert caught.value.exit_code == 143


def test_a_last_step_that_breaks_the_weights_is_no_success(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step

    def breaking(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][0][0, 0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    with pytest.raises(RunFailure, match=r"embed_tokens.* are no numbers") as caught:
        fit(make_run(finetune=None), tiny_model, recipe(maxSteps=1))
    assert caught.value.reason == "LossDiverged"


def test_a_pod_killed_without_warning_costs_the_steps_since_its_checkpoint(
    make_run: Callable[..., Context], tiny_model: Path
) -> None:
    class PowerCut(BaseException):
        """Nothing gets to run after it."""

    training = recipe()
    whole, _ = fit(make_run(uid="whole", finetune=None), tiny_model, training)
    ctx = make_run(uid="torn", finetune=None)
    stop_after(ctx, 2)
    with pytest.raises(RunFailure):
        fit(ctx, tiny_model, training)
    ctx = make_run(uid="torn", finetune=None)
    ctx.live = lambda **values: (_ for _ in ()).throw(PowerCut()) if values.get("step") == 5 else None  # type: ignore[method-assign]
    with pytest.raises(PowerCut):
        fit(ctx, tiny_model, training)
    torn, report = fit(make_run(uid="torn", finetune=None), tiny_model, training)
    assert report.resumed_at == 2
    assert all(torch.equal(whole[name], torn[name]) for name in whole)


def test_a_checkpoint_is_written_every_so_many_seconds(
    make_run: Callable[..., Context], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 10))  # each look at the clock is 10 s later
    monkeypatch.setattr("slmops_trainer.train.time.monotonic", lambda: float(next(clock)))
    ctx = make_run(finetune=None)
    saved: list[int] = []
    save = ctx.checkpoints.save

    def saving(folder: Path | None = None, patience: float | None = None) -> None:
        counters = state.read_counters(ctx.checkpoints.folder / "training")
        assert counters is not None
        saved.append(counters.step)
        save(folder, patience)

    monkeypatch.setattr(ctx.checkpoints, "save", saving)
    fit(ctx, tiny_model, recipe(checkpoint={"everySeconds": 100}))
    assert saved == [2, 4, 6]  # a step looks five times


def test_a_checkpoint_of_other_data_is_not_used(make_run: Callable[..., Context], tiny_model: Path) -> None:
    fit(make_run(finetune=None), tiny_model, recipe(maxSteps=1))
    _, report = fit(make_run(finetune=None), tiny_model, recipe(maxSteps=2))
    assert report.resumed_at is None


def test_a_checkpoint_on_another_base_is_not_used(make_run: Callable[..., Context], tiny_model: Path) -> None:
    fit(make_run(finetune=None), tiny_model, recipe(maxSteps=1), lora=True)
    _, report = fit(make_run(finetune=None), tiny_model, recipe(maxSteps=1), lora=True, base="sha256:b")
    assert report.resumed_at is None
    _, report = fit(make_run(finetune=None), tiny_model, recipe(maxSteps=1), lora=True, base="sha256:b")
    assert report.resumed_at == 1


def test_accumulated_batches_weigh_tokens_not_batches(make_run: Callable[..., Context], tiny_model: Path) -> None:
    """One step over all examples at once and one step over them in small batches are the same step."""
    rows = len(examples())
    once, first = fit(
        make_run(uid="a", finetune=None), tiny_model, recipe(maxSteps=1, batchSize=rows, gradientAccumulation=1)
    )
    parts, second = fit(
        make_run(uid="b", finetune=None), tiny_model, recipe(maxSteps=1, batchSize=3, gradientAccumulation=22)
    )
    assert first.tokens == second.tokens
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert all(torch.allclose(once[name], parts[name], atol=1e-5) for name in once)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_memory_only(
    make_run: Callable[..., Context], tiny_model: Path, lora: bool
) -> None:
    plain, _ = fit(make_run(uid="a", finetune=None), tiny_model, recipe(), lora)
    less, _ = fit(make_run(uid="b", finetune=None), tiny_model, recipe(gradientCheckpointing=True), lora)
    assert all(torch.allclose(plain[name], less[name], atol=1e-6) for name in plain)


def test_loss_is_that_of_transformers(tiny_model: Path) -> None:
    loaded = models.load(tiny_model, "tiny")
    encoded = encoding.encode(loaded.tokenizer, examples()[:5], loaded.stop_ids, "assistant", 256).items
    batch = collate(encoded, 0, "cpu")
    with torch.no_grad():
        ours = loss_sum(loaded.model, batch) / batch.trained
        theirs = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_a_diverging_loss_is_named_with_its_step(
    make_run: Callable[..., Context], tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    loaded = models.load(broken, "tiny")
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("inf"))
    loaded.model.save_pretrained(broken)
    with pytest.raises(RunFailure, match=r"became nan at step 1 .*learningRate") as caught:
        fit(make_run(finetune=None), broken, recipe())
    assert caught.value.reason == "LossDiverged"
    assert not caught.value.retryable


def test_an_unreachable_store_stops_the_run_rather_than_restart_it(
    make_run: Callable[..., Context], tiny_model: Path
) -> None:
    ctx = make_run(finetune=None, checkpoint="pvc://gone/checkpoint")
    with pytest.raises(RunFailure) as caught:
        fit(ctx, tiny_model, recipe())
    assert caught.value.reason in ("SourceNotFound", "StoreUnavailable")


def test_counters_survive_json(tmp_path: Path) -> None:
    counters = state.Counters("f", step=3, loss=0.1 + 0.2, seconds=1e-9)
    (tmp_path / state.COUNTERS).write_text(json.dumps(counters.__dict__))
    assert state.read_counters(tmp_path) == counters
