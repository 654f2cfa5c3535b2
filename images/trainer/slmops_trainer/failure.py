"""Named failures: every way a run can end badly has a reason that machines match and a sentence for people."""

import errno
from typing import cast, get_args

from slmops.api.run import EXIT_FATAL, EXIT_INTERRUPTED, EXIT_RETRY, FailureReason
from slmops_artifacts.errors import ArtifactError

# Artifact reasons that are called differently in the run contract.
_FROM_ARTIFACT: dict[str, FailureReason] = {
    "DigestMismatch": "SourceUnavailable",
    "UnsupportedFormat": "UnsupportedModel",
    "Refused": "StoreUnavailable",
    "NoRepository": "StoreUnavailable",
    "BadUri": "BadSpec",
}


class RunFailure(Exception):  # noqa: N818  # a failed run, as the contract names it
    """The run ended badly. `message` says what failed, where, and how to mend it.

    `retryable`: another pod may succeed at once although nobody changed anything (another node has more room).
    A registry or a teacher that is away is not: this pod has waited for it already. The operator makes the next one
    later, and later each time.
    """

    def __init__(self, reason: FailureReason, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.reason: FailureReason = reason
        self.message = message
        self.retryable = retryable

    @property
    def exit_code(self) -> int:
        """The process exit status that tells the Job's podFailurePolicy what to do."""
        if self.reason == "Interrupted":
            return EXIT_INTERRUPTED
        return EXIT_RETRY if self.retryable else EXIT_FATAL


def interrupted(message: str) -> RunFailure:
    """SIGTERM arrived and what was done is saved."""
    return RunFailure("Interrupted", message, retryable=True)


def from_artifact(error: ArtifactError, *, writing: bool = False) -> RunFailure:
    """Translate a failed transfer; `writing` tells an unreachable store from an unreachable source."""
    reason: FailureReason = _FROM_ARTIFACT.get(error.reason, "InternalError")
    if error.reason in get_args(FailureReason):
        reason = cast("FailureReason", error.reason)
    if writing and reason == "SourceUnavailable":
        reason = "StoreUnavailable"
    return RunFailure(reason, error.message, retryable=error.reason == "DiskFull")


def translate(error: BaseException) -> RunFailure:
    """Name any exception. What is not known is InternalError: a bug, worth another try and a look at the log."""
    if isinstance(error, RunFailure):
        return error
    if isinstance(error, ArtifactError):
        return from_artifact(error)
    # torch is not imported here: its name is enough, and a run that never loaded it cannot raise it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _says_no_memory(error):
        return RunFailure(
            "OutOfMemory",
            f"Memory ran out: {_first_line(error)}. In a new object raise spec.pod.resources.limits, or lower "
            "training.batchSize (raise gradientAccumulation by as much), training.maxLength or evaluation.batchSize, "
            "or set training.gradientCheckpointing.",
        )
    if _says_no_space(error):
        where = error.filename if isinstance(error, OSError) and error.filename else "a file"
        return RunFailure(
            "DiskFull",
            f"No space left writing {where}. Give the pod more ephemeral storage, or its node more room.",
            retryable=True,
        )
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return RunFailure("OutOfMemory", "Memory ran out. In a new object raise spec.pod.resources.limits.memory.")
    return RunFailure(
        "InternalError", f"{type(error).__name__}: {_first_line(error)}. The pod's log has the trace.", retryable=True
    )


def _says_no_space(error: BaseException) -> bool:
    """Python raises an OSError; safetensors, torch and tokenizers (Rust and C++) classes of their own with its text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return any(sign in text for sign in ("No space left on device", "os error 28", "Disk quota exceeded"))


def _says_no_memory(error: BaseException) -> bool:
    """Torch's CPU allocator and CUDA's libraries raise a bare RuntimeError, or one of the driver's."""
    signs = ("can't allocate memory", "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
