"""The operator's settings: SLMOPS_* variables, read once at start."""

import json
import os
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from slmops.api.base import Model
from slmops.api.meta import Pod, Resources
from slmops.api.quantities import amount

ROUTER_POD = Pod(resources=Resources(requests={"cpu": "50m", "memory": "64Mi"}, limits={"memory": "512Mi"}))

# What can have a repository or a folder for each object below it: anything else would end every run, one by one.
_HOST = r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?"
_PREFIX = r"(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*"
_FOLDER = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/+[^\s@/]+)*"
STORE = rf"^$|^oci://{_HOST}{_PREFIX}/*$|^pvc://{_FOLDER}/*$"


def _router_pod(value: Any) -> Any:
    """What is not said is as by default: a release whose values are older than the variable says nothing."""
    found = json.loads(value) if isinstance(value, str) else value
    return {**ROUTER_POD.wire(), **found} if isinstance(found, dict) else found


def _amounts(given: Mapping[str, str] | None) -> dict[str, Decimal]:
    found = {}
    for name, value in (given or {}).items():
        number = amount(value)
        if not isinstance(number, Decimal):
            raise ValueError(f"{value!r} is no quantity of {name}")  # noqa: TRY004  # pydantic knows this one
        found[name] = number
    return found


def _startable(pod: Pod) -> Pod:
    """Resources that no pod can have would stall every ModelDeployment. Raises ValueError."""
    if pod.resources:
        limits = _amounts(pod.resources.limits)
        for name, number in _amounts(pod.resources.requests).items():
            if number > limits.get(name, number):
                raise ValueError(f"the requested {name} is more than its limit")
    return pod


class Settings(Model):
    """Frozen; field `trainer_image` is variable SLMOPS_TRAINER_IMAGE, and so on. Empty variables count as unset."""

    trainer_image: str = "docker.io/slmops/trainer:0.1.0"
    server_image: str = "docker.io/slmops/server:0.1.0"
    router_image: str = "docker.io/slmops/router:0.1.0"
    image_pull_policy: str = "IfNotPresent"
    store: str = Field(
        default="", pattern=STORE
    )  # default output, for example oci://slmops-registry.slmops-system.svc:5000
    plain_http: str = ""  # comma-separated host:port of registries spoken to without TLS
    registry_secret: str = ""  # dockerconfigjson Secret in each object's namespace for the default store
    hf_endpoint: str = ""  # a mirror of the Hugging Face Hub
    prometheus_url: str = ""
    router_key: str = ""  # from it the routers' agents' tokens are derived
    # JSON: resources, node selector, priority
    router_pod: Annotated[Pod, BeforeValidator(_router_pod), AfterValidator(_startable)] = ROUTER_POD
    namespaces: str = ""  # comma-separated; empty: all
    metrics_port: int = Field(default=9090, ge=1, le=65535)
    probe_port: int = Field(default=8080, ge=1, le=65535)
    workers: int = Field(default=8, ge=1, le=64)  # passes at once

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Raises pydantic.ValidationError naming the variable's field."""
        found = {name: env[f"SLMOPS_{name.upper()}"] for name in cls.model_fields if env.get(f"SLMOPS_{name.upper()}")}
        return cls.model_validate(found)
