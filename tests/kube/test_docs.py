"""Every example in the docs, the README and the demo is what the API server accepts, field by field."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.kube.api import Api, Object

from slmops import docgen

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples() -> Iterator[tuple[str, Object]]:
    texts = [(page.name, text) for page in PAGES for text in FENCE.findall(page.read_text())]
    texts += [(path.name, path.read_text()) for path in sorted((ROOT / "e2e/demo/manifests").glob("*.yaml"))]
    for name, text in texts:
        for found in yaml.safe_load_all(text):
            if isinstance(found, dict) and str(found.get("apiVersion", "")).startswith("slmops.dev/"):
                yield f"{name}:{found['kind']}/{found['metadata']['name']}", found


EXAMPLES = list(examples())


def test_every_kind_has_an_example_on_its_page() -> None:
    for kind in ("DistillationJob", "FineTuneJob", "QuantizedModel", "ModelDeployment"):
        assert any(name.startswith(f"{kind.lower()}.md:{kind}/") for name, _ in EXAMPLES), kind


@pytest.mark.parametrize("example", [found for _, found in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_the_example_is_accepted(api: Api, example: Object) -> None:
    metadata = {**example["metadata"], "namespace": api.namespace}
    path = api.path(example["kind"])
    api.ask("POST", path, {**example, "metadata": metadata}, dryRun="All", fieldValidation="Strict")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_field_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert docgen.render(text, ROOT / "crds") == text, "run `make crds`"
