"""A router pod that starts beside others: it may only be called ready once it can answer."""

import pytest
from router_world import ask, eventually, routes


@pytest.mark.parametrize("lost", [0, 4])
def test_the_first_request_after_readiness_is_answered(pod, router, port, dns, lost):
    """The cluster sends requests from the moment at which the pod is ready; DNS may take its time."""
    pod("a", chunks=1), pod("b", chunks=1)
    dns.deaf = lost
    one = router(routes({"a": 90, "b": 10}, port), reach=30)
    assert [ask(one.port)[1] for _ in range(20)] == ["ok"] * 20


def test_a_router_whose_model_has_no_pod_is_ready_all_the_same(router, port):
    one = router(routes({"a": 100}, port), reach=1)
    assert ask(one.port)[1].startswith("503")


def test_a_router_that_no_nameserver_answered_knows_no_pod_and_is_not_ready(pod, router, port, dns):
    """Others beside it, which do, would be taken away for it."""
    pod("a", chunks=1)
    dns.deaf = 1_000_000
    one = router(routes({"a": 100}, port), reach=1, ready=False)
    eventually(lambda: 1_000_000 - dns.deaf > 8, "DNS asked for some seconds")
    assert one.call("GET", "/livez", token=None) == (200, {"alive": True})
    assert one.call("GET", "/readyz", token=None) == (503, {"ready": False})
    dns.deaf = 0
    one.wait_until_ready()
    one.ready("a")
    assert ask(one.port)[1] == "ok"


def test_a_router_without_requests_to_send_is_ready_at_once(router, port):
    router(routes({"a": 0}, port), reach=3600)


def test_a_router_without_routes_is_ready_at_once(router):
    router(reach=3600)


def test_pods_that_go_do_not_make_a_router_unready(pod, router, port, dns):
    server = pod("a", chunks=1)
    one = router(routes({"a": 100}, port))
    server.kill()
    dns.records["a.test"].remove(server.host)
    one.ready("a", 0)
    assert one.call("GET", "/readyz", token=None) == (200, {"ready": True})
