"""The serving benchmark's arithmetic."""

import pytest

from kit.bench_serving import LEAST, MOST, Measured, quantile, requests
from kit.bench_serving_memory import slope


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 3.0), (0.95, 4.0), (1.0, 4.0)])
def test_quantiles(share: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == value


def test_every_server_gets_the_same_requests_and_no_cache_helps() -> None:
    assert requests(4, 1, 32000) == requests(4, 1, 32000)
    assert [len(requests(streams, 1, 32000)) for streams in (1, 4, 16)] == [LEAST, 8, MOST]
    rounds = [requests(streams, number, 32000) for streams, number in ((4, 1), (4, 2), (8, 1))]
    others = [one for work in rounds for one in work]
    assert len({tuple(one.prompt[:2]) for one in others}) == len(others)
    assert all(32 <= len(one.prompt) <= 512 and 32 <= one.tokens <= 128 for one in others)


def test_times_of_an_answer_become_waits_and_gaps() -> None:
    measured = Measured()
    measured.note([[10.0, 10.5, 11.0, 13.0], [20.0, 21.0]])
    assert (measured.first, measured.gaps) == ([0.5, 1.0], [0.5, 2.0])


def test_a_row_holds_totals_and_the_range_of_the_rounds() -> None:
    measured = Measured(300, 3.0, first=[0.2, 0.1], gaps=[0.01, 0.03, 0.02], speeds=[90.0, 110.0], rss=7)
    assert measured.report() == {
        "tokens_per_second": 100.0,
        "tokens_per_second_min": 90.0,
        "tokens_per_second_max": 110.0,
        "ttft_p50": 0.2,
        "ttft_p95": 0.2,
        "itl_p50": 0.02,
        "itl_p99": 0.03,
        "rss_bytes": 7,
    }


def test_growth_is_that_of_the_second_half() -> None:
    assert slope([(1, 0), (2, 900), (3, 1000), (4, 1010)]) == pytest.approx(10)
    assert slope([(1, 0), (2, 900), (3, 1000), (4, 1000)]) == 0
