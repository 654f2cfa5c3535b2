"""The library of operators for onnxruntime that images/server/kernels compiles, where it is and where the CPU can."""

import ctypes
import importlib.util


def library() -> str:
    """Its path, empty where it is not installed or this CPU has not what it needs."""
    found = importlib.util.find_spec("slmops_kernels")
    if found is None or not found.origin:
        return ""
    try:
        usable = ctypes.CDLL(found.origin).slmops_usable()
    except OSError:  # made for another machine
        return ""
    return found.origin if usable else ""
