"""HAProxy under its agent's hand, where things take longer than they should, or are fewer."""

import json
import shutil

import pytest
from router_world import ask, eventually, free_port, routes

from slmops_router import control, runtime
from slmops_router.control import Haproxy
from slmops_router.haproxy_cfg import Place, fingerprint
from slmops_router.routes import parse
from slmops_router.runtime import RuntimeApiError

PROGRAM = shutil.which("haproxy") or "/usr/sbin/haproxy"


@pytest.fixture
def start(tmp_path, dns):
    """Start a HAProxy with these routes, and the program and the place of the test's own."""
    made = []

    def begin(wanted, program=PROGRAM, **place):
        where = Place(tmp_path / "run", free_port(), free_port(), nameservers=(dns.address,), **place)
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
