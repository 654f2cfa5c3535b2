"""Programs that the local cluster runs to set itself up: apt, what takes long, what has to wait."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from localkube import cli, packages, paths, say, shell, venv
from localkube.say import Failure


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ("E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt)", "wait"),
        ("E: Could not get lock /var/lib/apt/lists/lock - open (11: Resource temporarily unavailable)", "wait"),
        (
            "E: dpkg was interrupted, you must manually run 'dpkg --configure -a' to correct the problem.",
            "dpkg --configure -a",
        ),
        ("E: Unable to locate package haproxy", "apt-get update"),
        ("E: Package 'skopeo' has no installation candidate", "apt-get update"),
        ("E: Failed to fetch http://deb.test/x.deb  404  Not Found", "apt-get update"),
        ("E: Unmet dependencies. Try 'apt --fix-broken install'", "apt-get install --yes --fix-broken --no-remove"),
        ("E: Packages need to be removed but remove is disabled.", ""),
        ("", ""),
    ],
)
def test_what_stops_apt_is_mended(output: str, wanted: str) -> None:
    assert packages.remedy(output) == wanted


def test_no_service_starts_while_packages_are_installed_and_the_machines_policy_returns(tmp_path: Path) -> None:
    policy, preset = tmp_path / "policy-rc.d", tmp_path / "run/presets/00-x.preset"
    with packages._no_services(policy, preset):
        assert subprocess.run([policy]).returncode == 101
    assert files(tmp_path) == []
    policy.write_text("#!/bin/sh\nexit 0\n")
    policy.chmod(0o700)

    def fail() -> None:
        with packages._no_services(policy, preset):
            assert subprocess.run([policy]).returncode == 101
            raise Failure("apt failed")

    with pytest.raises(Failure):
        fail()
    assert policy.read_text() == "#!/bin/sh\nexit 0\n"
    assert policy.stat().st_mode & 0o777 == 0o700
    assert files(tmp_path) == ["policy-rc.d"]


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("own", [None, "#!/bin/sh\nexit 104\n"])
def test_a_killed_installation_is_undone_by_the_next_command(tmp_path: Path, own: str | None) -> None:
    policy, preset = tmp_path / "policy-rc.d", tmp_path / "presets/00-x.preset"
    if own is not None:
        policy.write_text(own)
    killed = packages._no_services(policy, preset)
    killed.__enter__()
    packages.allow_services(policy, preset)
    assert (policy.read_text() if policy.exists() else None) == own
    assert len(files(tmp_path)) == (own is not None)


@pytest.mark.parametrize("own", [None, "#!/bin/sh\nexit 104\n"])
def test_a_killed_installation_is_undone_also_when_it_had_brought_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    policy, preset = tmp_path / "policy-rc.d", tmp_path / "presets/00-x.preset"
    for name, value in (("POLICY", policy), ("PRESET", preset)):
        monkeypatch.setattr(packages, name, value)
    monkeypatch.setattr(paths, "APT_LOCK", tmp_path / "apt.lock")
    monkeypatch.setattr(packages.os, "geteuid", lambda: 0)
    if own is not None:
        policy.write_text(own)
    killed = packages._no_services(policy, preset)
    killed.__enter__()
    packages.ensure({"x": "/"})
    assert (policy.read_text() if policy.exists() else None) == own
    assert not preset.exists()


@pytest.mark.skipif(
    not all(map(shutil.which, ("systemctl", "deb-systemd-helper"))), reason="needs the programs of Debian's systemd"
)
def test_services_that_come_with_packages_are_not_enabled_and_those_that_were_stay_so(tmp_path: Path) -> None:
    for name in ("new", "own", "later"):
        unit = tmp_path / f"lib/systemd/system/{name}.service"
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text("[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/systemctl").touch(0o755)  # the helper wants to see one there; it runs the machine's

    def postinst(name: str) -> None:  # what a package's own script runs, for a first installation and for an upgrade
        env = {**os.environ, "DPKG_ROOT": str(tmp_path), "DPKG_MAINTSCRIPT_PACKAGE": name}
        subprocess.run(["deb-systemd-helper", "enable", f"{name}.service"], env=env, check=True)

    def enabled() -> set[str]:
        return {link.stem for link in (tmp_path / "etc/systemd/system").glob("*.wants/*.service")}

    postinst("own")
    with packages._no_services(tmp_path / "policy-rc.d", tmp_path / packages.PRESET.relative_to("/")):
        postinst("new")
        postinst("own")
        assert enabled() == {"own"}
    postinst("new")  # its next upgrade
    assert enabled() == {"own"}
    postinst("later")
    assert enabled() == {"own", "later"}


def test_a_package_is_there_whoever_brought_its_program() -> None:
    assert packages.present("sh")
    assert not packages.present("no-such-program")
    assert packages.present("/")


def test_a_quiet_step_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(say, "BEAT_SECONDS", 0.02)
    log, heard = tmp_path / "log", ""
    log.write_text("STEP 1\nSTEP 2\n")
    with say.heartbeat("building x", log):
        deadline = time.monotonic() + 10
        while "building x" not in heard and time.monotonic() < deadline:
            heard += capsys.readouterr().err
    assert "building x: 0 s so far (STEP 2)" in heard
    capsys.readouterr()
    assert capsys.readouterr().err == ""


def test_a_program_that_is_not_there_is_named_also_when_its_output_goes_to_a_log(tmp_path: Path) -> None:
    with pytest.raises(Failure) as caught:
        shell.run("no-such-program", log=tmp_path / "log")
    assert "no-such-program" in caught.value.report()


def test_a_lock_whose_file_was_removed_by_its_holder_still_excludes(tmp_path: Path) -> None:
    lock, order = tmp_path / "lock", []

    def second() -> None:
        with shell.locked(lock):
            order.append("second")
            assert lock.exists()

    with shell.locked(lock):
        other = threading.Thread(target=second)
        other.start()
        order.append("first")
        lock.unlink()
    other.join(10)
    assert order == ["first", "second"]


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line; what it does to the process is undone."""
    for name in ("NO_PROXY", "no_proxy", "PATH", "KUBECTL_KUBERC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    umask = os.umask(0o022)
    try:
        return cli.main(list(arguments))
    finally:
        os.umask(umask)


def test_an_error_of_the_system_is_said_in_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(venv, "ensure", full)
    assert main(monkeypatch, "venv") == 1
    said = capsys.readouterr().err
    assert "failed: " in said
    assert "No space left on device" in said
    assert str(tmp_path) in said
    assert "next: " in said
    assert re.search(rf"free: .*{re.escape(str(paths.LOCAL))} \d+\.\d GB", said)


def test_a_full_disk_is_measured_whoever_met_it_and_other_failures_have_no_figures(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("write /x: No space left on device\n")
    assert "  free: " in Failure("skopeo copy ended with 1\n  | No space left on device").report()
    assert "  free: " in Failure("buildah bud ended with 1", log=tmp_path / "log").report()
    assert Failure("ip link add ended with 2").report() == f"failed: ip link add ended with 2\n  next: {say.GO_ON}"


def test_programs_find_their_home_without_the_shells_word(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str | None]()
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(venv, "ensure", lambda: seen.append(os.environ.get("HOME")))
    assert main(monkeypatch, "venv") == 0
    assert seen == [str(Path.home())]


def test_programs_heed_no_proxy_for_the_node_and_none_of_the_users_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[dict[str, str]]()
    monkeypatch.setattr(venv, "ensure", lambda: seen.append(dict(os.environ)))
    monkeypatch.setenv("no_proxy", "a.test")
    assert main(monkeypatch, "venv") == 0
    assert seen[0]["NO_PROXY"] == seen[0]["no_proxy"]
    assert {"a.test", "127.0.0.1", paths.POD_CIDR} <= set(seen[0]["no_proxy"].split(","))
    assert seen[0]["KUBECTL_KUBERC"] == "false"


LEFT_OUT = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/go/bin"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"PATH": "/usr/local/bin:/usr/bin:/bin"}, f"/usr/local/bin:/usr/bin:/bin:{LEFT_OUT}"),
        (
            {"PATH": "/usr/local/go/bin:/sbin:/usr/sbin:/usr/local/sbin:/bin"},
            "/usr/local/go/bin:/sbin:/usr/sbin:/usr/local/sbin:/bin",
        ),
        ({"PATH": "/usr/local/sbin:/usr/sbin:/sbin"}, "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/go/bin"),  # sudo's
        ({}, f"{os.defpath}:{LEFT_OUT}"),
    ],
)
def test_roots_programs_and_go_are_found_after_su_and_sudo_and_from_cron(said: dict[str, str], expected: str) -> None:
    assert cli.search_path(said) == expected


def test_a_long_wait_for_another_run_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(say, "BEAT_SECONDS", 0.02)

    def second() -> None:
        with shell.locked(tmp_path / "build.lock"):
            pass

    with shell.locked(tmp_path / "build.lock"):
        other = threading.Thread(target=second)
        other.start()
        heard, deadline = "", time.monotonic() + 10
        while "waiting (build.lock): 0 s so far" not in heard and time.monotonic() < deadline:
            heard += capsys.readouterr().err
    other.join(10)
    assert "waiting (build.lock): 0 s so far" in heard


def test_whoever_is_not_root_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(packages.shutil, "which", lambda _: "/usr/bin/apt-get")
    with pytest.raises(Failure) as caught:
        packages.install(["haproxy"])
    assert "apt-get install haproxy" in caught.value.report()
