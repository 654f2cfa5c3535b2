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
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = [
    (page.name, line.removeprefix("$ ").strip())
    for page in [*PAGES, ROOT / "images/artifacts/README.md"]
    for language, text in BLOCK.findall(page.read_text())
    if language in ("", "console")
    for line in text.splitlines()
]


def deployment_with(metrics: object) -> Object:
    """A ModelDeployment whose rollout has these metrics."""
    spec = {
        "model": {"uri": "oci://registry/model:1"},
        "rollout": {"steps": [{"weight": 10}], "analysis": {"metrics": metrics}},
    }
    return {"apiVersion": "slmops.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "x"}, "spec": spec}


OTHERS = [
    (page.name, yaml.safe_load(text))
    for page in PAGES
    for text in FENCE.findall(page.read_text())
    if "apiVersion: slmops.dev/" not in text
]


def test_yaml_lists_in_the_docs_are_metrics_that_are_accepted(api: Api) -> None:
    lists = [found for _, found in OTHERS if isinstance(found, list)]
    assert lists
    for metrics in lists:
        body = deployment_with(metrics)
        metadata = {"name": "x", "namespace": api.namespace}
        api.ask("POST", api.path(body["kind"]), {**body, "metadata": metadata}, dryRun="All", fieldValidation="Strict")


def test_other_yaml_in_the_docs_is_values_of_the_chart() -> None:
    values = yaml.safe_load((ROOT / "charts/slmops/values.yaml").read_text())

    def unknown(given: object, known: object, path: str) -> list[str]:
        if not isinstance(given, dict) or not isinstance(known, dict):
            return []
        missing = [f"{path}.{key}" for key in given if key not in known]
        return missing + [each for key in given if key in known for each in unknown(given[key], known[key], key)]

    for page, found in OTHERS:
        if not isinstance(found, list) and list(found) != ["data"]:  # a ConfigMap's: tests/chart/test_argo.py runs it
            assert not unknown(found, values, page)


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for _, line in COMMANDS if line.startswith("make ")}
    named |= {target for page in PAGES for target in re.findall(r"`make ([a-z0-9-]+)", page.read_text())}
    assert {"demo", "test", "bench-serving"} <= named <= targets, named - targets


def test_fields_that_the_docs_explain_exist() -> None:
    paths = [line.split()[2] for _, line in COMMANDS if line.startswith("kubectl explain ")]
    assert paths
    for path in paths:
        kind, *fields = path.split(".")
        crd = yaml.safe_load((ROOT / f"crds/{kind}s.slmops.dev.yaml").read_text())
        schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for field in fields:
            schema = schema["properties"][field]


def test_files_that_commands_of_the_docs_name_exist() -> None:
    files = {
        word.partition("=")[2] or word
        for _, line in COMMANDS
        for word in line.split()
        if re.match(r"(PYTHONPATH=)?(charts|images|e2e|tests)/", word) and "*" not in word
    }
    assert files
    assert not [file for file in files if not (ROOT / file).exists()]


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
