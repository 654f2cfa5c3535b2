"""HAProxy under its agent's hand, where things take longer than they should, or are fewer."""

import csv
import json
import shutil
import socket
import threading
from contextlib import ExitStack

import pytest
from router_world import ask, eventually, free_port, routes

from slmops_router import control, haproxy_cfg, runtime
from slmops_router.control import Haproxy
from slmops_router.haproxy_cfg import FRONT, Place, clients, fingerprint
from slmops_router.main import open_files
from slmops_router.routes import parse
from slmops_router.runtime import RuntimeApiError

PROGRAM = shutil.which("haproxy") or "/usr/sbin/haproxy"


@pytest.fixture
def start(tmp_path, dns):
    """Start a HAProxy with these routes, and the program and the place of the test's own."""
    made = []

    def begin(wanted, program=PROGRAM, **place):
        how = {"nameservers": (dns.address,), "files": open_files(), **place}
        where = Place(tmp_path / "run", free_port(), free_port(), **how)
        made.append(Haproxy(where, program))
        made[-1].start(wanted)
        eventually(made[-1].ready, "ready")
        return made[-1]

    yield begin
    for one in made:
        one.stop()


@pytest.fixture
def wrapped(tmp_path):
    """A program that does something before it becomes HAProxy, also when HAProxy starts itself anew."""

    def write(lines):
        program = tmp_path / "program"
        program.write_text(f'#!/bin/bash\n{lines}\nexec -a "$0" {PROGRAM} "$@"\n')
        program.chmod(0o755)
        return str(program)

    return write


def wanted(weights, port, epoch=""):
    return parse(json.dumps(routes(weights, port, epoch)))


def test_a_reload_holds_though_nothing_can_be_read_of_it_at_first(pod, start, port, monkeypatch):
    pod("a", chunks=1)
    one = start(wanted({"a": 100}, port, "one"))
    assert ask(one.place.port) == ("a", "ok")
    new = wanted({"a": 100, "b": 0}, port, "two")
    calm = runtime.ask

    def silent(path, command):
        if command == "show stat" and fingerprint(new) in calm(path, "show info"):
            raise RuntimeApiError("HAProxy does not answer: timed out")
        return calm(path, command)

    monkeypatch.setattr(runtime, "ask", silent)
    one.set(new)
    assert one.ready()
    monkeypatch.undo()
    assert ask(one.place.port) == ("a", "ok")
    seen = one.observe()
    assert seen["routes"] == new.dump()
    assert seen["revisions"]["a"]["requests"] == 1  # of the new epoch


@pytest.fixture
def late(start, wrapped, tmp_path, monkeypatch):
    """A HAProxy that reloads only when `release` is called, and an agent without patience."""
    hold = tmp_path / "hold"
    slow = wrapped(f'[[ " $* " != *" -sf "* ]] || while [ -e {hold} ]; do sleep 0.05; done')

    def begin(old, new):
        one = start(old, slow)
        assert ask(one.place.port) == ("a", "ok")
        hold.touch()
        monkeypatch.setattr(control, "START_SECONDS", 0.3)
        with pytest.raises(RuntimeApiError, match="did not take"):
            one.set(new)
        monkeypatch.undo()
        assert one.ready()
        assert one.observe()["routes"] == old.dump()
        return one, hold.unlink

    return begin


def test_a_reload_that_comes_late_is_in_force_then_and_the_router_was_ready_all_the_time(pod, late, port):
    pod("a", chunks=1), pod("b", chunks=1)
    new = wanted({"a": 70, "b": 30}, port)
    one, release = late(wanted({"a": 100}, port), new)
    release()
    eventually(lambda: one.ready() and one.observe()["routes"] == new.dump(), "the late routes are in force")
    seen = one.observe()["revisions"]["a"]
    assert (seen["weight"], seen["requests"]) == (70, 1)  # the answer of the process before counts
    assert parse(one.saved.read_bytes()) == new
    eventually(lambda: one.observe()["revisions"]["b"]["ready"], "b is reached")
    assert sum(ask(one.place.port)[0] == "b" for _ in range(100)) == 30


def test_a_late_reload_is_told_though_other_routes_were_set_before_it_came(pod, late, port):
    pod("a", chunks=1)
    old, new = wanted({"a": 100, "b": 0}, port), wanted({"a": 100, "c": 0}, port)
    one, release = late(old, new)
    read = (one.place.folder / "haproxy.cfg").read_text()
    one.set(old)
    (one.place.folder / "haproxy.cfg").write_text(read)  # as if HAProxy had read it before
    release()
    eventually(lambda: one.observe()["routes"] == new.dump(), "the late routes are in force")
    one.set(old)
    assert one.observe()["routes"] == old.dump()
    assert ask(one.place.port) == ("a", "ok")


def stat(one, proxy, server, column):
    """One figure of HAProxy's own."""
    rows = runtime.ask(one.place.socket, "show stat").removeprefix("# ").splitlines()
    return next(row[column] for row in csv.DictReader(rows) if (row["pxname"], row["svname"]) == (proxy, server))


def test_clients_at_their_limit_leave_room_for_their_requests_and_for_the_probes(pod, start, port):
    pod("a", chunks=30, pause=0.1)
    one = start(wanted({"a": 100}, port), clients=8)
    down = stat(one, "split", "a", "chkdown")
    with ExitStack() as held:
        idle = [held.enter_context(socket.create_connection(("127.0.0.1", one.place.port))) for _ in range(8)]
        eventually(lambda: stat(one, FRONT, "FRONTEND", "scur") == "8", "all places are taken")
        probed = int(stat(one, "in-a", "FRONTEND", "stot"))
        eventually(lambda: int(stat(one, "in-a", "FRONTEND", "stot")) >= probed + 12, "probes go on")
        assert stat(one, "split", "a", "status") == "UP"
        results = []
        asking = [threading.Thread(target=lambda: results.append(ask(one.place.port))) for _ in range(8)]
        for thread in asking:
            thread.start()
        for connection in idle:
            connection.close()
        eventually(lambda: stat(one, "a", "BACKEND", "scur") == "8", "every client has its answer running")
        for thread in asking:
            thread.join(20)
    assert results == [("a", "ok")] * 8
    assert stat(one, "split", "a", "chkdown") == down


def test_where_few_files_may_be_open_there_are_fewer_clients_and_haproxy_starts(pod, start, wrapped, port):
    pod("a", chunks=1)
    few = wanted({"a": 100}, port)
    one = start(few, wrapped("ulimit -n 1000"), files=1000)
    assert clients(few, one.place) == 123
    assert ask(one.place.port) == ("a", "ok")


def test_many_places_for_pods_fit_too(start, wrapped, port):
    many = parse(json.dumps(routes({"a": 0, "b": 0, "c": 0}, port, a=512, b=512, c=512)))
    start(many, wrapped("ulimit -n 4000"), files=4000)


def test_a_client_that_takes_nothing_is_cut_off_before_its_server_does_so_and_is_no_error(
    pod, start, port, monkeypatch
):
    monkeypatch.setattr(haproxy_cfg, "STALL", 1)
    server = pod("a", chunks=2, pause=1.2)
    one = start(wanted({"a": 100}, port))
    server.thought.clear()
    threading.Timer(1.2, server.thought.set).start()
    assert ask(one.place.port) == ("a", "ok")  # who waits for more takes all there is
    server.name, server.chunks, server.pause = "a" * 100_000, 10_000, 0
    with socket.create_connection(("127.0.0.1", one.place.port), timeout=20) as client:
        client.sendall(b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        eventually(lambda: server.cut, "nothing more is sent")
        eventually(lambda: stat(one, "a", "BACKEND", "scur") == "0", "its end is counted")
    seen = one.observe()["revisions"]["a"]
    assert (seen["requests"], seen["responses"]["2xx"], seen["aborted"]) == (2, 2, 0)
