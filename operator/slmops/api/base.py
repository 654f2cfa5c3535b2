"""The base of every model: frozen, camelCase on the wire, unknown fields dropped (the API server has pruned them)."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """Base of all API types. `extra="ignore"`: an older operator must be able to read a newer CRD's objects."""

    model_config = ConfigDict(
        frozen=True, populate_by_name=True, alias_generator=to_camel, extra="ignore", use_enum_values=True
    )

    def wire(self) -> dict[str, Any]:
        """The object as Kubernetes stores it: camelCase, JSON types, unset optionals left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules for `json_schema_extra`: each pair is (expression, message to the user).

    A rule that asks for `oldSelf` gets an optional, which is empty for an object that is new.
    """
    found: list[dict[str, Any]] = [{"rule": rule, "message": message} for rule, message in pairs]
    return {"x-kubernetes-validations": [
        one | {"optionalOldSelf": True} if "oldSelf" in one["rule"] else one for one in found
    ]}  # fmt: skip
