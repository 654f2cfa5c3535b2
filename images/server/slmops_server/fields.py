"""Reading one field of a request: the value in its type, or a 400 that names the field."""

from collections.abc import Mapping
from typing import Any

from slmops_server.errors import bad_request


def flag(fields: Mapping[str, Any], name: str, default: bool = False, shown: str = "") -> bool:
    """A boolean."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise bad_request(f"{shown or name} is not a boolean.", shown or name)
    return value


def number(fields: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number from low to high."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_request(f"{name} is not a number.", name)
    if not low <= value <= high:
        raise bad_request(f"{name} is {value}, it must be from {low:g} to {high:g}.", name)
    return float(value)


def integer(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """An integer from low to high."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_request(f"{name} is not an integer.", name)
    if not low <= value <= high:
        raise bad_request(f"{name} is {value}, it must be from {low} to {high}.", name)
    return value


def is_ids(value: Any) -> bool:
    """Whether it is a list of integers with at least one."""
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
