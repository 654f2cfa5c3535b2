"""A step on several threads: the gradients of one, and the same ones every time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import task
from torch import nn

from slmops_trainer import encoding, models, shards
from slmops_trainer.data import Example, Message
from slmops_trainer.loss import collate, loss_sum


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(folder: Path, shares: int) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the same rows, twice in a row as two accumulated batches."""
    loaded = models.load(folder, "tiny")
    examples = [Example((Message("user", text),), answer, line) for line, (text, answer) in enumerate(task(), 1)]
    rows = encoding.encode(loaded.tokenizer, examples, loaded.stop_ids, "assistant", 256).items[:7]
    parameters = list(loaded.model.parameters())
    pool = shards.Shards(parameters, shares)

    def loss(share: int) -> torch.Tensor:
        return loss_sum(loaded.model, collate(rows[share::shares], 0, "cpu")) / 10

    total = pool.backward(loss, shares) + pool.backward(loss, shares)
    pool.close()
    return total, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shares", [2, 3])
def test_shares_add_up_to_the_whole_bit_for_bit_each_time(tiny_model: Path, shares: int) -> None:
    whole, expected = gradients(tiny_model, 1)
    total, found = gradients(tiny_model, shares)
    again, same = gradients(tiny_model, shares)
    assert total == pytest.approx(whole, rel=1e-5)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert again == total
    assert all(torch.equal(one, other) for one, other in zip(found, same, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_the_main_threads_own_parallelism_stays() -> None:
    shards.Shards([nn.Parameter(torch.ones(1))], 2).close()
    assert torch.get_num_threads() == 2


def test_a_failing_share_fails_the_step() -> None:
    def loss(share: int) -> torch.Tensor:
        raise ValueError(f"share {share}")

    with pytest.raises(ValueError, match="share 0"):
        shards.Shards([nn.Parameter(torch.ones(1))], 2).backward(loss, 2)


class _Config:
    def __init__(self, **rates: Any) -> None:
        self.rates = rates

    def to_dict(self) -> dict[str, Any]:
        return self.rates


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("dropout", "rates", "bf16", "expected"),
    [
        (0.0, {"attention_dropout": 0.0, "rope_theta": 1e4}, False, 2),
        (0.0, {}, True, 1),
        (0.1, {}, False, 1),
        (0.0, {"attention_dropout": 0.1}, False, 1),
        (0.0, {"attn_pdrop": 0.1}, False, 1),
    ],
)
def test_only_what_draws_nothing_is_dealt_out(
    dropout: float, rates: dict[str, float], bf16: bool, expected: int
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(dropout))
    model.config = _Config(**rates)  # type: ignore[assignment]  # what transformers' models have
    assert shards.count(model, bf16=bf16) == expected
