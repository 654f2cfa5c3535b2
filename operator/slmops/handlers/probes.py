"""HTTP: /healthz and /readyz on the probe port, /metrics on the metrics port."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

CONNECTIONS = 32  # at once at one port; the kubelet and a Prometheus hold one each
IDLE_SECONDS = 5.0

Pages = Callable[[web.BaseRequest], Awaitable[web.Response]]


class _Server(web.Server):
    """Where too many are connected, the oldest connection ends: who holds many can so keep nobody else away."""

    def __init__(self, pages: Pages) -> None:
        super().__init__(
            pages, access_log=None, keepalive_timeout=IDLE_SECONDS, max_headers=32, max_field_size=4096
        )  # all that is held together has to fit into the pod's memory
        self._open: dict[web.RequestHandler, asyncio.Transport] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """See web.Server."""
        super().connection_made(handler, transport)
        self._open[handler] = transport
        if len(self._open) > CONNECTIONS:
            self._open.pop(next(iter(self._open))).abort()

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """See web.Server."""
        super().connection_lost(handler, exc)
        self._open.pop(handler, None)


async def serve(pages: Pages, port: int) -> web.ServerRunner:
    """Serve `pages` on all addresses. Raises OSError where the port is taken."""
    runner = web.ServerRunner(_Server(pages))
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


def probes(healthy: Callable[[], str], ready: Callable[[], str]) -> Pages:
    """Make the probes: each callable says what is wrong, or nothing."""

    def answer(check: Callable[[], str]) -> Callable[[web.BaseRequest], web.Response]:
        def respond(_request: web.BaseRequest) -> web.Response:
            wrong = check()
            return web.Response(text=(wrong or "ok") + "\n", status=503 if wrong else 200)

        return respond

    return _pages({"/healthz": answer(healthy), "/readyz": answer(ready)})


def metrics(registry: CollectorRegistry) -> Pages:
    """Make the scrape endpoint."""

    def respond(request: web.BaseRequest) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    return _pages({"/metrics": respond})


def _pages(pages: dict[str, Callable[[web.BaseRequest], web.Response]]) -> Pages:
    async def handle(request: web.BaseRequest) -> web.Response:
        respond = pages.get(request.path)
        return respond(request) if respond else web.Response(status=404)

    return handle
