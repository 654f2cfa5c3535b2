"""docs/metrics.md names every metric that the code has, and no other; docs/serving.md those of the server."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/metrics.md").read_text()
OURS = r"(?:slmops_[a-z_]+|vllm:[a-z0-9_]+|gen_ai_server_[a-z_]+)"
MAKERS = re.compile(r"^(Gauge|Counter|Histogram|Summary|Info|histogram|counter|gauge|otel|\w+MetricFamily)$")
PARTS = {
    "operator": ROOT / "operator/slmops",
    "trainer": ROOT / "images/trainer/slmops_trainer",
    "server": ROOT / "images/server/slmops_server",
    "router": ROOT / "images/router/slmops_router",
}


def names(tree: ast.AST) -> Iterator[str]:
    """Of metrics: first arguments of what makes them, keys and members of tables that are names and nothing else."""
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Call):
            made = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            found = list(node.args[:1]) if MAKERS.match(made) else []
        elif isinstance(node, ast.Dict):
            found = list(node.keys)
        elif isinstance(node, ast.Tuple):
            found = list(node.elts)
        for item in found:
            if isinstance(item, ast.Constant) and isinstance(item.value, str) and re.fullmatch(OURS, item.value):
                yield item.value


def made(part: str) -> set[str]:
    return {name for path in PARTS[part].rglob("*.py") for name in names(ast.parse(path.read_text()))}


def told(page: str = PAGE) -> set[str]:
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(f"`({OURS})(?:{{.*?}})?`", row)}


def plain(name: str) -> str:
    return name.removesuffix("_total")


@pytest.mark.parametrize("part", ["operator", "trainer", "server"])
def test_every_metric_is_on_the_page(part: str) -> None:
    found = made(part)
    assert len(found) >= 3, "the search is broken"
    assert {plain(name) for name in found} - {plain(name) for name in told()} == set(), "add a row to docs/metrics.md"


def test_the_servers_own_page_has_all_of_its_metrics_and_no_other() -> None:
    page = told((ROOT / "docs/serving.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0])
    assert {plain(name) for name in page} == {plain(name) for name in made("server")}


def test_every_row_is_a_metric() -> None:
    labels = {"slmops_owner", "slmops_revision", "slmops_role"}  # of the second table: what scrapes add
    known = {plain(name) for part in PARTS for name in made(part)}
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = {plain(name) for row in rows for name in re.findall(OURS, row)}  # also in a query that an alert is made of
    assert named >= {plain(name) for name in told()}
    assert named - known - labels == set()


def test_every_example_query_asks_for_one_object() -> None:
    """Two objects that serve the same have a revision of the same name."""
    selectors = re.findall(r"\{[^{}]*(?:\{\{\w+\}\}[^{}]*)+\}", PAGE)
    mine = [one for one in selectors if "slmops_revision=" in one]
    assert len(mine) == 6, "the search is broken"
    assert all('slmops_owner="{{name}}"' in one for one in mine)


def test_the_bounds_that_decide_exactly_are_on_the_page_and_limits_in_examples_are_such() -> None:
    tree = ast.parse((PARTS["server"] / "metrics.py").read_text())
    made = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    fine = made["E2E_FINE"]
    assert isinstance(fine, ast.Tuple)
    own = [item.value for item in fine.elts if isinstance(item, ast.Constant)]
    bounds = [*own, *ast.literal_eval(made["E2E"])]
    found = re.search(r"be one of the bounds: ([\d.,\s]+) seconds", PAGE)
    assert found
    assert [float(word) for word in found[1].split(",")] == bounds
    examples = [*(ROOT / "docs").glob("*.md"), *(ROOT / "e2e/demo").rglob("*.yaml")]
    written = [re.findall(r"builtin: latencyP95, max: ([\d.]+)", path.read_text()) for path in examples]
    limits = [float(limit) for one in written for limit in one]
    assert limits
    assert set(limits) <= set(bounds)


def test_what_rollouts_ask_for_is_on_the_page() -> None:
    queries = (ROOT / "operator/slmops/rollout/queries.py").read_text()
    asked = set(re.findall(rf"haproxy_[a-z_]+|{OURS}(?={{)", queries))
    assert asked
    assert {name for name in asked if name not in PAGE} == set()
