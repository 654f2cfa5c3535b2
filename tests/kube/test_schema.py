"""Every constraint of every CRD, against the API server that enforces it.

The constraints are read from the generated schemas themselves: for each one an object is made that breaks it and
nothing else. CEL rules cannot be broken by a machine: what each of them rejects stands in specs.py, and a test fails
where a rule has no entry.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pytest
from tests.kube.api import Api, ApiError, Object, wait_for
from tests.kube.specs import EXAMPLES, GPU_WITHOUT_SERVER, NO_OUTPUTS, OUTPUTS, REJECTED, URI, put

from slmops import crdgen
from slmops.api.batch import MUTABLE

SCHEMAS = {kind.name: crdgen.schema(kind) for kind in crdgen.KINDS}
ITEM = re.compile(r"\.\d+(?=\.|$)")  # one case does for all items of a list
WRONG_TYPE: dict[str, Any] = {"string": 5, "integer": "x", "number": "x", "boolean": "x", "object": "x", "array": "x"}


@dataclass(frozen=True)
class Case:
    """A spec, and what the API server says to it."""

    name: str
    kind: str
    spec: Object
    said: str


def walk(schema: Object, value: Any, path: str) -> Iterator[tuple[str, Object, Any]]:
    """Each place of a value with its schema and what stands there."""
    yield path, schema, value
    if isinstance(value, dict):
        for name, field in (schema.get("properties") or {}).items():
            if name in value:
                yield from walk(field, value[name], f"{path}.{name}")
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            for name in list(value)[:1]:
                yield from walk(extra, value[name], f"{path}.{name}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from walk(schema["items"], item, f"{path}.{number}")


def broken(schema: Object, value: Any) -> Iterator[tuple[str, Any, str]]:
    """(constraint, a value that breaks it, a word of the answer) for all constraints of one place."""
    kind = schema.get("type")
    if kind:
        yield "type", WRONG_TYPE[kind], "must be of type"
    if schema.get("x-kubernetes-int-or-string"):
        yield "type", [], "must be of type"
    if "minimum" in schema:
        low = schema["minimum"]
        yield "minimum", low if schema.get("exclusiveMinimum") else low - 1, "should be greater than"
    if "maximum" in schema:
        high = schema["maximum"]
        yield "maximum", high if schema.get("exclusiveMaximum") else high + 1, "should be less than"
    if "enum" in schema:
        yield "enum", 999 if kind == "integer" else "nope", "Unsupported value"
    if "pattern" in schema:
        yield "pattern", "Not a fit!", "should match"
    if schema.get("minLength"):
        yield "minLength", "", "should be at least"
    if "maxLength" in schema:
        yield "maxLength", "a" * (schema["maxLength"] + 1), "Too long"
    if schema.get("minItems"):
        yield "minItems", [], "should have at least"
    if "maxItems" in schema and value:
        yield "maxItems", [value[0]] * (schema["maxItems"] + 1), "Too many"
    if "maxProperties" in schema:
        many = {f"k{n}": next(iter(value.values())) for n in range(schema["maxProperties"] + 1)}
        yield "maxProperties", many, "Too many"
    if schema.get("x-kubernetes-list-type") in ("map", "set"):
        yield "unique", [*value, value[0]], "Duplicate value"


def rejected_cases() -> list[Case]:
    cases: dict[str, Case] = {}
    for kind, specs in EXAMPLES.items():
        for spec in specs:
            for path, schema, value in walk(SCHEMAS[kind]["properties"]["spec"], spec, "spec"):
                inner, place = path.removeprefix("spec").removeprefix("."), ITEM.sub(".0", path)
                for constraint, bad, said in broken(schema, value):
                    changed = put({"spec": spec}, path, bad)["spec"]
                    name = f"{kind} {place} {constraint}"
                    cases.setdefault(name, Case(name, kind, changed, said))
                for field in schema.get("required") or []:
                    changed = put(spec, f"{inner}.{field}".lstrip("."), None)
                    name = f"{kind} {place}.{field} required"
                    cases.setdefault(name, Case(name, kind, changed, "Required value"))
                if "properties" in schema:
                    changed = put(spec, f"{inner}.unheardOf".lstrip("."), 1)
                    name = f"{kind} {place} unknown field"
                    cases.setdefault(name, Case(name, kind, changed, "unknown field"))
    return list(cases.values())


def constraints(schema: Object, path: str) -> Iterator[str]:
    """The names of all constraints of a schema, as rejected_cases() names them."""
    here = {
        "type": "type" in schema or schema.get("x-kubernetes-int-or-string"),
        "minLength": schema.get("minLength"),
        "minItems": schema.get("minItems"),
        "unique": schema.get("x-kubernetes-list-type") in ("map", "set"),
        **{name: name in schema for name in ("minimum", "maximum", "enum", "pattern", "maxLength", "maxItems")},
        "maxProperties": "maxProperties" in schema,
        "unknown field": "properties" in schema,
    }
    yield from (f"{path} {name}" for name, there in here.items() if there)
    yield from (f"{path}.{name} required" for name in schema.get("required") or [])
    for name, field in (schema.get("properties") or {}).items():
        yield from constraints(field, f"{path}.{name}")
    if "items" in schema:
        yield from constraints(schema["items"], f"{path}.0")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from constraints(schema["additionalProperties"], f"{path}.*")


def rules(schema: Object) -> Iterator[str]:
    """The messages of all CEL rules."""
    yield from (rule["message"] for rule in schema.get("x-kubernetes-validations") or [])
    for field in (schema.get("properties") or {}).values():
        yield from rules(field)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from rules(schema[key])


def test_no_constraint_is_without_a_case() -> None:
    cases = {case.name for case in rejected_cases()}
    missing = []
    for kind, schema in SCHEMAS.items():
        for name in constraints(schema["properties"]["spec"], "spec"):
            pattern = f"{kind} {name}"
            head, star, tail = pattern.partition(".*")
            if not any(case == pattern or (star and case.startswith(head) and case.endswith(tail)) for case in cases):
                missing.append(pattern)
    assert missing == [], "use the field in tests/kube/specs.py"


def test_no_rule_is_without_a_case() -> None:
    written = {(kind, message) for kind, schema in SCHEMAS.items() for message in rules(schema["properties"]["spec"])}
    fixed = {key for key in written if key[1].endswith("cannot be changed: a new recipe is a new object")}
    assert written - fixed == REJECTED.keys()


def tried(api: Api, kind: str, spec: Object, name: str = "x") -> str:
    """What the API server says to an object with this spec; nothing, where it takes it."""
    try:
        api.create(kind, name, spec=spec, dry_run=True)
    except ApiError as error:
        if error.status not in (400, 422):
            raise
        return error.message
    return ""


@pytest.mark.parametrize("kind", EXAMPLES)
def test_what_is_right_is_taken(api: Api, kind: str) -> None:
    for spec in EXAMPLES[kind]:
        assert tried(api, kind, spec) == ""


@pytest.mark.parametrize("kind", EXAMPLES)
def test_lists_are_stored_as_they_are_written(api: Api, kind: str) -> None:
    """Else Argo CD, which compares them whole, would call the object out of sync for ever."""
    compared = set()
    for spec in EXAMPLES[kind]:
        stored = api.create(kind, "x", spec=spec, dry_run=True)["spec"]
        for path, _, value in walk(SCHEMAS[kind]["properties"]["spec"], spec, ""):
            names = path.strip(".").split(".")
            if isinstance(value, list) and not any(name.isdigit() for name in names):
                assert reduce(dict.__getitem__, names, stored) == value, path
                compared.add(path)
    assert ".pod.env" in compared


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_broken_constraint_is_refused_by_name(api: Api, kind: str) -> None:
    cases = [case for case in rejected_cases() if case.kind == kind]
    assert len(cases) > 80
    for case in cases:
        answer = tried(api, kind, case.spec)
        assert case.said in answer, (case.name, answer)
        field = case.name.split()[1].split(".")[-1]
        assert case.said == "Too many" or field.isdigit() or field in answer, (case.name, answer)


@pytest.mark.parametrize(
    ("kind", "field"), [("DistillationJob", "student"), ("FineTuneJob", "base"), ("QuantizedModel", "source")]
)
def test_what_is_quantized_is_neither_trained_nor_quantized_again(api: Api, kind: str, field: str) -> None:
    spec = put(EXAMPLES[kind][1], field, {"ref": {"kind": "QuantizedModel", "name": "q"}})
    answer = tried(api, kind, spec)
    assert f"spec.{field}.ref.kind" in answer
    assert 'supported values: "DistillationJob", "FineTuneJob"' in answer


@pytest.mark.parametrize(("kind", "message"), REJECTED, ids=lambda value: str(value)[:60])
def test_every_rule_rejects_and_says_why(api: Api, kind: str, message: str) -> None:
    for change in REJECTED[kind, message]:
        spec = EXAMPLES[kind][0]
        for path, value in change.items():
            spec = put(spec, path, value)
        assert message in tried(api, kind, spec), change


def test_what_was_made_before_there_was_a_rule_can_still_be_scaled_and_mended(api: Api) -> None:
    """A GPU for which no server is named: the rule is of a later version than such objects."""
    url = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/modeldeployments.slmops.dev"
    place = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/x-kubernetes-validations"
    found = SCHEMAS["ModelDeployment"]["properties"]["spec"]["x-kubernetes-validations"]
    old = {"model": URI, "pod": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}

    def put_rules(rules: list[Object]) -> None:
        patch = [{"op": "replace", "path": place, "value": rules}]
        api.ask("PATCH", url, patch, content="application/json-patch+json")

    try:
        put_rules([rule for rule in found if rule["message"] != GPU_WITHOUT_SERVER])
        wait_for("the older schema", lambda: tried(api, "ModelDeployment", old) == "")
        api.create("ModelDeployment", "old", spec=old)
    finally:
        put_rules(found)
    wait_for("the newer schema", lambda: GPU_WITHOUT_SERVER in tried(api, "ModelDeployment", old))
    api.patch("ModelDeployment", "old", {"spec": {"replicas": 3}}, "scale")
    api.patch("ModelDeployment", "old", {"spec": {"servedName": "x"}})
    api.patch("ModelDeployment", "old", {"status": {"phase": "Stable"}}, "status")
    said = api.need("ModelDeployment", "old")
    assert (said["spec"]["replicas"], said["status"]["phase"]) == (3, "Stable")
    api.patch("ModelDeployment", "old", {"spec": {"engine": {"image": "server:1"}}})
    with pytest.raises(ApiError, match=GPU_WITHOUT_SERVER):
        api.patch("ModelDeployment", "old", {"spec": {"engine": {"image": None}}})


@pytest.mark.parametrize("kind", [kind.name for kind in crdgen.KINDS if kind.batch])
def test_an_output_is_a_place_with_room_beside_it(api: Api, kind: str) -> None:
    for output in OUTPUTS:
        assert tried(api, kind, put(EXAMPLES[kind][0], "output", output)) == ""
    for output in NO_OUTPUTS:
        assert "spec.output" in tried(api, kind, put(EXAMPLES[kind][0], "output", output)), output


RECIPES = [
    (kind.name, field)
    for kind in crdgen.KINDS
    if kind.batch
    for field in SCHEMAS[kind.name]["properties"]["spec"]["properties"]
    if field not in MUTABLE
]
OTHER: dict[str, Any] = {
    "queueName": "other", "output": "oci://r/other:1", "taskType": "math", "method": "full", "merge": True,
    "lossOn": "assistant", "precision": "fp16", "blockSize": 128, "symmetric": True, "accuracyLevel": 1,
    "pod": {"image": "other:1"}, "lora": {"r": 9}, "training": {"seed": 8}, "teacher": {"deploymentRef": {"name": "o"}},
    "gate": {"dataset": {"uri": "oci://r/g:1"}}, "evaluation": {"dataset": {"uri": "oci://r/e:1"}},
    "data": {"prompts": {"uri": "oci://r/p:1"}}, "dataset": {"uri": "oci://r/d:9"},
    "student": {"uri": "oci://r/s:9"}, "base": {"uri": "oci://r/s:9"}, "source": {"uri": "oci://r/s:9"},
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind.name for kind in crdgen.KINDS if kind.batch])
def test_a_recipe_cannot_be_changed(api: Api, kind: str) -> None:
    full, less = EXAMPLES[kind]
    for name, spec in (("full", full), ("less", less)):
        api.create(kind, name, spec={**spec, "suspend": True})
    path, fields = api.path(kind, "full"), SCHEMAS[kind]["properties"]["spec"]["properties"]
    for _, field in [pair for pair in RECIPES if pair[0] == kind]:
        message = f"{field} cannot be changed: a new recipe is a new object"
        whole = api.need(kind, "full")
        for value in (OTHER[field], None):  # changed, taken away
            if value is None and (field not in whole["spec"] or "default" in fields[field]):
                continue  # what is taken away comes back as its default
            spec = put(whole["spec"], field, value)
            with pytest.raises(ApiError) as caught:
                api.ask("PUT", path, {**whole, "spec": spec}, dryRun="All")
            required = value is None and f"spec.{field}: Required value" in caught.value.message
            assert required or message in caught.value.message, (field, value)
        sparse = api.need(kind, "less")
        if field not in sparse["spec"]:  # added
            added = put(sparse, f"spec.{field}", full.get(field, OTHER[field]))
            with pytest.raises(ApiError) as caught:
                api.ask("PUT", api.path(kind, "less"), added, dryRun="All")
            assert message in caught.value.message, field


@pytest.mark.parametrize("kind", [kind.name for kind in crdgen.KINDS if kind.batch])
def test_how_it_is_run_can_be_changed(api: Api, kind: str) -> None:
    api.create(kind, "x", spec=EXAMPLES[kind][0])
    change: dict[str, Any] = {"suspend": False, "backoffLimit": 9, "activeDeadlineSeconds": None}
    assert set(change) | {"ttlSecondsAfterFinished"} == set(MUTABLE)
    after = api.patch(kind, "x", {"spec": {**change, "ttlSecondsAfterFinished": 5}})["spec"]
    assert (after["suspend"], after["backoffLimit"], after["ttlSecondsAfterFinished"]) == (False, 9, 5)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_defaults_are_those_of_the_models(api: Api, kind: str) -> None:
    spec = EXAMPLES[kind][1]
    stored = api.create(kind, "x", spec=spec, dry_run=True)
    model = next(entry.model for entry in crdgen.KINDS if entry.name == kind)
    assert stored["status"] == {"observedGeneration": -1}
    wanted = model.model_validate({"spec": spec}).wire()["spec"]
    for step in wanted.get("rollout", {}).get("steps", []):
        del step["approval"]  # an item of a list is left as it is
    assert stored["spec"] == wanted


NAMES = {
    "a": True,
    "a" * 63: True,
    "a" * 64: False,
    "1a": False,
    "a.b": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_deployments_are_names_of_services(api: Api, name: str) -> None:
    answer = tried(api, "ModelDeployment", EXAMPLES["ModelDeployment"][1], name)
    assert (answer == "") == NAMES[name]
    if answer:
        assert "at most 63 of a-z, 0-9 and -" in answer


@pytest.mark.parametrize("name", ["a" * 253, "1.b"])
def test_names_of_runs_are_free(api: Api, name: str) -> None:
    assert tried(api, "FineTuneJob", EXAMPLES["FineTuneJob"][1], name) == ""


COLUMNS = {
    "DistillationJob": ["Name", "Phase", "Progress", "Student", "Quality", "Age"],
    "FineTuneJob": ["Name", "Phase", "Progress", "Method", "Quality", "Age"],
    "QuantizedModel": ["Name", "Phase", "Precision", "Size", "Delta", "Age"],
    "ModelDeployment": ["Name", "Ready", "Stable", "Candidate", "Weight", "Phase", "Age"],
}
WIDE = {
    "DistillationJob": ["Teacher", "Artifact"],
    "FineTuneJob": ["Base", "Artifact"],
    "QuantizedModel": ["Source", "Artifact"],
    "ModelDeployment": ["Endpoint"],
}
STATUS: dict[str, Object] = {
    "DistillationJob": {
        "phase": "Running", "progress": {"percent": 40}, "source": "FineTuneJob/s", "quality": "0.9",
        "teacher": "big", "artifact": {"uri": "oci://a", "digest": "d"},
    },
    "FineTuneJob": {
        "phase": "Running", "progress": {"percent": 40}, "source": "FineTuneJob/s", "quality": "0.9",
        "artifact": {"uri": "oci://a", "digest": "d"},
    },
    "QuantizedModel": {
        "phase": "Succeeded", "size": "10 MB", "delta": "-1 %", "source": "FineTuneJob/s",
        "artifact": {"uri": "oci://a", "digest": "d"},
    },
    "ModelDeployment": {
        "ready": "1/2", "stable": {"revision": "r1", "model": "m"}, "candidate": {"revision": "r2", "model": "m"},
        "weight": 10, "phase": "Step", "endpoint": "http://x",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_table_has_its_columns_and_they_are_filled(api: Api, kind: str) -> None:
    api.create(kind, "x", spec=EXAMPLES[kind][0])
    api.patch(kind, "x", {"status": STATUS[kind]}, "status")
    table = api.ask("GET", api.path(kind), accept="application/json;as=Table;g=meta.k8s.io;v=v1")
    columns = table["columnDefinitions"]
    assert [c["name"] for c in columns if c["priority"] == 0] == COLUMNS[kind]
    assert [c["name"] for c in columns if c["priority"] == 1] == WIDE[kind]
    assert all(cell not in (None, "") for cell in table["rows"][0]["cells"]), table["rows"][0]["cells"]


def test_names_short_names_and_category(api: Api) -> None:
    found = api.ask("GET", "/apis/slmops.dev/v1alpha1")["resources"]
    kinds = {r["kind"]: (r["name"], r["shortNames"], r["categories"]) for r in found if "/" not in r["name"]}
    assert kinds == {
        "DistillationJob": ("distillationjobs", ["distill"], ["slm"]),
        "FineTuneJob": ("finetunejobs", ["ftj"], ["slm"]),
        "QuantizedModel": ("quantizedmodels", ["qmodel"], ["slm"]),
        "ModelDeployment": ("modeldeployments", ["slmd"], ["slm"]),
    }
    assert {r["name"] for r in found if r["name"].endswith("/scale")} == {"modeldeployments/scale"}


def test_scale(api: Api) -> None:
    api.create("ModelDeployment", "x", spec=EXAMPLES["ModelDeployment"][0])
    api.patch("ModelDeployment", "x", {"status": {"replicas": 1, "selector": "a=b"}}, "status")
    scale = api.patch("ModelDeployment", "x", {"spec": {"replicas": 5}}, "scale")
    assert (scale["status"], scale["spec"]) == ({"replicas": 1, "selector": "a=b"}, {"replicas": 5})
    assert api.need("ModelDeployment", "x")["spec"]["replicas"] == 5


def test_kubectl_explain_finds_a_text_for_every_field(api: Api) -> None:
    found = api.ask("GET", "/openapi/v3/apis/slmops.dev/v1alpha1")["components"]["schemas"]
    schema = found["dev.slmops.v1alpha1.FineTuneJob"]
    spec = schema["properties"]["spec"]
    assert schema["description"].startswith("FineTuneJob")
    assert spec["properties"]["training"]["properties"]["warmupRatio"]["description"].startswith("Share of the steps")


def test_status_is_apart_from_spec(api: Api) -> None:
    api.create("FineTuneJob", "x", spec=EXAMPLES["FineTuneJob"][0])
    after = api.patch("FineTuneJob", "x", {"status": {"phase": "Lie"}, "spec": {"backoffLimit": 8}})
    assert after["status"] == {"observedGeneration": -1}
    assert after["metadata"]["generation"] == 2
    after = api.patch("FineTuneJob", "x", {"status": {"phase": "True"}, "spec": {"backoffLimit": 1}}, "status")
    assert (after["status"]["phase"], after["spec"]["backoffLimit"]) == ("True", 8)
