"""README's commands, as they stand there: its chain, and a run on a model and data pushed from this machine."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from openai import OpenAI

from kit.kubectl import LOCAL, ROOT, Kubectl
from kit.objects import STORE
from kit.teacher import Teacher

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands below a heading."""
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


SECTION = section("Your own models and data")


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found, f"README has no {language} block"
    return found


def typed(block: str) -> str:
    """The commands of a console block."""
    return "".join(f"{line.removeprefix('$ ')}\n" for line in block.splitlines())


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


def write_data(folder: Path) -> None:
    """The three files that README's chain reads: small ones, none with a sentence of another."""
    rows = [
        [
            {"role": "user", "content": f"{size} {colour} {shape}"},
            {"role": "assistant", "content": json.dumps({"colour": colour, "shape": shape})},
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
    for theirs, ours in (
        ("https://teacher.example.com/v1", teacher.endpoint["url"]),
        ("hf://Qwen/Qwen2.5-0.5B-Instruct@main", f"{STORE}/base:tiny"),
    ):
        assert theirs in objects
        objects = objects.replace(theirs, ours)
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
