"""Guesses from a text's own n-grams."""

import pytest

from slmops_server.engines.drafts import REST, Drafts


@pytest.mark.parametrize(
    ("text", "guessed"),
    [
        ([], []),
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 3, 9, 9, 2, 3], [9, 9, 2]),
        ([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], [7, 5, 2]),  # three tokens are a surer sign than two
        ([1, 2, 7, 1, 2, 8, 1, 2], [8, 1, 2]),  # of two places the newest
        ([4, 5, 5, 5], [5, 5, 5]),  # it repeats right now
        ([1, 2, 1, 2, 1, 2], [1, 2, 1]),
    ],
)
def test_what_followed_before_is_guessed(text: list[int], guessed: list[int]) -> None:
    assert Drafts(text, 3).guess(10) == guessed


@pytest.mark.parametrize("room", [0, 1, 2])
def test_no_more_is_guessed_than_there_is_room_for(room: int) -> None:
    assert len(Drafts([1, 2, 3, 4, 5, 1, 2], 3).guess(room)) == room


def test_what_does_not_pay_rests_for_some_tokens() -> None:
    drafts = Drafts([5] * 10, 3)
    drafts.learn(3, 0)
    for _ in range(REST):
        assert drafts.guess(9) == []
        drafts.add(5)
    assert drafts.guess(9) == [5, 5, 5]


def test_good_guesses_allow_for_some_bad_ones() -> None:
    drafts = Drafts([5] * 10, 3)
    for accepted in (3, 3, 0, 0, 0, 0, 0):
        drafts.learn(3, accepted)
        assert drafts.guess(9)
    drafts.learn(3, 0)
    assert drafts.guess(9) == []
