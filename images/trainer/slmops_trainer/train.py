"""The training loop, shared by fine-tuning and distillation: exact, resumable, and small enough to read."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from slmops.api.batch import Training
from slmops_trainer import models, schedule, shards, state
from slmops_trainer.encoding import Encoded
from slmops_trainer.failure import RunFailure, interrupted
from slmops_trainer.generate import mean_loss, pad_id
from slmops_trainer.loss import collate, loss_sum

if TYPE_CHECKING:
    from slmops_trainer.context import Context

PART = "training"  # the checkpoint's subfolder
SMOOTHING = 0.9
LOG_SECONDS = 15.0
UNSAVED_MAX = 350  # characters of why there is no newer checkpoint, in the progress

log = logging.getLogger("slmops")


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What training did, over all pods of the run.

    steps, epochs    optimizer steps done, passes over the data
    tokens, seconds  real tokens seen, and the time spent in the loop
    loss             smoothed mean loss of a trained token, in nats
    evaluation_loss  the same on the evaluation set, if early stopping measured it: the least, that of the weights
    resumed_at       the step at which this pod took over, None if it began
    """

    steps: int
    epochs: float
    tokens: int
    seconds: float
    loss: float
    evaluation_loss: float | None
    stopped_early: bool
    resumed_at: int | None

    def tell(self, ctx: "Context", examples: int, too_long: int) -> None:
        """The run's metrics of its training; of the `examples` that it was given, `too_long` were left out."""
        ctx.metric("loss", self.loss)
        if self.evaluation_loss is not None:
            ctx.metric("evaluation_loss", self.evaluation_loss)
        ctx.metric("steps", self.steps)
        ctx.metric("epochs", self.epochs)
        ctx.metric("examples", examples - too_long)
        ctx.metric("examples_too_long", too_long)
        ctx.metric("tokens", self.tokens)
        ctx.metric("training_seconds", self.seconds)


def train(
    ctx: "Context",
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    training: Training,
    *,
    base: str,
    evaluation: Sequence[Encoded] = (),
    stage: str = "Training",
) -> TrainReport:
    """Train the model's trainable parameters in place, going on from the run's checkpoint if there is one.

    The model is on its device, its trainable weights in fp32; `base` is the digest of what it was before.
    `evaluation` is needed for early stopping only.
    With early stopping, the weights are in the end those with the least evaluation loss.
    Equal inputs give equal weights, bit for bit on a CPU, however often the run was stopped and resumed.
    Raises RunFailure(LossDiverged, NothingToTrain, Interrupted) and those of the checkpoint store.
    """
    run = _Run(ctx, model, tokenizer, encoded, training, base, evaluation, stage)
    run.begin()
    while run.counters.step < run.total and not run.counters.done:
        run.one_step()
        run.maybe_evaluate()
        run.maybe_save()
    return run.end()


class _StoppedError(Exception):
    """SIGTERM arrived within an evaluation; the next pod repeats it."""


class _Run:
    """The loop's variables."""

    def __init__(
        self,
        ctx: "Context",
        model: Any,
        tokenizer: Any,
        encoded: Sequence[Encoded],
        training: Training,
        base: str,
        evaluation: Sequence[Encoded],
        stage: str,
    ) -> None:
        self.ctx, self.model, self.encoded, self.training = ctx, model, encoded, training
        self.evaluation, self.stage = evaluation, stage
        self.pad = pad_id(tokenizer)
        self.folder = ctx.checkpoints.folder / PART
        self.total = schedule.total_steps(len(encoded), training)
        self.per_epoch = schedule.steps_per_epoch(len(encoded), training)
        self.lengths = [len(row.input_ids) for row in encoded]
        self.batches: tuple[int, list[list[int]]] = (-1, [])
        self.counters = state.Counters(
            state.fingerprint(model, encoded, training, base), evaluation=state.rows_digest(evaluation)
        )
        self.resumed_at: int | None = None
        self.stored, self.unsaved = 0, ""  # the step of the last checkpoint; why there is no newer one
        self.parameters = list(state.trainable(model).values())
        if not self.parameters:
            raise RunFailure("NothingToTrain", "The model has no trainable parameter.")
        self.optimizer = _optimizer(self.parameters, training)
        self.bf16 = models.in_bf16(training.precision, model.device)
        one = training.gradient_checkpointing  # it sets the global generator back, which threads share
        self.shards = shards.Shards(self.parameters, 1 if one else shards.count(model, bf16=self.bf16))

    def begin(self) -> None:
        """Seed, prepare the model, and take over what an earlier pod saved."""
        torch.manual_seed(self.training.seed)
        self.model.train()
        if self.training.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.ctx.resume()
        saved = state.read_counters(self.folder)
        if saved is not None and saved.fingerprint == self.counters.fingerprint:
            state.restore(self.folder, self.model, self.optimizer, saved)
            self._compare_evaluations(saved)
            self.counters, self.resumed_at, self.stored = saved, saved.step, saved.step
            log.info("Resumed at step %d of %d", saved.step, self.total)
        elif saved is not None:
            log.warning("Ignored a checkpoint of another recipe, another base or other data")
        self.saved_at = self.logged_at = self.stored_at = time.monotonic()
        began = f"Training began, in {'bf16' if self.bf16 else 'fp32'}"
        self.ctx.report(self.stage, self.counters.step, self.total, began)
        self.maybe_evaluate()  # the last pod may have been stopped in the middle of it
        self.ctx.check()  # and this one, too: a step more would leave that measurement out for good

    def one_step(self) -> None:
        """One optimizer step: the loss is the mean over all trained tokens of its batches together."""
        began = time.monotonic()
        step = self.counters.step
        batches = [[self.encoded[index] for index in batch] for batch in self._batches(step)]
        trained = max(1, sum(row.trained for rows in batches for row in rows))
        randoms = state.randoms()
        rate = schedule.learning_rate(step, self.total, self.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        for index, rows in enumerate(batches):
            if index and self.ctx.stop.is_set():
                # Accumulation may take longer than the pod's grace: the next pod does the whole step again.
                self.optimizer.zero_grad(set_to_none=True)
                state.set_randoms(randoms)
                return
            loss += self._backward(rows, trained)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _diverged(loss, norm, step, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(row.input_ids) for rows in batches for row in rows)
        self._count(loss, norm, rate, tokens, time.monotonic() - began)

    def _backward(self, rows: list[Encoded], trained: int) -> float:
        """Add the gradients of the rows' loss, divided by the step's trained tokens; returns that loss."""
        shares = shards.deal([len(row.input_ids) for row in rows], self.shards.most)

        def loss(share: int) -> torch.Tensor:
            batch = collate([rows[row] for row in shares[share]], self.pad, self.model.device)
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                return loss_sum(self.model, batch) / trained

        return self.shards.backward(loss, len(shares))

    def maybe_evaluate(self) -> None:
        """Early stopping: end when the evaluation loss has not fallen for `patience` measurements, and keep the best.

        The last weights are measured, too: they may be the best.
        """
        rule, counters = self.training.early_stopping, self.counters
        if rule is None or not self.evaluation or counters.step == counters.measured:
            return
        if counters.step % rule.every_steps and counters.step < self.total:
            return
        try:
            value = mean_loss(self.model, self.evaluation, self.pad, self.training.batch_size, self._unless_stopped)
        except _StoppedError:
            return
        counters.measured = counters.step
        self.ctx.live(evaluation_loss=value)
        if counters.least is None or value < counters.least:
            counters.least = value
            state.save_best(self.folder, self.model)
        if counters.best is None or value < counters.best - rule.min_delta:
            counters.best, counters.waited = value, 0
        else:
            counters.waited += 1
        log.info("Measured evaluation loss %.4f at step %d", value, counters.step)
        counters.done = counters.done or counters.waited >= rule.patience

    def maybe_save(self) -> None:
        """Save when it is time, and when the pod has been asked to stop: then the run ends here.

        A store that is away or full ends no training: it is tried again when the next checkpoint is due.
        """
        counters = self.counters
        stop = self.ctx.stop.is_set()
        due = time.monotonic() - self.saved_at >= self.training.checkpoint.every_seconds
        counters.done = counters.done or counters.step >= self.total
        if not (stop or due or counters.done):
            return
        state.save(self.folder, self.model, self.optimizer, counters)
        self.unsaved = problem = self.ctx.keep()
        self.saved_at = time.monotonic()
        if not problem:
            self.stored, self.stored_at = counters.step, self.saved_at
            log.info("Saved step %d of %d", counters.step, self.total)
        self.ctx.live(checkpoint_age_seconds=self.saved_at - self.stored_at)
        if stop and problem:
            raise interrupted(
                f"Stopped after step {counters.step} of {self.total}; saved up to {self.stored}: {problem}"
            )
        if stop:
            raise interrupted(f"Stopped after step {counters.step} of {self.total}; the checkpoint is written.")

    def end(self) -> TrainReport:
        """Leave the model as inference wants it, at its best. Raises RunFailure(LossDiverged) if a step broke it."""
        counters = self.counters
        if counters.least is not None:
            state.restore_best(self.folder, self.model)
        broken = next((name for name, value in state.trainable(self.model).items() if not value.isfinite().all()), None)
        if broken is not None:
            raise RunFailure(
                "LossDiverged",
                f"Training left values in {broken} that are no numbers. Lower training.learningRate.",
            )
        if self.training.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()
        self.shards.close()
        return TrainReport(
            steps=counters.step,
            epochs=counters.step / self.per_epoch,
            tokens=counters.tokens,
            seconds=counters.seconds,
            loss=counters.loss if counters.loss is not None else math.nan,
            evaluation_loss=counters.least,
            stopped_early=counters.step < self.total,
            resumed_at=self.resumed_at,
        )

    def _compare_evaluations(self, saved: state.Counters) -> None:
        """Where the evaluation set was changed since, what was measured on the old one counts no more."""
        if saved.evaluation not in ("", self.counters.evaluation):
            log.warning("The evaluation set has changed since the checkpoint: its losses are measured anew")
            if saved.done and saved.least is not None:  # no step follows: of all weights these were the best
                state.restore_best(self.folder, self.model)
            saved.forget_evaluations()
        saved.evaluation = self.counters.evaluation

    def _unless_stopped(self, done: int, total: int) -> None:  # noqa: ARG002  # what mean_loss calls
        if self.ctx.stop.is_set():
            raise _StoppedError

    def _batches(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, self.per_epoch)
        if self.batches[0] != epoch:
            training = self.training
            self.batches = (epoch, schedule.epoch_batches(self.lengths, training.batch_size, training.seed, epoch))
        size = self.training.gradient_accumulation
        return self.batches[1][index * size : (index + 1) * size]

    def _count(self, loss: float, norm: float, rate: float, tokens: int, seconds: float) -> None:
        counters = self.counters
        counters.step += 1
        counters.tokens += tokens
        counters.seconds += seconds
        counters.loss = loss if counters.loss is None else SMOOTHING * counters.loss + (1 - SMOOTHING) * loss
        speed = tokens / max(seconds, 1e-9)
        self.ctx.live(
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=speed,
            step=counters.step,
            tokens=counters.tokens,
            checkpoint_age_seconds=time.monotonic() - self.stored_at,
        )
        message = f"loss {counters.loss:.4f}, learning rate {rate:.2e}, {speed:,.0f} tokens/s"
        if self.unsaved:
            last = f"The last checkpoint is of step {self.stored}" if self.stored else "There is no checkpoint yet"
            message = f"{last}: {self.unsaved[:UNSAVED_MAX]} | {message}"
        self.ctx.report(self.stage, counters.step, self.total, message)
        if time.monotonic() - self.logged_at >= LOG_SECONDS:
            self.logged_at = time.monotonic()
            log.info("Step %d of %d: %s", counters.step, self.total, message)


def _optimizer(parameters: Sequence[Any], training: Training) -> Any:
    """AdamW in one fused kernel; biases and norms do not decay."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=training.learning_rate, fused=True)


def _diverged(loss: float, norm: float, step: int, rate: float) -> RunFailure:
    what = f"The loss became {loss}" if not math.isfinite(loss) else f"The gradient's norm became {norm}"
    return RunFailure(
        "LossDiverged",
        f"{what} at step {step + 1} (learning rate {rate:.2e}). Lower training.learningRate, raise warmupRatio, "
        "lower maxGradNorm, or look for broken examples in the dataset.",
    )
