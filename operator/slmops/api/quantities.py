"""Quantities as Kubernetes writes them: 500m, 1Gi, 2e3."""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

_QUANTITY = re.compile(r"^([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([KMGTPE]i|[numkMGTPE])?$")
_UNITS = {
    "": "1",
    "n": "1e-9",
    "u": "1e-6",
    "m": "1e-3",
    "k": "1e3",
    "M": "1e6",
    "G": "1e9",
    "T": "1e12",
    "P": "1e15",
    "E": "1e18",
}


def amount(value: Any) -> Decimal | str:
    """A quantity as a number; what is none stays text."""
    found = _QUANTITY.match(str(value))
    if found is None:
        return str(value)
    number, unit = found.groups()
    try:
        factor = Decimal(1024) ** ("KMGTPE".index(unit[0]) + 1) if len(unit or "") == 2 else Decimal(_UNITS[unit or ""])
        return Decimal(number) * factor
    except InvalidOperation:
        return str(value)
