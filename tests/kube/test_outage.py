"""Long outages of the API server. They begin with the session (conftest.py) and are waited for at its end."""

import pytest
from tests.kube.api import wait_for
from tests.kube.conftest import Outage
from tests.kube.kubelet import Kubelet
from tests.kube.test_life import TUNE, until_job
from tests.kube.test_writes import scraped

AWAY_SECONDS = 60.0
RENEWED_SECONDS = 80.0  # more than the watches' patience
ILL_SECONDS = 120.0  # stock kopf bears 54

pytestmark = pytest.mark.slow


def recovers(outage: Outage) -> None:
    """What ended meanwhile is seen, and what is new as well: passes and watches are both back."""
    api = outage.api
    with Kubelet(api):
        api.until_phase("FineTuneJob", "tune", "Succeeded", 60)
    api.create("FineTuneJob", "later", spec=TUNE)
    until_job(api, "later-finetune")
    assert outage.operator.healthy()


def test_no_connection_for_a_minute(outages: dict[str, Outage]) -> None:
    outage = outages["away"]
    outage.last(AWAY_SECONDS)
    assert outage.operator.healthy()  # to start it anew would not help
    outage.proxy.listen()
    recovers(outage)


def test_a_new_ca_of_the_api_server(outages: dict[str, Outage]) -> None:
    outage = outages["renewed"]
    outage.last(RENEWED_SECONDS)
    recovers(outage)
    restarts = next(
        line for line in scraped(outage.operator).splitlines() if line.startswith("slmops_watch_restarts_t")
    )
    assert float(restarts.split()[1]) >= 1


def test_503_for_two_minutes(outages: dict[str, Outage]) -> None:
    outage = outages["ill"]
    outage.last(ILL_SECONDS)
    assert outage.operator.healthy()
    asked, seconds = len(outage.proxy.requests) - outage.before, outage.seconds
    assert asked < 20 + 2 * seconds, f"{asked} requests in {seconds:.0f} s are a storm"
    outage.proxy.answer = None
    recovers(outage)
    wait_for("readiness", lambda: (answer := outage.operator.get("/readyz")) is not None and answer.status_code == 200)
