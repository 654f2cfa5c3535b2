"""The operator: `python -m slmops.main`."""

import asyncio
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterable

from pydantic import ValidationError

from slmops import __version__
from slmops.cluster.kube import KubeCluster, configuration
from slmops.cluster.port import ClusterError, Key
from slmops.handlers import logs, probes
from slmops.handlers.known import Known
from slmops.handlers.metrics import Metrics
from slmops.handlers.schedule import Schedule
from slmops.handlers.watches import Watches
from slmops.handlers.work import Work
from slmops.reconcile.driver import Driver
from slmops.reconcile.table import reconcilers
from slmops.remote.router import pusher
from slmops.settings import Settings

log = logging.getLogger(__name__)

FINISH_SECONDS = 8.0  # for the passes in progress when the operator is asked to stop


def main() -> int:
    """Run until SIGTERM or SIGINT. 1 where it cannot start, with a sentence why."""
    logs.set_up()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        settings = Settings.from_env()
        asyncio.run(run(settings))
    except ValidationError as error:
        first = error.errors()[0]
        name = f"SLMOPS_{str(first['loc'][0]).upper()}" if first["loc"] else "SLMOPS_*"
        log.error("Could not read settings", extra={"variable": name, "error": first["msg"]})  # noqa: TRY400
        return 1
    except (ClusterError, OSError) as error:
        log.error("Could not start", extra={"error": str(error)})  # noqa: TRY400  # a sentence, no trace
        return 1
    return 0


async def run(settings: Settings) -> None:
    """Put the parts together and serve. Raises ClusterError, OSError where that is impossible."""
    metrics, known = Metrics(), Known()

    def wake(keys: Iterable[Key]) -> None:
        for key in keys:
            if key.kind in driver.reconcilers:
                work.poke(key)

    def gone(key: Key) -> None:
        metrics.on_gone(key)
        wake(known.gone(key))

    cluster = KubeCluster(configuration(), threads=settings.workers, on_call=metrics.on_call)
    driver = Driver(
        cluster, settings, reconcilers(), pusher(settings), metrics.on_end, metrics.on_counts, known.circular
    )
    work = Work(
        driver.run,
        Schedule[Key](lambda: random.uniform(-1, 1)),  # noqa: S311  # spreads load, guards nothing
        workers=settings.workers,
        on_pass=metrics.on_pass,
        on_gone=gone,
    )
    metrics.observe(work, known)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    namespaces = [name.strip() for name in settings.namespaces.split(",") if name.strip()]
    watches = Watches(
        lambda note: _soon(loop, lambda: wake(known.concerned(note))),
        cluster.served,
        namespaces,
        metrics.watch_restarts.inc,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    servers = [
        await probes.serve(probes.probes(lambda: _ill(work, watches), lambda: _unready(watches)), settings.probe_port),
        await probes.serve(probes.metrics(metrics.registry), settings.metrics_port),
    ]
    log.info("Started", extra={"version": __version__, "namespaces": namespaces or "all", "workers": settings.workers})
    watches.start()
    await work.serve(stop)
    log.info("Stopping")
    watches.stop()
    whole = await work.finish(FINISH_SECONDS)
    for server in servers:
        await server.cleanup()
    log.info("Stopped", extra={"passes_broken_off": not whole})
    sys.stdout.flush()
    os._exit(0)  # a thread may still wait for the API server; what it does is safe to break off anywhere


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)


def _ill(work: Work, watches: Watches) -> str:
    if not watches.alive:
        return "nobody looks after the watches"
    return "work waits, but passes do not end" if work.stalled() else ""


def _unready(watches: Watches) -> str:
    return "" if watches.ready else "the watches are not up"


if __name__ == "__main__":
    sys.exit(main())
