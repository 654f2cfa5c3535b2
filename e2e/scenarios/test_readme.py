"""README's commands, as they stand there: its chain, and a run on a model and data pushed from this machine.

And the first example of each kind's page.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

from kit import chart, pods
from kit.kubectl import LOCAL, ROOT, Kubectl
from kit.objects import STORE, TRAINING, finetune
from kit.teacher import Teacher
from slmops_artifacts import Manifest, push

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands below a heading."""
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


TEACHER, BASE = "https://teacher.example.com/v1", "hf://Qwen/Qwen2.5-0.5B-Instruct@main"  # the examples'
SECTION = section("Your own models and data")


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found, f"no {language} block"
    return found


def typed(block: str) -> str:
    """The commands of a console block."""
    return "".join(f"{line.removeprefix('$ ')}\n" for line in block.splitlines())


def with_ours(text: str, uris: dict[str, str]) -> str:
    """With URIs of this cluster in the place of the public ones, which have to be there."""
    for theirs, ours in uris.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    return text


def run_in(folder: Path, space: Kubectl, script: str, seconds: float = 120) -> str:
    """Run commands as a user would who has kubectl on the PATH, and not the venv; what they left running is ended."""
    others = [each for each in os.environ["PATH"].split(":") if Path(each) != Path(sys.executable).parent]
    path = ":".join([str(LOCAL / "bin"), *others])
    # A user is in the checkout; here models and data are beside it, so that nothing is left in it.
    script = script.replace("PYTHONPATH=images", f"PYTHONPATH={ROOT}/images").replace("$PWD/.local", str(LOCAL))
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**space.env, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing was left running
                os.killpg(process.pid, signal.SIGKILL)
        said = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, said
    return said


def write_data(folder: Path, answer: str = "") -> None:
    """The three files that the examples read: small ones, none with a sentence of another. `answer`: to all of it."""
    rows = [
        [
            {"role": "user", "content": f"{size} {colour} {shape}"},
            {"role": "assistant", "content": answer or json.dumps({"colour": colour, "shape": shape})},
        ]
        for size in ("tiny", "large", "huge")
        for colour in ("red", "green", "blue", "black")
        for shape in ("box", "ball", "cone")
    ]
    for name, chosen in {
        "prompts": [turns[:1] for turns in rows[:16]],
        "train": rows[16:28],
        "heldout": rows[28:],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chosen))


def test_the_chain(space: Kubectl, seeded: str, images: dict[str, str], tmp_path: Path) -> None:
    """With a teacher and a student that are at hand, nothing else of it changed."""
    chain = section("The chain, as you write it")
    before, after = (
        typed(block).replace("kubectl ", f"kubectl -n {space.namespace} ") for block in blocks("console", chain)
    )
    write_data(tmp_path)
    teacher = Teacher(space, images["server"], name="scripted")
    run_in(tmp_path, space, before)
    (objects,) = blocks("yaml", chain)
    objects = with_ours(objects, {TEACHER: teacher.endpoint["url"], BASE: f"{STORE}/base:tiny"})
    space.apply(*yaml.safe_load_all(objects))
    said = run_in(tmp_path, space, after, 600)
    assert "modeldeployment.slmops.dev/support condition met" in said
    student = (space.get("distillationjob", "student") or {})["status"]["metrics"]
    assert (student["answers"], student["unanswered"]) == (16, 0)  # some may be a run's before, which the store keeps
    with space.port_forward("service/support", 8000) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        question = [{"role": "user", "content": "tiny red box"}]
        answer = client.chat.completions.create(model="support", messages=question, max_tokens=8)
    assert answer.usage
    assert answer.usage.completion_tokens > 0
    lineage = (space.get("modeldeployment", "support") or {})["status"]["lineage"]["parents"]
    assert any("/base" in parent["uri"] for parent in lineage), lineage


def test_own_model_and_data(space: Kubectl, seeded: str, tmp_path: Path) -> None:
    commands, fetching = map(typed, blocks("console", SECTION))
    repository = STORE.rpartition("/")[2]
    push = next(line for line in commands.splitlines() if " push " in line)
    fetch = "".join(
        f"python -m slmops_artifacts pull oci://localhost:5000/{repository}/{name}:tiny my-{folder}\n"
        for name, folder in (("base", "model"), ("data", "data"))
    )
    said = run_in(tmp_path, space, commands.replace(push, fetch + push))
    assert '"kind":"dataset"' in said.replace(" ", ""), said

    for found in yaml.safe_load_all(blocks("yaml", SECTION)[0]):
        space.apply(found)
    done = space.wait_ready("finetunejob", "mine", 300)
    parents = [parent["uri"] for parent in done["status"]["lineage"]["parents"]]
    assert any("/models/mine" in uri for uri in parents), parents
    assert any("/data/support" in uri for uri in parents), parents

    # The shell that the result is fetched in still has the registry's port and the paths.
    shell = "".join(line for line in commands.splitlines(keepends=True) if re.search(r"port-forward|^export", line))
    run_in(tmp_path, space, shell + fetching.replace("kubectl get", f"kubectl -n {space.namespace} get"))
    assert list((tmp_path / "my-result").glob("*.safetensors"))
    assert (tmp_path / "my-result/tokenizer.json").exists()


def test_first_example_of_each_page(
    space: Kubectl, seeded: str, images: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a teacher and models that are at hand; the base already answers as its page's threshold asks."""
    pages = {
        kind: blocks("yaml", (ROOT / f"docs/{kind}.md").read_text(encoding="utf-8"))[0]
        for kind in ("distillationjob", "finetunejob", "quantizedmodel", "modeldeployment")
    }
    answer = json.dumps({"team": "billing"})
    write_data(tmp_path, answer)
    with space.within(chart.NAMESPACE).port_forward(f"service/{chart.RELEASE}-registry", 5000) as url:
        registry = url.removeprefix("http://")
        monkeypatch.setenv("SLMOPS_PLAIN_HTTP", registry)
        push(tmp_path, f"oci://{registry}/data/support:v3", Manifest(kind="dataset", format="jsonl"))
    for file in ("prompts.jsonl", "heldout.jsonl"):
        space.apply(pods.config_map(f"support-{Path(file).stem}", {file: (tmp_path / file).read_text()}))
    space.run("create", "secret", "generic", "teacher", "--from-literal=api-key=any")
    teacher = Teacher(space, images["server"], name="scripted")
    ours = {TEACHER: teacher.endpoint["url"], BASE: f"{STORE}/base:tiny"}
    space.apply(yaml.safe_load(with_ours(pages["distillationjob"], ours)))

    dataset = yaml.safe_load(pages["finetunejob"])["spec"]["dataset"]
    space.apply(finetune("able", dataset=dataset, training={**TRAINING, "maxSteps": 100}, evaluation=None))
    able = space.wait_ready("finetunejob", "able", 180)["status"]["artifact"]["uri"]
    space.apply(yaml.safe_load(with_ours(pages["finetunejob"], {BASE: able})))
    space.apply(*(yaml.safe_load(pages[kind]) for kind in ("quantizedmodel", "modeldeployment")))
    for kind, name in (
        ("distillationjob", "support-student"),
        ("finetunejob", "support-tuned"),
        ("quantizedmodel", "support-int4"),
        ("modeldeployment", "support"),
    ):
        space.wait_ready(kind, name, 180)
    with space.port_forward("service/support", 8000) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        question = [{"role": "user", "content": "tiny red box"}]
        said = client.chat.completions.create(model="support", messages=question, max_tokens=40, temperature=0)
    assert said.choices[0].message.content == answer
