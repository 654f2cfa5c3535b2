"""Asking Prometheus for one number. Four answers, told apart: a value, no data, something unclear, no answer."""

import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from slmops.remote.access import FOLDER, AccessError, access
from slmops.remote.exchange import TooMuchError, ask

TIMEOUT_SECONDS = 5.0  # of the whole exchange
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


def query(
    url: str, promql: str, time: datetime, *, client: httpx.Client | None = None, folder: Path = FOLDER
) -> Answer:
    """Evaluate `promql` at `time` (aware). Never raises for what Prometheus does or does not answer.

    `folder` has the files that access.py reads. What is said of the answer goes into the status of users' objects: it
    names neither a user nor a password of the URL.
    """
    asked = {"query": promql, "time": str(time.timestamp())}
    shown = re.sub("^(https?://)?.*@", r"\1", url)
    try:
        given = access(folder)
        said = ask(
            client or given.client,
            "POST",
            f"{url.rstrip('/')}/api/v1/query",
            data=asked,
            seconds=TIMEOUT_SECONDS,
            connect=TIMEOUT_SECONDS,
            limit=BODY_MAX,
            auth=given.auth if given.token else None,
        )
        if said.status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            refused = f"Prometheus at {shown} answered with HTTP {said.status}"
            return Unreachable(f"{refused}: check key token of the Secret prometheus.existingSecret of the chart.")
        body = json.loads(said.body)
    except TooMuchError:
        return Inconclusive(f"The answer has more than {BODY_MAX} bytes: aggregate to one number, as sum() does.")
    except AccessError as error:
        return Unreachable(str(error))
    except httpx.InvalidURL:  # its words may be a part of a password
        return Unreachable("prometheus.url of the chart is no URL that can be asked; encode special characters in it.")
    except (httpx.HTTPError, ValueError) as error:
        return Unreachable(f"Prometheus at {shown} gave no usable answer: {_why(error)}")
    if not isinstance(body, dict) or said.status >= httpx.codes.INTERNAL_SERVER_ERROR:
        return Unreachable(f"Prometheus at {shown} answered with HTTP {said.status}.")
    if body.get("status") != "success":
        if said.status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
            return Inconclusive(f"Prometheus refuses the query: {str(body.get('error', ''))[:300]}")
        return Unreachable(f"Prometheus at {shown} answered with HTTP {said.status}.")
    data = body.get("data")
    return _number(data if isinstance(data, dict) else {})


def _why(error: Exception) -> str:
    said = str(error) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in said:
        said += ". Give its CA as key ca.crt of the Secret prometheus.existingSecret of the chart."
    return said


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
