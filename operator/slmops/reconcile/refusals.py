"""What errors of a pass mean to people: the outcome that a status tells (see driver)."""

from pydantic import ValidationError

from slmops.cluster.port import ClusterError
from slmops.reconcile.pods import over_quota
from slmops.reconcile.state import Retry, Terminal
from slmops.remote.errors import RemoteError


def outcome(error: Exception) -> Retry | Terminal | None:
    """What becomes of a pass that met this error; None where the error itself goes up."""
    match error:
        case Retry() | Terminal():
            return error
        case ClusterError(denied=True):
            return _denied(error, "A write")
        case ClusterError(status=403):
            return Retry("Forbidden", f"The operator may not do this: {error.message}", after=15.0)
        case RemoteError():
            return Retry("Unreachable", str(error), after=5.0)
        case ValidationError():
            return Terminal("InvalidSpec", _sentence(error))
    return None


def explain(error: ClusterError, what: str) -> None:
    """The outcome that an answer to applying a child means. Raises Retry, Terminal or the error itself."""
    if error.status == 403 and "being terminated" in error.message:
        raise Retry("NamespaceTerminating", "The namespace is being deleted.", after=60.0) from error
    if error.status == 403 and over_quota(error.message):
        raise Retry("QuotaExceeded", f"{what} was refused: {error.message}", after=5.0) from error
    if error.denied:
        raise _denied(error, what) from error
    if error.status == 403:
        raise Retry("Forbidden", f"{what} was refused: {error.message}", after=5.0) from error
    if error.status == 413 or "request is too large" in error.message:
        raise Terminal(
            "TooLarge", f"{what} is too large for the API server; shorten the spec: {error.message}"
        ) from error
    if not error.retryable:
        raise Terminal("Rejected", f"{what} was refused as invalid: {error.message}") from error
    if error.status == 500:  # it is well, as the reads before this write show, but something behind it is not
        reason = "WebhookFailed" if "webhook" in error.message else "ApiServerError"
        remedy = "It is tried again; if it stays so, it is for those who run the cluster to mend."
        raise Retry(reason, f"{what} could not be written: {error.message}. {remedy}", after=15.0) from error
    raise error


def _denied(error: ClusterError, what: str) -> Retry:
    remedy = "It is tried again: give it what the policy asks for, or have an exception made."
    return Retry("PolicyDenied", f"{what} was refused by a policy: {error.message} {remedy}", after=15.0)


def _sentence(error: ValidationError) -> str:
    """The first thing wrong with an object, as `spec.training.epochs: Input should be ...`."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
