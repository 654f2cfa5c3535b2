"""README's commands, as they stand there: a model and data from this machine into the registry, and a run on them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from kit.kubectl import LOCAL, ROOT, Kubectl
from kit.objects import STORE

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Your own models and data\n")[2].partition("\n## ")[0]


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found, f"README has no {language} block"
    return found


def typed(block: str) -> str:
    """The commands of a console block."""
    return "".join(f"{line.removeprefix('$ ')}\n" for line in block.splitlines())


def run_in(folder: Path, space: Kubectl, script: str) -> str:
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
            process.wait(120)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        said = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, said
    return said


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
