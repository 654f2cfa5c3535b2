"""Which rows are computed together, and how prompts are cut: pure tables, and brute force as the judge."""

import itertools
import math
import random

import pytest

from slmops_server.engines.schedule import TILE, Pace, common, cover

INF = math.inf


@pytest.mark.parametrize(
    ("active", "seconds", "segments"),
    [
        ("....", [1, 1, 1, 1], []),
        ("x...", [1, 2], [(0, 1)]),
        ("x...", [INF, 2], [(0, 2)]),  # a lone row in company
        ("...x", [INF, 2, 9], [(2, 2)]),
        ("xxxx", [1, 1.1, 2.2, 2.4], [(0, 2), (2, 2)]),  # a knee above two rows
        ("xxxx", [1, 1.1, 1.2, 1.3], [(0, 4)]),
        ("x.x.", [1, 1.5, 1.8, 1.9], [(0, 3)]),  # cheaper to bridge the gap
        ("x.x.", [1, 1.5, 2.1, 2.2], [(0, 1), (2, 1)]),
    ],
)
def test_rows_are_grouped_at_the_least_cost(active: str, seconds: list[float], segments: list[tuple[int, int]]) -> None:
    assert cover([c == "x" for c in active], seconds)[1] == segments


@pytest.mark.parametrize("seed", range(30))
def test_no_grouping_is_cheaper(seed: int) -> None:
    draw = random.Random(seed)
    rows = draw.randrange(2, 6)
    active = [draw.random() < 0.5 for _ in range(rows)]
    seconds = [INF if draw.random() < 0.2 else draw.random() for _ in range(draw.randrange(2, 5))]
    total, segments = cover(active, seconds)

    def cost(sizes: tuple[int, ...]) -> float:
        """Of cutting the rows into pieces of these sizes and skipping the idle ones."""
        at, spent = 0, 0.0
        for size in sizes:
            if at + max(size, 1) > rows:
                return INF
            if size > 0:
                spent += seconds[size - 1]
            elif active[at]:
                return INF
            at += size or 1
        return spent if at == rows else INF

    pieces = range(len(seconds) + 1)
    least = min(cost(sizes) for n in range(1, rows + 1) for sizes in itertools.product(pieces, repeat=n))
    assert total == pytest.approx(least)
    covered = [row for first, count in segments for row in range(first, first + count)]
    if total < INF:
        assert len(covered) == len(set(covered))
        assert {row for row, wanted in enumerate(active) if wanted} <= set(covered)


@pytest.mark.parametrize("largest", [4, 7, 33, 34, 130, 256])
@pytest.mark.parametrize("budget", [0.0, 0.05, INF])
def test_prompts_are_cut_without_lone_tokens(largest: int, budget: float) -> None:
    pace = Pace(largest, {4: 0.01, 16: 0.04})
    for prompt in range(1, 300):
        left, sizes = prompt, []
        while left:
            sizes.append(pace.chunk(left, budget))
            left -= sizes[-1]
        assert sum(sizes) == prompt
        assert max(sizes) <= largest
        assert prompt == 1 or not [size for size in sizes if size % TILE == 1]


def test_of_no_rest_and_no_largest_chunk_a_lone_token_comes() -> None:
    """Neither in the chunk nor behind it; and no chunk is shorter than that takes."""
    for largest in range(4, 200):
        pace = Pace(largest, {})
        for left in range(2, 300):
            size = pace.chunk(left, INF)
            assert size % TILE != 1, (left, largest)
            assert left - size != 1, (left, largest)
            assert min(left, largest) - 3 <= size <= min(left, largest), (left, largest)


def test_chunks_are_as_long_as_the_budget_bears() -> None:
    pace = Pace(256, {4: 0.01, 16: 0.04})
    assert [pace.chunk(300, seconds) for seconds in (0.0, 0.01, 0.03, 0.04, 0.09, INF)] == [4, 4, 12, 16, 32, 256]
    for _ in range(50):
        pace.note(16, 0.2)  # the machine became slower
    assert pace.chunk(300, 0.05) == 8


def test_unmeasured_chunks_are_free() -> None:
    assert Pace(64, {}).chunk(300, 0.001) == 64


@pytest.mark.parametrize(
    ("one", "other", "count"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([4], [5], 0)]
)
def test_common_beginning(one: list[int], other: list[int], count: int) -> None:
    assert common(one, other) == count
