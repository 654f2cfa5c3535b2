"""What earlier runs left on the local node: interrupted or failed, they would go on beside the next one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kit.alone import alone
from kit.imagetests import NAMESPACE as IMAGE_TESTS
from kit.kubectl import Kubectl

DEMO = "slmops-demo"
PREFIXES = ("e2e-", "bench-")  # of the scenarios and of `make bench`


def left(names: Iterable[str], own: str = "") -> list[str]:
    """Of these namespaces those that a run makes for itself, without one's own."""
    return [name for name in names if name != own and (name == DEMO or name.startswith(PREFIXES))]


def remove(kube: Kubectl, own: str = "") -> list[str]:
    """End it without waiting; returns the namespaces. Raises KubectlError.

    own: the namespace that the caller makes anew itself.
    """
    found = left((item["metadata"]["name"] for item in kube.list("namespaces")), own)
    if found:
        kube.run("delete", "namespace", *found, "--ignore-not-found", "--wait=false")
    # That namespace stays: nothing could be made in it before it is gone.
    kube.within(IMAGE_TESTS).run("delete", "pods", "--all", "--wait=false")
    return found


@contextmanager
def beside_nothing() -> Iterator[int]:
    """Tests on the local node, while the block runs: nothing of earlier runs beside them, and no demo begins.

    Gives the file of the lock.

    Raises BusyError while one runs, KubectlError, OSError.
    """
    with alone("make test") as lock:
        found = remove(Kubectl())
        if found:
            print(f"removed, of earlier runs: namespaces {', '.join(found)}", flush=True)
        yield lock
