"""HTTP: /healthz and /readyz on the probe port, /metrics on the metrics port."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder


async def serve(app: web.Application, port: int) -> web.AppRunner:
    """Serve `app` on all addresses. Raises OSError where the port is taken."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


def probes(healthy: Callable[[], str], ready: Callable[[], str]) -> web.Application:
    """Make the probes: each callable says what is wrong, or nothing."""

    def answer(check: Callable[[], str]) -> Callable[[web.Request], "web.Response"]:
        def respond(_request: web.Request) -> web.Response:
            wrong = check()
            return web.Response(text=(wrong or "ok") + "\n", status=503 if wrong else 200)

        return respond

    return _app({"/healthz": answer(healthy), "/readyz": answer(ready)})


def metrics(registry: CollectorRegistry) -> web.Application:
    """Make the scrape endpoint."""

    def respond(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    return _app({"/metrics": respond})


def _app(routes: dict[str, Callable[[web.Request], web.Response]]) -> web.Application:
    app = web.Application()
    for path, respond in routes.items():

        async def handle(
            request: web.Request, respond: Callable[[web.Request], web.Response] = respond
        ) -> web.Response:
            return respond(request)

        app.router.add_get(path, handle)
    return app
