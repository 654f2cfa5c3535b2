"""A step on several threads: the gradients of one, and the same ones every time."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import task
from torch import nn

from slmops.api.finetune import Lora
from slmops_trainer import encoding, finetune, models, shards
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
        return loss_sum(loaded.model, collate([rows[row] for row in dealt[share]], 0, "cpu")) / 10

    dealt = shards.deal([len(row.input_ids) for row in rows], shares)
    total = pool.backward(loss, len(dealt)) + pool.backward(loss, len(dealt))
    pool.close()
    return total, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shares", [2, 3, 4])
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
def test_an_adapter_of_an_embedding_learns_the_same_on_all_threads(tiny_model: Path) -> None:
    """Its gradient comes transposed, and AdamW's fused kernel reads numbers in the order in which they lie."""

    def tuned(shares: int) -> dict[str, torch.Tensor]:
        loaded = models.load(tiny_model, "tiny")
        loaded.model.config.tie_word_embeddings = False
        torch.manual_seed(0)
        untied = type(loaded.model)(loaded.model.config)
        model = finetune.adapt(untied, Lora(r=4, dropout=0.0, target_modules=["q_proj", "embed_tokens"]), 0)
        examples = [Example((Message("user", text),), answer, line) for line, (text, answer) in enumerate(task(), 1)]
        rows = encoding.encode(loaded.tokenizer, examples, loaded.stop_ids, "assistant", 256).items[:8]
        named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(named.values(), lr=0.01, fused=True)
        dealt = shards.deal([len(row.input_ids) for row in rows], shares)
        pool = shards.Shards(list(named.values()), shares)
        for _ in range(2):  # A has a gradient once B is not zero
            batches = [collate([rows[row] for row in share], 0, "cpu") for share in dealt]
            pool.backward(lambda share: loss_sum(model, batches[share]), len(dealt))  # noqa: B023  # done in this round
            optimizer.step()
            optimizer.zero_grad()
        pool.close()
        return {name: value.detach() for name, value in named.items()}

    whole, parts = tuned(1), tuned(2)
    assert any("lora_embedding_A" in name for name in whole)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([5], 2, [[0]]),
        ([4, 4, 4, 4], 1, [[0, 1, 2, 3]]),
        ([4, 4, 4, 4], 2, [[0, 1], [2, 3]]),
        ([4, 4, 4, 4, 4], 2, [[0, 1, 2], [3, 4]]),
        ([1, 9, 1, 1], 2, [[1], [0, 2, 3]]),  # 9 and 3 tokens, not 18 and 2
        ([2, 8, 3, 7, 2, 2], 2, [[1, 3], [2, 0, 4, 5]]),  # 16 and 12
        ([3, 2], 4, [[0], [1]]),
    ],
)
def test_rows_of_like_lengths_share_their_padding(lengths: list[int], most: int, expected: list[list[int]]) -> None:
    assert shards.deal(lengths, most) == expected


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_every_row_is_dealt_once_and_no_dealing_into_two_is_better(most: int) -> None:
    draw = random.Random(most)
    for _ in range(100):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 17))]
        dealt = shards.deal(lengths, most)
        assert sorted(row for share in dealt for row in share) == list(range(len(lengths)))
        assert 1 <= len(dealt) <= most
        if most == 2:
            down = sorted(lengths, reverse=True)
            cuts = [max(cut * down[0], len(down[cut:]) * max(down[cut:], default=0)) for cut in range(1, len(down) + 1)]
            assert max(len(share) * max(lengths[row] for row in share) for share in dealt) == min(cuts)


@pytest.mark.usefixtures("two_threads")
def test_the_main_threads_own_parallelism_stays() -> None:
    shards.Shards([nn.Parameter(torch.ones(1))], 2).close()
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("count", "numbers", "most"), [(1, 1, 1), (2, 1, 4), (2, 65 << 20, 2)])
def test_large_gradients_are_held_once_a_thread(count: int, numbers: int, most: int) -> None:
    pool = shards.Shards([nn.Parameter(torch.ones(1).expand(numbers))], count)
    pool.close()
    assert pool.most == most


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
