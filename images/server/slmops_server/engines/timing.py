"""What the engines measure at start, and how they tell it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence


def seconds(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(call: Callable[[], object]) -> float:
    """Seconds of a call, the better of two."""
    return min(seconds(call), seconds(call))


def notes(decode_seconds: Sequence[float], prefill_seconds: Mapping[int, float]) -> dict[str, str]:
    """The times of a Forward as EngineInfo tells them."""
    told = {f"step_ms_{n}_rows": f"{s * 1e3:.3f}" for n, s in enumerate(decode_seconds, 1) if s < math.inf}
    told |= {f"prefill_ms_{n}_tokens": f"{s * 1e3:.3f}" for n, s in prefill_seconds.items()}
    told["lone_rows"] = "exact" if decode_seconds[0] < math.inf else "in company"
    return told
