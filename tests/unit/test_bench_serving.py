"""The serving benchmark's arithmetic."""

import pytest

from kit.bench_serving import EACH, Measured, quantile, requests


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 3.0), (0.95, 4.0), (1.0, 4.0)])
def test_quantiles(share: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == value


def test_every_server_gets_the_same_requests_and_no_cache_helps() -> None:
    work = requests(4, 1, 32000)
    assert work == requests(4, 1, 32000)
    assert [len(mine) for mine in work] == [EACH] * 4
    rounds = [requests(streams, number, 32000) for streams, number in ((4, 1), (4, 2), (8, 1))]
    others = [one for streams in rounds for mine in streams for one in mine]
    assert len({tuple(one.prompt[:2]) for one in others}) == len(others)
    assert all(32 <= len(one.prompt) <= 512 and 32 <= one.tokens <= 128 for one in others)


def test_a_row_holds_totals_and_the_range_of_the_rounds() -> None:
    measured = Measured(tokens=300, wall=3.0, first=[0.2, 0.1], gaps=[0.01, 0.03, 0.02], speeds=[90.0, 110.0])
    assert measured.report(7) == {
        "tokens_per_second": 100.0,
        "tokens_per_second_min": 90.0,
        "tokens_per_second_max": 110.0,
        "ttft_p50": 0.2,
        "ttft_p95": 0.2,
        "itl_p50": 0.02,
        "itl_p99": 0.03,
        "rss_bytes": 7,
    }
