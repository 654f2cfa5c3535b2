"""How tests get into the image that they are about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kit import imagetests, objects
from kit.kubectl import Kubectl, Object


def test_the_tests_are_readable_whatever_the_clones_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = tmp_path / "clone/tests/server/test_x.py"
    test.parent.mkdir(parents=True)
    test.write_text("x")
    test.chmod(0o600)
    test.parent.chmod(0o700)
    monkeypatch.setattr(imagetests, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(imagetests, "LOCAL", tmp_path / "local")
    (tmp_path / "local").mkdir()
    exporter = tmp_path / "clone/images/trainer/slmops_trainer/export_gguf.py"
    exporter.parent.mkdir(parents=True)
    exporter.write_text("y")
    with imagetests.readable_tests("server") as copy:
        assert (copy / "server/test_x.py").stat().st_mode & 0o777 == 0o644
        assert (copy / "server").stat().st_mode & 0o777 == 0o755
        assert (copy / "server/slmops_trainer/export_gguf.py").read_text() == "y"
    assert list((tmp_path / "local").iterdir()) == []


@pytest.mark.parametrize(
    "resources",
    [
        imagetests.pod("server-tests", "image", {}, [])["spec"]["containers"][0]["resources"],
        objects.finetune()["spec"]["pod"]["resources"],
        objects.quantize("q", "FineTuneJob", "teacher", "int4")["spec"]["pod"]["resources"],
    ],
)
def test_pods_that_may_take_much_memory_do_not_ask_for_it_beforehand(resources: Object) -> None:
    """Without a request of its own, the limit is one, and the pod has no place on a small machine."""
    assert int(resources["limits"]["memory"].removesuffix("Gi")) >= 3
    assert resources["requests"]["memory"] in ("512Mi", "1Gi")


def test_an_image_without_tests_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["imagetests", "sever"])
    assert imagetests.main() == 2
    assert "trainer|server" in capsys.readouterr().err


def test_what_the_pods_user_has_to_read_does_not_hang_on_the_shells_umask(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = os.umask(0o077), list[int]()
    try:
        monkeypatch.setattr("sys.argv", ["imagetests", "server"])
        monkeypatch.setattr(imagetests, "run", lambda *_: seen.append(os.umask(0o022)) is None)
        assert imagetests.main() == 0
        assert seen == [0o022]
    finally:
        os.umask(before)


class Interrupted(Kubectl):
    """A cluster in which the pod runs until Ctrl-C; `done`: what was asked of it."""

    done: list[str]

    def get(self, kind: str, name: str) -> Object | None:
        raise KeyboardInterrupt

    def apply(self, *objects: Object) -> None:
        self.done += [f"apply {obj['kind']}" for obj in objects]

    def delete(self, kind: str, name: str, *, wait: bool = True) -> None:
        self.done.append(f"delete {kind}/{name}")


def test_an_interrupted_pod_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Interrupted, "done", [], raising=False)
    monkeypatch.setattr("sys.argv", ["imagetests", "server"])
    monkeypatch.setattr(imagetests, "LOCAL", tmp_path)
    monkeypatch.setattr(imagetests, "Kubectl", Interrupted)
    monkeypatch.setattr(imagetests, "pytest_folder", lambda: tmp_path)
    monkeypatch.setattr(imagetests, "local_images", lambda: {"server": "image"})
    umask = os.umask(0o022)
    try:
        assert imagetests.main() == 130
    finally:
        os.umask(umask)
    assert Interrupted.done[1:] == ["delete pod/server-tests", "apply Pod", "delete pod/server-tests"]
    assert "interrupted" in capsys.readouterr().err
