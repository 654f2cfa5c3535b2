"""What follows from the recipe alone: steps, batches, learning rate. Pure: a resumed run needs only a counter."""

import hashlib
import math
import random
from collections.abc import Sequence

from slmops.api.batch import Training

DEFAULT_EPOCHS = 3.0
_WINDOW = 32  # batches whose examples are sorted by length together


def steps_per_epoch(examples: int, training: Training) -> int:
    """Optimizer steps of one pass over the data."""
    return math.ceil(math.ceil(examples / training.batch_size) / training.gradient_accumulation)


def total_steps(examples: int, training: Training) -> int:
    """Optimizer steps of the whole run."""
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil((training.epochs or DEFAULT_EPOCHS) * steps_per_epoch(examples, training)))


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All examples once, in batches of like length, in an order that depends on nothing but seed and epoch.

    The examples are shuffled, sorted by length within windows of some batches, and the batches shuffled: little
    padding, and still a random order.
    """
    key = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    rng = random.Random(int.from_bytes(key, "big"))  # noqa: S311  # an order, no secret
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = batch_size * _WINDOW
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return batches


def learning_rate(step: int, total: int, training: Training) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warm-up to the peak, then the decay towards 0."""
    warmup = math.ceil(training.warmup_ratio * total)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    match training.scheduler:
        case "constant":
            return training.learning_rate
        case "linear":
            return training.learning_rate * (1 - share)
        case "cosine":
            return training.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
