"""How a router ends: whoever holds a connection gets its answers, also over one that it kept."""

import http.client
import signal
import socket
import threading
import time

from router_world import ask, eventually, routes


def kept(port, count):
    """Connections of clients that have had an answer and may ask again."""
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=20) for _ in range(count)]
    assert [ask(port, connection=one)[1] for one in connections] == ["ok"] * count
    return connections


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # the moment at which it closes: the next one is refused
    return False


def closes(router):
    """Told to end, it takes no new connections any more."""
    router.process.send_signal(signal.SIGTERM)
    eventually(lambda: refuses(router.port), "no new connections")


def test_sigterm_ends_answers_before_the_process(pod, router, port):
    pod("a", chunks=20, pause=0.1)
    one = router(routes({"a": 100}, port), drain=3)  # time for one more request
    one.ready("a")
    results = []
    thread = threading.Thread(target=lambda: results.append(ask(one.port)))
    thread.start()
    eventually(lambda: 'haproxy_backend_current_sessions{proxy="a"} 1' in one.metrics(), "the answer runs")
    one.process.send_signal(signal.SIGTERM)
    eventually(lambda: one.call("GET", "/readyz", token=None)[0] == 503, "not ready while draining")
    assert ask(one.port)[1] == "ok"  # still served: the cluster has not heard yet
    assert one.process.wait(60) == 0
    thread.join(10)
    assert results == [("a", "ok")]


def test_every_kept_connection_has_one_more_request_and_hears_that_it_was_the_last(pod, router, port):
    pod("a", chunks=1)
    one = router(routes({"a": 100}, port))
    one.ready("a")
    connections = kept(one.port, 3)
    closes(one)
    for connection in connections:
        assert ask(one.port, connection=connection) == ("a", "ok")
        assert connection.sock is None  # `Connection: close`
    assert one.process.wait(20) == 0


def test_connections_from_before_the_last_reload_are_waited_for_too(pod, router, port):
    pod("a", chunks=1)
    one = router(routes({"a": 100}, port))
    one.ready("a")
    connections = kept(one.port, 3)
    one.set(routes({"a": 100, "b": 0}, port))  # from here on they belong to an older process
    closes(one)
    end = time.monotonic() + 3
    eventually(lambda: time.monotonic() > end, "it has looked several times whether it may end")
    assert [ask(one.port, connection=connection) for connection in connections] == [("a", "ok")] * 3
    assert one.process.wait(20) == 0


def test_routes_set_while_it_ends_hold_and_do_not_keep_it(pod, router, port):
    pod("a", chunks=1), pod("b", chunks=1)
    one = router(routes({"a": 100}, port))
    one.ready("a")
    connections = kept(one.port, 3)
    closes(one)
    one.set(routes({"a": 100, "b": 0}, port))
    eventually(lambda: refuses(one.port), "no new connections, after a reload either")
    one.set(routes({"a": 0, "b": 100}, port))
    assert [ask(one.port, connection=connection)[1] for connection in connections] == ["ok"] * 3
    assert one.process.wait(20) == 0


def test_clients_that_never_rest_are_sent_away(pod, router, port):
    pod("a", chunks=1)
    one = router(routes({"a": 100}, port))
    one.ready("a")
    connections = kept(one.port, 3)
    one.process.send_signal(signal.SIGTERM)

    def leaves(connection):
        assert ask(one.port, connection=connection) == ("a", "ok")
        return connection.sock is None

    for connection in connections:
        eventually(lambda connection=connection: leaves(connection), "told that this was the last answer")
    assert one.process.wait(20) == 0
