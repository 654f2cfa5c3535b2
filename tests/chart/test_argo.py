"""docs/install.md tells Argo CD how our objects are: its rule, run by HAProxy's Lua, on what the operator says."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.objects import RUNNING, Object, finetune, job, pod, said, succeeded
from tests.unit.serving_world import Kubernetes, uri
from tests.unit.test_batch_again import edited
from tests.unit.test_batch_life import FATAL_JOB, after, run

HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin")
PAGE = (Path(__file__).resolve().parents[2] / "docs/install.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy for its Lua: `make debs` installs it")


def rule() -> str:
    (block,) = re.findall(r"^```yaml\n(data:\n  resource\.customizations:.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found = yaml.safe_load(yaml.safe_load(block)["data"]["resource.customizations"])
    assert list(found) == ["slmops.dev/*"]
    return str(found["slmops.dev/*"]["health.lua"])


def lua(value: Any) -> str:
    """JSON as Lua's own literals; nothing is nil."""
    if isinstance(value, dict):
        return "{" + ",".join(f"[{lua(key)}]={lua(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ",".join(map(lua, value)) + "}"
    return json.dumps(value, ensure_ascii=False) if value is not None else "nil"  # both write these alike


def health(obj: Object, folder: Path) -> tuple[str, str]:
    """Argo CD gives the object to the rule as the global `obj`, and takes the table that it returns."""
    script = f"obj = {lua(obj)}\nlocal said = (function()\n{rule()}\nend)()\nprint(said.status .. '|' .. said.message)"
    (folder / "rule.lua").write_text(script, encoding="utf-8")
    (folder / "haproxy.cfg").write_text(f"global\n  lua-load {folder}/rule.lua\n", encoding="utf-8")
    command = [str(HAPROXY), "-c", "-f", str(folder / "haproxy.cfg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"(\w+)\|(.*)", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1], found[2]


def new() -> Object:
    obj = finetune()
    return {key: value for key, value in obj.items() if key != "status"}


def running() -> Object:
    obj = finetune()
    return after(obj, run(obj, job=job(obj), pods=(pod(obj, state=RUNNING),)))


def done() -> Object:
    obj = finetune()
    return after(obj, run(obj, job=job(obj), pods=(pod(obj, phase="Succeeded", state=succeeded()),)))


def failed(reason: str = "LossDiverged") -> Object:
    obj = finetune()
    bad = pod(obj, phase="Failed", state=said(reason, "the loss is not a number", 3))
    return after(obj, run(obj, job=job(obj, **FATAL_JOB), pods=(bad,)))


def suspended() -> Object:
    obj = finetune(suspend=True)
    return after(obj, run(obj))


def serving() -> Object:
    world = Kubernetes()
    world.passes()
    return world.obj


def canary(*, approval: bool = False, abort: bool = False) -> Object:
    step = {"weight": 10, "approval": True} if approval else {"weight": 10, "pauseSeconds": 60}
    world = Kubernetes(rollout={"steps": [step]})
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    if abort:
        world.annotate(abort="*")
        world.passes()
    return world.obj


STATES: dict[str, tuple[Object, str, str]] = {
    "not seen by the operator yet": (new(), "Progressing", "not seen"),
    "a run": (running(), "Progressing", ""),
    "a run that is done": (done(), "Healthy", "Wrote"),
    "a run that failed": (failed(), "Degraded", "the loss is not a number"),
    "a run that is looked at again": (failed("BadDataset"), "Degraded", "The next try starts at"),
    "a failed run, edited": (edited(failed(), backoffLimit=9), "Progressing", "not seen"),
    "a suspended run": (suspended(), "Suspended", "spec.suspend"),
    "a model that is served": (serving(), "Healthy", "2 of 2 pods"),
    "a rollout": (canary(), "Progressing", "gets 10 %"),
    "a rollout that waits for a person": (canary(approval=True), "Suspended", "slmops.dev/promote"),
    "a rollout that was given up": (canary(abort=True), "Degraded", "Aborted by annotation"),
}


@pytest.mark.parametrize("state", STATES)
def test_argo_cd_sees_each_state_for_what_it_is(state: str, tmp_path: Path) -> None:
    obj, wanted, words = STATES[state]
    status, message = health(obj, tmp_path)
    assert status == wanted
    assert words in message
