"""Models -> crds/<plural>.slmops.dev.yaml: `python -m slmops.crdgen [--check] [--out crds]`.

`--check` writes nothing and fails, naming the files, where they differ from the models.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slmops.api.base import Model
from slmops.api.batch import MUTABLE
from slmops.api.deployment import ModelDeployment
from slmops.api.distillation import DistillationJob
from slmops.api.finetune import FineTuneJob
from slmops.api.keys import API_VERSION, CATEGORY, GROUP, VERSION
from slmops.api.quantized import QuantizedModel
from slmops.structural import structural, without_defaults

Object = dict[str, Any]

HEADER = f"# Generated from operator/slmops/api by `make crds`; apiVersion of the objects: {API_VERSION}\n"

# The Service of a ModelDeployment has its name, so that clients find it: it has to be a DNS label.
DEPLOYMENT_NAME = {
    "rule": "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 63",
    "message": "the name of a ModelDeployment is its Service's: at most 63 of a-z, 0-9 and -, starting with a letter",
}


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`; `wide` ones show with -o wide."""

    name: str
    path: str
    kind: str = "string"
    wide: bool = False
    description: str = ""

    def wire(self) -> Object:
        """As an additionalPrinterColumn."""
        column: Object = {"name": self.name, "type": self.kind, "jsonPath": self.path}
        if self.description:
            column["description"] = self.description
        if self.wide:
            column["priority"] = 1
        return column


PHASE = Column("Phase", ".status.phase")
PROGRESS = Column("Progress", ".status.progress.percent", "integer", description="Percent of the run.")
QUALITY = Column("Quality", ".status.quality", description="The first metric of the evaluation.")
AGE = Column("Age", ".metadata.creationTimestamp", "date")
ARTIFACT = Column("Artifact", ".status.artifact.uri", wide=True)


@dataclass(frozen=True)
class Kind:
    """One CustomResourceDefinition."""

    model: type[Model]
    plural: str
    short: str
    columns: tuple[Column, ...]
    batch: bool = True

    @property
    def name(self) -> str:
        """The kind."""
        return self.model.__name__


KINDS = (
    Kind(
        DistillationJob,
        "distillationjobs",
        "distill",
        (
            PHASE,
            PROGRESS,
            Column("Student", ".status.source"),
            QUALITY,
            AGE,
            Column("Teacher", ".status.teacher", wide=True),
            ARTIFACT,
        ),
    ),
    Kind(
        FineTuneJob,
        "finetunejobs",
        "ftj",
        (
            PHASE,
            PROGRESS,
            Column("Method", ".spec.method"),
            QUALITY,
            AGE,
            Column("Base", ".status.source", wide=True),
            ARTIFACT,
        ),
    ),
    Kind(
        QuantizedModel,
        "quantizedmodels",
        "qmodel",
        (
            PHASE,
            Column("Precision", ".spec.precision"),
            Column("Size", ".status.size"),
            Column("Delta", ".status.delta", description="Change of the gate's metric."),
            AGE,
            Column("Source", ".status.source", wide=True),
            ARTIFACT,
        ),
    ),
    Kind(
        ModelDeployment,
        "modeldeployments",
        "slmd",
        (
            Column("Ready", ".status.ready"),
            Column("Stable", ".status.stable.revision"),
            Column("Candidate", ".status.candidate.revision"),
            Column("Weight", ".status.weight", "integer", description="Percent of the requests to the candidate."),
            PHASE,
            AGE,
            Column("Endpoint", ".status.endpoint", wide=True),
        ),
        batch=False,
    ),
)


def immutable(spec: Object) -> list[Object]:
    """One transition rule for each field of a batch spec but the mutable ones."""
    found = []
    required = set(spec.get("required") or [])
    for name, field in spec["properties"].items():
        if name in MUTABLE:
            continue
        rule = f"self.{name} == oldSelf.{name}"
        if name not in required and "default" not in field:
            rule = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {rule})"
        found.append({"rule": rule, "message": f"{name} cannot be changed: a new recipe is a new object"})
    return found


def schema(kind: Kind) -> Object:
    """The structural schema of the whole object."""
    properties = structural(kind.model.model_json_schema(by_alias=True))["properties"]
    spec = {key: value for key, value in properties["spec"].items() if key != "default"}
    if kind.batch:
        spec["x-kubernetes-validations"] = [*spec.get("x-kubernetes-validations", []), *immutable(spec)]
    status = without_defaults(properties["status"])
    status["default"] = {"observedGeneration": -1}  # tools that wait see "in progress" from the first millisecond
    whole: Object = {
        "type": "object",
        "description": (sys.modules[kind.model.__module__].__doc__ or "").strip(),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }
    if not kind.batch:
        whole["x-kubernetes-validations"] = [DEPLOYMENT_NAME]
    return whole


def crd(kind: Kind) -> Object:
    """The CustomResourceDefinition."""
    subresources: Object = {"status": {}}
    if not kind.batch:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.name,
                "listKind": f"{kind.name}List",
                "plural": kind.plural,
                "singular": kind.name.lower(),
                "shortNames": [kind.short],
                "categories": [CATEGORY],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": [column.wire() for column in kind.columns],
                    "schema": {"openAPIV3Schema": schema(kind)},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  # the base class names it
        return True


def files() -> dict[str, str]:
    """File name -> YAML, for every kind."""
    return {
        f"{kind.plural}.{GROUP}.yaml": HEADER
        + yaml.dump(crd(kind), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
        for kind in KINDS
    }


def main(argv: list[str] | None = None) -> int:
    """Write or compare; 1 where they differ."""
    parser = argparse.ArgumentParser(prog="python -m slmops.crdgen", description="Generate the CRDs from the models.")
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--out", type=Path, default=Path("crds"), help="folder (default: crds)")
    args = parser.parse_args(argv)
    wanted = files()
    if args.check:
        stale = [name for name, text in wanted.items() if _read(args.out / name) != text]
        stale += [path.name for path in sorted(args.out.glob("*.yaml")) if path.name not in wanted]
        if stale:
            print(f"{args.out} differs from the models ({', '.join(stale)}): run `make crds`", file=sys.stderr)
        return 1 if stale else 0
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in wanted.items():
        (args.out / name).write_text(text, encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
