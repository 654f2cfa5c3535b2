"""IPv6: clusters that have nothing else, or both; and machines that have none of it."""

from pathlib import Path

import pytest
from router_world import ModelServer, ask, routes

from slmops_router.haproxy_cfg import Place, render
from slmops_router.routes import Routes


def test_pods_that_have_ipv6_alone_are_found_and_all_ports_answer_both_families(router, port, dns):
    server = ModelServer("a", "::1", port)
    try:
        dns.records["a.test"] = ["::1"]
        one = router(routes({"a": 100}, port), reach=30)
        one.ready("a")
        for host in ("127.0.0.1", "::1"):
            assert [ask(one.port, host=host) for _ in range(5)] == [("a", "ok")] * 5
            assert one.call("GET", "/livez", token=None, host=host) == (200, {"alive": True})
            assert "haproxy_process" in one.metrics(host)
    finally:
        server.kill()


def test_pods_of_both_families_are_found_once(pod, router, port, dns):
    server = pod("a")
    dns.records["a.test"].append("::1")  # where nobody listens: the pod's other address would do as well
    one = router(routes({"a": 100}, port), reach=30)
    one.ready("a", 1)
    assert server.answered == 0
    assert ask(one.port) == ("a", "ok")
    assert server.answered == 1


@pytest.mark.parametrize(("ipv6", "bound"), [(True, "bind :::8000 v4v6"), (False, "bind :8000")])
def test_a_machine_without_ipv6_is_not_asked_for_it(ipv6, bound):
    text = render(Routes(), Place(Path("/run/x"), ipv6=ipv6))
    assert f"    {bound}\n" in text
    assert text.count("v4v6") == (2 if ipv6 else 0)
