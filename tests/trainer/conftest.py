"""Fixtures of the trainer's tests: a tiny random Qwen2 with a small BPE tokenizer, datasets, runs."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("operator", "images/artifacts", "images/trainer", "tests/trainer")]

import pytest  # noqa: E402  # the paths come first
import torch  # noqa: E402
from ask import context  # noqa: E402
from asking import STORE  # noqa: E402
from tiny import CHATML, write_model  # noqa: E402

from slmops.api.run import Input, RunSpec  # noqa: E402
from slmops_artifacts import ArtifactError, push  # noqa: E402
from slmops_trainer import checkpoints, generation, teacher  # noqa: E402
from slmops_trainer.context import Context  # noqa: E402


@pytest.fixture(autouse=True)
def _one_machine() -> None:
    """Bit equality is promised for one number of threads; two cores are shared by all."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it: 107,072 random parameters, 1,024 tokens, ChatML."""
    return write_model(tmp_path_factory.mktemp("tiny"), CHATML)


@pytest.fixture(autouse=True)
def _claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two claims, `data` and `store`, mounted below a folder of this test."""
    monkeypatch.setenv("SLMOPS_PVC_ROOT", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "store").mkdir()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as a dataset with one file and returns its URI."""

    def write(rows: Iterable[Any], name: str = "set") -> str:
        folder = tmp_path / "data" / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return f"pvc://data/{name}"

    return write


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path) -> Callable[..., Context]:
    """Makes the context of a run, a new pod each time: the store stays, the scratch folder is fresh."""
    pods = 0

    def make(model: Path | None = None, uid: str = "uid-1", **spec: Any) -> Context:
        nonlocal pods
        pods += 1
        run = RunSpec.model_validate(
            {
                "namespace": "ml",
                "name": "tune",
                "uid": uid,
                "model": Input(uri=f"file://{model or tiny_model}"),
                "output": "pvc://store/out",
                "checkpoint": f"pvc://store/checkpoint-{uid}",
                **spec,
            }
        )
        return Context(run, tmp_path / f"pod-{pods}")

    return make


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Context]:
    """A new pod each time that asks a teacher, impatiently, on the same store."""
    monkeypatch.setattr(teacher, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(teacher, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(generation, "SAVE_SECONDS", 0.1)
    count = 0

    def make() -> Context:
        nonlocal count
        count += 1
        return context(tmp_path / f"pod-{count}", STORE)

    return make


@pytest.fixture
def fixed_tags(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """The store lets no tag be replaced: it takes the first checkpoint alone. One item for each that was pushed."""
    pushes: list[None] = []

    def picky(*arguments: Any, **more: Any) -> Any:
        pushes.append(None)
        if len(pushes) > 1:
            raise ArtifactError("Refused", "the registry refused the manifest (HTTP 412).")
        return push(*arguments, **more)

    monkeypatch.setattr(checkpoints, "push", picky)
    return pushes
