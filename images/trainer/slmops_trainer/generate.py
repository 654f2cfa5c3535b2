"""Greedy answers and perplexity of a causal language model, in batches that change no answer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from slmops_trainer.data import Example
from slmops_trainer.encoding import Encoded, decode_answer, encode_prompt
from slmops_trainer.loss import collate, loss_sum
from slmops_trainer.models import context

OnBatch = Callable[[int, int], None]


def generate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    max_tokens: int,
    batch_size: int,
    *,
    stop_ids: Sequence[int] | None = None,
    on_batch: OnBatch | None = None,
    check: Callable[[], None] | None = None,
) -> list[str]:
    """The greedy answer to each example's question, in their order, without special tokens.

    Prompts are padded on the left, and a row's answer is that of the row alone. A prompt that leaves no room in the
    model's context gets an empty answer. `on_batch(done, total)` is called after each batch, `check()` after each
    token, for a batch of a large model takes longer than a pod that is asked to stop has. Both may raise.
    """
    stops = list(stop_ids or [tokenizer.eos_token_id])
    prompts = [encode_prompt(tokenizer, example) for example in examples]
    room = context(model)
    answers = [""] * len(prompts)
    # Equal lengths side by side: little padding, and the longest, which memory must hold, come first.
    order = [
        index for index in sorted(range(len(prompts)), key=lambda at: -len(prompts[at])) if len(prompts[index]) < room
    ]
    done = len(prompts) - len(order)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        limits = [min(max_tokens, room - len(prompts[index])) for index in batch]
        rows = _answers(model, [prompts[index] for index in batch], limits, stops, pad_id(tokenizer), check)
        for index, row in zip(batch, rows, strict=True):
            answers[index] = decode_answer(tokenizer, row)
        done += len(batch)
        if on_batch is not None:
            on_batch(done, len(prompts))
    model.train(was_training)
    return answers


def perplexity(
    model: Any, encoded: Sequence[Encoded], pad_id: int, batch_size: int, on_batch: OnBatch | None = None
) -> float:
    """Exp of the mean negative log likelihood of the answers' tokens."""
    return math.exp(min(700.0, mean_loss(model, encoded, pad_id, batch_size, on_batch)))


def mean_loss(
    model: Any, encoded: Sequence[Encoded], pad_id: int, batch_size: int, on_batch: OnBatch | None = None
) -> float:
    """Mean negative log likelihood of the trained tokens, in nats; the model's mode is left as it was.

    `on_batch` may raise.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    order = sorted(range(len(encoded)), key=lambda at: -len(encoded[at].input_ids))
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                batch = collate([encoded[index] for index in order[start : start + batch_size]], pad_id, model.device)
                total += float(loss_sum(model, batch))
                tokens += batch.trained
                if on_batch is not None:
                    on_batch(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    return total / max(1, tokens)


def pad_id(tokenizer: Any) -> int:
    """A token to fill rows with; the attention mask hides it, so any will do."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def _answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stops: list[int],
    pad: int,
    check: Callable[[], None] | None,
) -> list[list[int]]:
    """The rows' answers, each up to its own limit: when one is full, the others go on from where they are."""
    found: list[list[int]] = [[] for _ in prompts]
    left = list(range(len(prompts)))
    while left:
        limit = min(limits[at] - len(found[at]) for at in left)
        rows = _greedy(model, [[*prompts[at], *found[at]] for at in left], limit, stops, pad, check)
        for at, row in zip(left, rows, strict=True):
            found[at] += row
        # A row that ended is shorter than the limit: its end took a place.
        left = [at for at, row in zip(left, rows, strict=True) if len(row) == limit and len(found[at]) < limits[at]]
    return found


def _greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stops: list[int],
    pad: int,
    check: Callable[[], None] | None,
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[*[pad] * (width - len(prompt)), *prompt] for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    # A model's own generation defaults (penalties, temperatures) have no place in a measurement.
    config = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=stops, pad_token_id=pad)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            use_model_defaults=False,
            stopping_criteria=[_Check(check)] if check else None,
        )
    return [_until(row[width:].tolist(), stops) for row in out]


class _Check(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
    """Stops no row; what it calls may end it all by raising."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002  # the interface's names
        """Call, and say of every row that it goes on."""
        self._check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    ends = [at for at, token in enumerate(row) if token in stops]
    return row[: ends[0]] if ends else row
