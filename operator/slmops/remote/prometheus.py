"""Asking Prometheus for one number. Four answers, told apart: a value, no data, something unclear, no answer."""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from slmops.remote.client import shared

TIMEOUT_SECONDS = 5.0
BODY_MAX = 1_000_000  # bytes


@dataclass(frozen=True)
class Value:
    """One finite number."""

    value: float


@dataclass(frozen=True)
class NoData:
    """The query is fine, but there is nothing to say: no series, or not a number."""

    message: str


@dataclass(frozen=True)
class Inconclusive:
    """An answer that is not one number: several series, or a query that Prometheus refuses."""

    message: str


@dataclass(frozen=True)
class Unreachable:
    """No usable answer; asking again may help."""

    message: str


Answer = Value | NoData | Inconclusive | Unreachable


def query(url: str, promql: str, time: datetime, *, client: httpx.Client | None = None) -> Answer:
    """Evaluate `promql` at `time` (aware). Never raises for what Prometheus does or does not answer."""
    asked = {"query": promql, "time": str(time.timestamp())}
    try:
        where = f"{url.rstrip('/')}/api/v1/query"
        answer = (client or shared()).post(where, data=asked, timeout=TIMEOUT_SECONDS)
        if len(answer.content) > BODY_MAX:
            return Inconclusive(f"The answer has {len(answer.content)} bytes: aggregate to one number, as sum() does.")
        body = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return Unreachable(f"Prometheus at {url} gave no usable answer: {error or type(error).__name__}")
    if not isinstance(body, dict) or answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        return Unreachable(f"Prometheus at {url} answered with HTTP {answer.status_code}.")
    if body.get("status") != "success":
        if answer.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
            return Inconclusive(f"Prometheus refuses the query: {str(body.get('error', ''))[:300]}")
        return Unreachable(f"Prometheus at {url} answered with HTTP {answer.status_code}.")
    data = body.get("data")
    return _number(data if isinstance(data, dict) else {})


def _number(data: dict[str, Any]) -> Answer:
    kind, result = data.get("resultType"), data.get("result")
    if kind == "vector" and isinstance(result, list):
        if not result:
            return NoData("The query found no series.")
        if len(result) > 1:
            return Inconclusive(f"The query gives {len(result)} series: aggregate to one, for example with sum().")
        sample = result[0].get("value") if isinstance(result[0], dict) else None
    elif kind == "scalar":
        sample = result
    else:
        return Inconclusive(f"The query gives a {kind}, not one number.")
    if not isinstance(sample, list) or len(sample) != 2:
        return Inconclusive("The query gives a histogram, not a number.")
    try:
        value = float(sample[1])
    except (TypeError, ValueError):
        return Inconclusive("The value is not a number.")
    return Value(value) if math.isfinite(value) else NoData(f"The value is {sample[1]}: nothing was measured.")
