"""The watches: kopf looks at our kinds and at their labelled children, and every event wakes the queue.

kopf is used for its watches alone. Without daemons, timers and change handlers it writes nothing: no finalizer, so
that no deletion and no uninstall ever waits for this operator, and no annotation.

Stock kopf ends when a watch yields an ERROR event and when API errors outlast its list of backoffs; what looks like the
network (a certificate that is not trusted any more, too) it tries on for ever with what it knew at its start. Here any
call that was in vain for long ends it, and it runs in a thread with an event loop of its own: whenever one of its root
tasks ends, all of them are cancelled and it is started again, with another login and whole lists, while the queue and
the passes go on. kopf's own way of ending is not used: in a shared loop it cancels whatever was started after it, and
after an error at start it has been seen to wait for ever.

Now and then it is started again where nothing failed: an API server whose etcd was restored takes a watch from a
version that is yet to come, and leaves out all that happens before it.
"""

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from time import monotonic
from typing import Any

import kopf

from slmops.api.keys import GROUP, LABEL_MANAGED_BY, LABEL_OWNER_UID, MANAGED_BY, VERSION
from slmops.cluster.kinds import OURS, PLACES
from slmops.cluster.kube import configuration, proxy_of
from slmops.handlers.known import Note, note_of

log = logging.getLogger(__name__)

CHILDREN = ("Job", "Pod", "Deployment", "Service")
SELECTOR = f"{LABEL_MANAGED_BY}={MANAGED_BY},{LABEL_OWNER_UID}"
RESTART_FIRST, RESTART_MOST = 1.0, 10.0
# Seconds for which a call is tried again before all begins anew. The last try has to end before kopf takes the call for
# an idle watch and begins it from the first try: after 70. So a watch whose first try is taken and never answered is
# tried on for ever; RELIST finds that out, for lists have a limit of their own.
PATIENCE = 45.0
RELIST = 3600.0  # seconds after which all is listed again though nothing failed
# Ours: kopf would ask for the user's name, and a container's numeric user has none. Without peers it says nothing.
IDENTITY: Any = "slmops"  # kopf keeps the type Identity, a NewType of str, in a private module
CANCEL_SECONDS = 3.0
LONG_ENOUGH = 60.0  # a run of this length ends the growth of the restart's delay


class InVainError(Exception):
    """A call was tried for as long as PATIENCE says."""


class Backoffs:
    """Delays between attempts at a call: 1, 2, 4, 8, then about 10 seconds. Raises InVainError where kopf would not."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failing: set[object] = set()

    @property
    def failing(self) -> bool:
        """Whether a call is being tried again."""
        return bool(self._failing)

    def __iter__(self) -> Iterator[float]:
        call, began, delay = object(), self._clock(), 1.0
        try:
            while self._clock() - began < PATIENCE:
                yield _spread(delay)
                self._failing.add(call)
                delay = min(delay * 2, 10.0)
        finally:  # also when the call succeeds: the iterator goes with it
            self._failing.discard(call)
        raise InVainError("the API server did not answer, or refused, for too long")


class Watches:
    """`tell` is called from the watches' thread with a note of every event; `served` says which kinds the API has."""

    def __init__(
        self,
        tell: Callable[[Note], None],
        served: Callable[[], set[str]],
        namespaces: list[str],
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._tell, self._served, self._namespaces, self._on_restart = tell, served, namespaces, on_restart
        self._stop, self._ready = threading.Event(), threading.Event()
        self._backoffs = Backoffs()
        self._thread = threading.Thread(target=self._supervise, name="watches", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the watches to end; does not wait."""
        self._stop.set()

    @property
    def ready(self) -> bool:
        """Whether the watches are up, as far as each of them knows."""
        return self._ready.is_set() and not self._backoffs.failing

    @property
    def alive(self) -> bool:
        """Whether somebody still looks after the watches."""
        return self._thread.is_alive()

    def _supervise(self) -> None:
        delay = RESTART_FIRST
        while not self._stop.is_set():
            began, whole = monotonic(), False
            try:
                if self._all_served():
                    whole = self._in_a_loop_of_its_own(self._watch())
                    log.info("Watches begin again with whole lists" if whole else "Watches ended")
            except Exception as error:  # noqa: BLE001  # whatever ends kopf must not end the operator
                log.warning("Watches ended", extra={"error": f"{type(error).__name__}: {error}"})
            if whole:
                continue
            self._ready.clear()
            if self._stop.is_set():
                return
            self._on_restart()
            delay = RESTART_FIRST if monotonic() - began > LONG_ENOUGH else min(delay * 2, RESTART_MOST)
            self._stop.wait(_spread(delay))

    def _all_served(self) -> bool:
        missing = sorted(set(OURS) - self._served())
        if missing:
            log.warning("CustomResourceDefinitions are missing: install them", extra={"kinds": missing})
        return not missing

    def _in_a_loop_of_its_own(self, main: Coroutine[Any, Any, bool]) -> bool:
        """Run `main`; whatever it leaves running is cancelled, and abandoned if it does not mind that."""
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(_abandoned)
        try:
            asyncio.set_event_loop(loop)
            return loop.run_until_complete(main)
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=CANCEL_SECONDS))
            asyncio.set_event_loop(None)
            loop.close()

    async def _watch(self) -> bool:
        """Watch until something fails, or ends; True where nothing did for as long as RELIST says."""
        scope: dict[str, Any] = {"namespaces": self._namespaces} if self._namespaces else {"clusterwide": True}
        self._backoffs = Backoffs()
        tasks = await kopf.spawn_tasks(
            registry=self._registry(),
            settings=operator_settings(self._backoffs),
            standalone=True,
            identity=IDENTITY,
            stop_flag=self._stop,
            ready_flag=self._ready,
            **scope,
        )
        ended, _ = await asyncio.wait(tasks, timeout=_spread(RELIST), return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
        return not ended

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(log_in)
        for kind in OURS:
            kopf.on.event(GROUP, VERSION, PLACES[kind].plural, registry=registry, id=kind)(self._on_event)
        for kind in CHILDREN:
            place = PLACES[kind]
            kopf.on.event(place.group, place.version, place.plural, registry=registry, id=kind)(self._on_event)
        return registry

    async def _on_event(self, event: Any, **_: Any) -> None:
        self._tell(note_of(event))


def operator_settings(backoffs: Backoffs) -> kopf.OperatorSettings:
    """Make kopf's settings as we need them."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # no list or watch of namespaces and CRDs: no rights for that
    settings.process.ultimate_exiting_timeout = None  # it would kill the whole process
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = backoffs
    settings.watching.chunk_size = 500
    settings.watching.server_timeout = 600
    settings.queueing.idle_timeout = 1.0
    for kind in CHILDREN:
        place = PLACES[kind]
        settings.watching.label_selectors[place.group, place.version, place.plural] = SELECTOR
    return settings


def _spread(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311  # spreads load, guards nothing


def _abandoned(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Tell of errors that nobody waited for any more."""
    log.debug("Watch left something behind", extra={"context": str(context.get("message"))})


def log_in(**_: Any) -> kopf.ConnectionInfo:
    """The way that passes take: a token of a program or of a file is one too, and kopf's own way knows neither.

    Asked again whenever the API server refuses the token. Raises ClusterError.
    """
    found = configuration()
    scheme, _blank, token = (found.get_api_key_with_prefix("BearerToken") or "").partition(" ")
    return kopf.ConnectionInfo(
        server=found.host,
        ca_path=found.ssl_ca_cert,
        insecure=not found.verify_ssl,
        scheme=scheme or None,
        token=token.strip() or None,
        certificate_path=found.cert_file,
        private_key_path=found.key_file,
        proxy_url=proxy_of(found),
    )
