"""The server process: starts the engine, listens, and ends without cutting anybody off."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import uvicorn

from slmops_server.app import Routes
from slmops_server.connection import Limits, limited
from slmops_server.model_folder import BadModelFolderError
from slmops_server.service import Service
from slmops_server.settings import Settings, parse

if TYPE_CHECKING:
    from slmops_server.traces import Traces

log = logging.getLogger(__name__)

BACKLOG = 2048
CONNECTIONS = 4096
COLLECTOR = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
LINGER = 0.5  # seconds between closing the door and closing idle connections: a request may be on its way on one


class _Listener(uvicorn.Server):
    """uvicorn without its own signal handling."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _open_files() -> int:
    """How many this process may have, as many as the machine lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _limits(service: Service) -> Limits:
    settings = service.settings
    connections = settings.max_connections or min(CONNECTIONS, _open_files() // 2)
    return Limits(
        connections, settings.receive_timeout, settings.send_timeout, settings.keep_alive, service.metrics.refused
    )


def _listener(app: Routes, settings: Settings, port: int, limits: Limits) -> _Listener:
    return _Listener(
        uvicorn.Config(
            app,
            host=settings.host,
            port=port,
            loop="none",
            http=limited(limits),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
        )
    )


def _traces() -> "Traces | None":
    from slmops_server.traces import Traces  # and the library, which is read only where a collector is named

    try:
        return Traces()
    except ValueError as error:
        log.warning("Failed to set up traces, so none are sent problem=%s", error)
        return None


async def serve(settings: Settings) -> int:
    """Until SIGTERM or SIGINT: 0 after a clean drain, 1 when the model cannot be served."""
    service = Service(settings)
    limits = _limits(service)
    apart = settings.metrics_port not in (0, settings.port)
    listeners = [_listener(Routes(service, api=True, metrics=not apart), settings, settings.port, limits)]
    if apart:
        quiet = replace(limits, refused=lambda _: None)  # whoever scrapes or scans is no client of the model
        listeners.append(_listener(Routes(service, api=False, metrics=True), settings, settings.metrics_port, quiet))
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)

    supervising = asyncio.create_task(service.supervisor.run())
    if any(map(os.environ.get, COLLECTOR)) and os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() != "none":
        service.traces = await asyncio.to_thread(_traces)  # beside the engine's start
    listening = [asyncio.create_task(_listen(listener)) for listener in listeners]
    stop = asyncio.create_task(told.wait())
    failed = asyncio.create_task(service.supervisor.failed.wait())
    log.info("Started model=%s port=%d", settings.served_names[0], settings.port)
    await asyncio.wait([stop, failed, supervising, *listening], return_when=asyncio.FIRST_COMPLETED)

    problem = ""
    if stop.done():
        await _drain(service, told)
    else:
        problem = service.supervisor.problem or "the port cannot be opened"
    for listener in listeners:
        for sockets in listener.servers if listener.started else ():
            sockets.close()
    if not problem:
        await asyncio.sleep(LINGER)
    for listener in listeners:
        listener.should_exit = True
    results = await asyncio.gather(*listening, return_exceptions=True)  # waits for what runs
    broken = next((result for result in results if isinstance(result, BaseException)), None)
    problem = problem or (repr(broken) if broken else "")
    await service.supervisor.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(supervising, 5)
    for task in (stop, failed):
        task.cancel()
    if service.traces:
        service.traces.close()
    if problem:
        log.error("Gave up problem=%s", problem)  # the last line: it is what Kubernetes tells of a container that ended
        return 1
    log.info("Ended")
    return 0


async def _listen(listener: _Listener) -> None:
    try:
        await listener.serve()
    except SystemExit:  # uvicorn's way to say that the port is taken; it has logged it
        raise RuntimeError("the port cannot be opened") from None


async def _drain(service: Service, told: asyncio.Event) -> None:
    """Not ready any more, but still serving: endpoints and routers need a moment to look elsewhere."""
    service.draining = True
    log.info("Draining active=%d", service.supervisor.active)
    told.clear()
    with contextlib.suppress(TimeoutError):  # a second signal cuts the grace short, never an answer
        await asyncio.wait_for(told.wait(), service.settings.drain_grace)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    settings = parse(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every bad request: a flood of lines
    try:
        import uvloop

        return uvloop.run(serve(settings))
    except BadModelFolderError as error:
        log.error("Cannot serve the model: %s", error)  # noqa: TRY400 - the message is for the user, no trace
        return 1
