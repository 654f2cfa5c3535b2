"""The next token: filters, penalties, bias, guides and logprobs, against plain formulas."""

import math

import numpy as np
import pytest

from slmops_server.engines.base import Sampling
from slmops_server.engines.sampler import Sampler, scores


def logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def draws(sampling: Sampling, row: np.ndarray, count: int = 2000) -> dict[int, float]:
    sampler = Sampler(sampling, [], row.size)
    got = [sampler.pick(row.copy()) for _ in range(count)]
    return {t: got.count(t) / count for t in sorted(set(got))}


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert draws(Sampling(temperature=0), logits(1, 3, 3, 2), 3) == {1: 1.0}


def test_sampling_follows_the_probabilities() -> None:
    got = draws(Sampling(seed=1), np.log(logits(0.1, 0.2, 0.7)))
    assert got == pytest.approx({0: 0.1, 1: 0.2, 2: 0.7}, abs=0.03)


def test_temperature_sharpens() -> None:
    got = draws(Sampling(seed=1, temperature=0.5), np.log(logits(0.25, 0.75)))
    assert got == pytest.approx({0: 0.1, 1: 0.9}, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(seed=1, top_k=2), {2, 3}),
        (Sampling(seed=1, top_p=0.69), {2, 3}),
        (Sampling(seed=1, top_p=0.39), {3}),
        (Sampling(seed=1, top_p=1e-9), {3}),
        (Sampling(seed=1, min_p=0.6), {2, 3}),
        (Sampling(seed=1, top_k=3, top_p=0.75), {2, 3}),
    ],
)
def test_filters_keep_exactly_the_right_tokens(sampling: Sampling, kept: set[int]) -> None:
    assert set(draws(sampling, np.log(logits(0.1, 0.2, 0.3, 0.4)))) == kept


def test_a_seed_gives_the_same_tokens_again_and_another_seed_does_not() -> None:
    row = np.zeros(100, np.float32)
    one, again, other = (
        [s.pick(row.copy()) for _ in range(20)] for s in (Sampler(Sampling(seed=x), [], 100) for x in (-5, -5, 6))
    )
    assert one == again != other


def test_penalties() -> None:
    repeat = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [1], 3)
    assert [repeat.pick(logits(1, 3, 2)) for _ in range(3)] == [2, 1, 1]
    frequent = Sampler(Sampling(temperature=0, frequency_penalty=1.5), [1], 3)  # the prompt does not count here
    assert [frequent.pick(logits(1, 3, 2)) for _ in range(3)] == [1, 2, 1]


def test_nan_is_an_error_and_not_an_answer() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN"):
            Sampler(Sampling(temperature=temperature), [], 2).pick(logits(1, float("nan")))


@pytest.mark.parametrize("seed", range(20))
def test_filters_agree_with_sorting(seed: int) -> None:
    """Against the textbook: sort, cut by rank, by cumulated share, by ratio to the largest."""
    draw = np.random.default_rng(seed)
    row = (draw.standard_normal(3000) * draw.choice([0.1, 1, 5])).astype(np.float32).round(int(draw.integers(0, 3)))
    top_k, top_p, min_p = (
        int(draw.choice([0, 1000])),
        float(draw.choice([1.0, 0.5, 0.99])),
        float(draw.choice([0, 0.2])),
    )
    weights = np.exp((row - row.max()).astype(np.float64))
    order = np.argsort(-weights, kind="stable")
    if top_k:
        order = order[:top_k]
    reached = np.cumsum(weights[order])
    order = order[: int(np.searchsorted(reached, top_p * reached[-1])) + 1]
    order = order[weights[order] >= min_p]
    expected = np.zeros(row.size)
    expected[order] = weights[order]
    sampler = Sampler(Sampling(seed=1, top_k=top_k, top_p=top_p, min_p=min_p), [], row.size)
    sampler.pick(row)
    kept = sampler._weights[: row.size]
    assert np.count_nonzero(kept) == pytest.approx(
        order.size, abs=1
    )  # one token at the border may round to either side
    different = np.flatnonzero((kept > 0) != (expected > 0))
    assert different.size <= 2
    assert len({float(row[i]) for i in different}) <= 1
    assert kept.sum() == pytest.approx(expected.sum(), rel=0.01)


def test_a_drawn_token_is_always_an_allowed_one() -> None:
    row = np.full(1000, -np.inf, np.float32)
    row[[0, 255, 256, 999]] = 0
    assert set(draws(Sampling(seed=3), row, 400)) == {0, 255, 256, 999}


def test_bias_moves_and_forbids_tokens() -> None:
    assert draws(Sampling(temperature=0, logit_bias=((0, 5.0),)), logits(1, 3, 2), 1) == {0: 1.0}
    assert draws(Sampling(seed=1, logit_bias=((1, -100.0),)), logits(1, 3, 1)).keys() == {0, 2}


def test_no_end_token_before_min_tokens() -> None:
    sampler = Sampler(Sampling(temperature=0, min_tokens=2), [], 3, frozenset({1}))
    assert [sampler.pick(logits(1, 3, 2)) for _ in range(3)] == [2, 2, 1]


class Only:
    """A guide that allows one token after the other."""

    def __init__(self, *tokens: int) -> None:
        self.left = list(tokens)

    def allowed(self) -> np.ndarray:
        return np.arange(3) == self.left[0] if self.left else np.zeros(3, np.bool_)

    def take(self, token: int) -> None:
        assert token == self.left.pop(0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guide_is_followed_and_its_end_is_an_error(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature), [], 3, guide=Only(2, 0))
    assert [sampler.pick(logits(1, 3, 2)) for _ in range(2)] == [2, 0]
    with pytest.raises(ValueError):
        sampler.pick(logits(1, 3, 2))


def test_logprobs_are_the_models_own_whatever_is_done_to_the_choice() -> None:
    row = np.log(logits(0.1, 0.2, 0.7))
    sampler = Sampler(Sampling(temperature=0, logprobs=2, logit_bias=((0, 50.0),)), [], 3)
    assert sampler.pick(row.copy()) == 0
    assert sampler.scores
    assert sampler.scores.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in sampler.scores.top] == [2, 1]
    assert scores(row, 2, 0) == (pytest.approx(math.log(0.7), abs=1e-6), [])
    assert scores(logits(0, -np.inf), 1, 9) == (-9999.0, [(0, 0.0), (1, -9999.0)])
