"""What the README and the pages tell a newcomer to do can be done with what is in the clone."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BATCH = ("DistillationJob", "FineTuneJob", "QuantizedModel")


def missing(name: str) -> list[str]:
    """What the image's Dockerfile copies that is not in the clone: then its context is made by something else."""
    text = (ROOT / f"images/{name}/Dockerfile").read_text(encoding="utf-8")
    copies = re.findall(r"^(?:COPY|ADD) (?!--from)(.*) \S+$", text, re.MULTILINE)
    return [source for copy in copies for source in copy.split() if not (ROOT / source).exists()]


def test_the_images_to_build_are_those_whose_files_are_here() -> None:
    (names,) = re.findall(r"`images/NAME/Dockerfile` for (.*?);", README, re.DOTALL)
    told = {name for name in re.findall(r"\w+", names) if name != "and"}
    all_of_them = {path.parent.name for path in (ROOT / "images").glob("*/Dockerfile")}
    assert told == {name for name in all_of_them if not missing(name)}
    assert {"base", "pause"} <= all_of_them - told


def test_the_server_can_be_started_as_its_page_says() -> None:
    """The lines were tried by hand; what they name is looked for here."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8").partition("\n## ")[0]
    image = (ROOT / "images/server/Dockerfile").read_text(encoding="utf-8")
    (dockerfile,) = re.findall(r"^docker build -t slmops-server -f (\S+) \.$", page, re.MULTILINE)
    assert dockerfile == "images/server/Dockerfile"
    assert re.search(r"^docker run .* -p 8000:8000 .* slmops-server --model /model ", page, re.MULTILINE)
    assert 'ENTRYPOINT ["slmops-server"]' in image
    assert "EXPOSE 8000" in image
    ((python, folder, extras),) = re.findall(
        r'^python(\S+) -m venv .*pip install "\./(\S+)\[(\S+)\]"$', page, re.MULTILINE
    )
    assert f"python:{python}-" in image
    package = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) == set(package["optional-dependencies"])
    (program,) = re.findall(r"^\.venv/bin/(\S+) --model", page, re.MULTILINE)
    assert program in package["scripts"]
    (lock,) = re.findall(r"pip install .* -r (\S+)`", page)
    assert lock in image
    assert (ROOT / lock).is_file()


PAGES = [ROOT / "README.md", ROOT / "images/artifacts/README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("operator", "e2e", "images/artifacts", "images/trainer", "images/server", "images/router")


def test_programs_that_the_pages_name_are_in_the_clone() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    modules = set(re.findall(r"\bpython3? -m ([a-z_.]+[a-z])", text))
    assert {"kit.bench_serving_memory", "slmops_artifacts", "slmops_trainer.multi_lora"} <= modules
    places = {name: [ROOT / part / name.replace(".", "/") for part in CODE] for name in modules}
    assert not [
        name
        for name, found in places.items()
        if not any(place.with_suffix(".py").exists() or (place / "__main__.py").exists() for place in found)
    ]
    files = set(re.findall(r"\btests/[\w/]*\.py\b", text))
    assert {"tests/kube/test_many.py", "tests/server/bench_latency.py"} <= files
    assert not [file for file in files if not (ROOT / file).exists()]


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for found in yaml.safe_load_all(text):
                if isinstance(found, dict) and found.get("kind") in BATCH:
                    yield page.name, found


ON_A_GPU = [(page, found) for page, found in examples() if "nvidia.com/gpu" in str(found["spec"].get("pod"))]


@pytest.mark.parametrize(("page", "example"), ON_A_GPU, ids=[page for page, _ in ON_A_GPU])
def test_an_example_with_a_gpu_names_an_image_that_can_use_it(page: str, example: dict[str, Any]) -> None:
    assert {"finetunejob.md", "install.md"} <= {page for page, _ in ON_A_GPU}
    assert example["spec"]["pod"].get("image"), "the default image computes on the CPU"
