"""docs/modeldeployment.md and `kubectl explain` say of every change to a ModelDeployment whether it is a rollout."""

import re
from pathlib import Path
from typing import Any

import pytest

from slmops.api.deployment import Endpoint, ModelDeploymentSpec, Revision
from slmops.api.run import Input
from slmops.rollout.revision import identify

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/modeldeployment.md").read_text(encoding="utf-8")
BEFORE: dict[str, Any] = {"model": {"uri": "oci://r/m:1"}}
# field -> a spec that differs by it alone, and whether that is a new revision
CHANGES: dict[str, tuple[dict[str, Any], bool]] = {
    "model": ({"model": {"uri": "oci://r/m:2"}}, True),
    "model.secretRef": ({"model": {"uri": "oci://r/m:1", "secretRef": {"name": "token"}}}, True),
    "servedName": ({"servedName": "other"}, True),
    "engine": ({"engine": {"args": ["--slots", "2"]}}, True),
    "endpoint.apiKeysSecretRef": ({"endpoint": {"apiKeysSecretRef": {"name": "keys"}}}, True),
    "pod": ({"pod": {"nodeSelector": {"a": "b"}}}, True),
    "replicas": ({"replicas": 3}, False),
    "rollout": ({"rollout": {"steps": []}}, False),
}


def revision(spec: dict[str, Any]) -> str:
    whole = ModelDeploymentSpec.model_validate({**BEFORE, **spec})
    secret = whole.model.secret_ref.name if whole.model.secret_ref else None
    return identify("x", whole, Input(uri=whole.model.uri or "", secret=secret), "").revision


def test_every_field_is_looked_at() -> None:
    fields = {field.alias or name for name, field in ModelDeploymentSpec.model_fields.items()}
    assert {path.partition(".")[0] for path in CHANGES} == fields


@pytest.mark.parametrize("path", CHANGES)
def test_what_makes_a_revision_is_named_in_the_sentence_that_says_so(path: str) -> None:
    change, rolls_out = CHANGES[path]
    assert (revision(change) != revision({})) == rolls_out
    (sentence,) = re.findall(r"^Change (.*?): that is a new revision\.", PAGE, re.MULTILINE | re.DOTALL)
    assert (f"`{path}`" in sentence) == rolls_out


def test_switching_keys_on_is_told_to_be_a_rollout_where_the_field_is() -> None:
    told = Endpoint.model_fields["api_keys_secret_ref"].description or ""
    assert "stable pods ask for no key" in told
    assert "rollout.steps: []" in told
    assert "API keys" in (Revision.model_fields["revision"].description or "")


def test_a_verb_can_be_given_twice() -> None:
    """kubectl refuses to change an annotation that stands, unless told so; the operator leaves it standing."""
    commands = re.findall(r"`kubectl annotate [^`]*`", PAGE)
    assert len(commands) == 4
    assert all(" --overwrite " in command for command in commands)
