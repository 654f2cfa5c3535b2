"""The ASGI applications: the API with its probes, and the probes with /metrics, which may have a port of their own."""

import logging
import time
from collections.abc import Awaitable, Callable

import orjson
from prometheus_client import CONTENT_TYPE_LATEST

from slmops_server import asgi, cors
from slmops_server.adapter_verbs import AdapterVerbs
from slmops_server.errors import ApiError, bad_request, internal, too_many_connections
from slmops_server.generate import Generate
from slmops_server.metrics import CLIENT_LEFT
from slmops_server.schema import model_name
from slmops_server.service import Service

log = logging.getLogger(__name__)

Endpoint = Callable[[asgi.Scope, asgi.Receive, asgi.Send], Awaitable[None]]
# refusals that are no flaw of the request itself, or that a flood of would show in a metric
REJECTED = (401, 408, 413, 503, 504)


class Routes:
    """Probes, and what else the port is for. The API's keys do not guard /metrics: the API's port may go without."""

    def __init__(self, service: Service, api: bool, metrics: bool) -> None:
        self._service = service
        self._get: dict[str, Endpoint] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/startupz": self._startupz,
            "/health": self._readyz,
            "/healthz": self._livez,
        }
        if metrics:
            self._get["/metrics"] = self._metrics
        self._post: dict[str, Endpoint] = {}
        if api:
            self._get["/v1/models"] = self._models
            self._post["/v1/chat/completions"] = Generate(service, "chat")
            self._post["/v1/completions"] = Generate(service, "completions")
            self._post["/v1/embeddings"] = self._embeddings
            verbs = AdapterVerbs(service)
            self._post["/v1/load_lora_adapter"] = verbs.load
            self._post["/v1/unload_lora_adapter"] = verbs.unload

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """ASGI. Every flaw ends as OpenAI-shaped JSON; a traceback goes to the log only."""
        if scope["type"] != "http":  # no lifespan is declared, websockets are refused by the server
            return
        api = bool(self._post) and scope["path"].startswith("/v1/")
        crowded = bool(scope["state"].get("crowded"))
        started = 0
        extra = [(b"x-request-id", asgi.request_id(scope["headers"]))]
        origins = self._service.settings.allowed_origins if api else ()
        extra += cors.allowance(scope, origins)
        asked = bool(origins) and cors.is_question(scope)

        async def sending(message: asgi.Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = message["status"]
                message["headers"] = [*message["headers"], *extra]
                if self._service.draining or crowded:  # let clients and routers find another server
                    message["headers"].append((b"connection", b"close"))
                if api:
                    self._service.metrics.http(started)
            await send(message)

        try:
            if api:
                if crowded:  # probes are still answered
                    raise too_many_connections()
                if not asked:
                    self._service.keys.check(asgi.header(scope, b"authorization"))
            await (cors.answer if asked else self._find(scope))(scope, receive, sending)
        except ApiError as error:
            if api and error.status in REJECTED:
                self._service.metrics.rejected(error.reason or "other")
            if not started:
                await asgi.respond(sending, error.status, error.body(), headers=error.headers())
        except asgi.DisconnectedError:
            if api and not started:
                self._service.metrics.http(CLIENT_LEFT)
        except Exception:
            log.exception("Failed on a request path=%s", scope["path"])
            if started:
                raise
            failure = internal()
            await asgi.respond(sending, failure.status, failure.body())

    def _find(self, scope: asgi.Scope) -> Endpoint:
        path, method = scope["path"], scope["method"]
        get, post = self._get.get(path), self._post.get(path)
        if path.startswith("/v1/models/") and "/v1/models" in self._get:
            get = self._model
        if get is None and post is None:
            raise ApiError(404, f"Unknown request URL: {method} {path}", code="unknown_url")
        found = get if method in ("GET", "HEAD") else post if method == "POST" else None
        if found is None:
            raise ApiError(405, f"Not allowed to {method} on {path}", code="method_not_allowed")
        return found

    async def _livez(self, _scope: asgi.Scope, _receive: asgi.Receive, send: asgi.Send) -> None:
        """503 when only a restart of the container helps: an engine that does not end when killed, or given up."""
        phase = self._service.supervisor.phase
        await self._probe(send, phase not in ("stuck", "failed"), phase)

    async def _readyz(self, _scope: asgi.Scope, _receive: asgi.Receive, send: asgi.Send) -> None:
        """200 while the model is loaded, has answered, and new requests are welcome."""
        service = self._service
        await self._probe(send, service.ready, "draining" if service.draining else service.supervisor.phase)

    async def _startupz(self, _scope: asgi.Scope, _receive: asgi.Receive, send: asgi.Send) -> None:
        """200 from the first time that the model was ready."""
        await self._probe(send, self._service.supervisor.was_ready.is_set(), self._service.supervisor.phase)

    async def _probe(self, send: asgi.Send, good: bool, phase: str) -> None:
        supervisor = self._service.supervisor
        body = {
            "status": "ok" if good else "unavailable",
            "phase": phase,
            "problem": supervisor.problem or None,
            "engine": supervisor.info.get("name"),
            "elapsed_seconds": round(time.monotonic() - self._service.begin, 3),
            "restarts": supervisor.restarts,
        }
        await asgi.respond(send, 200 if good else 503, orjson.dumps(body))

    async def _metrics(self, _scope: asgi.Scope, _receive: asgi.Receive, send: asgi.Send) -> None:
        await asgi.respond(send, 200, self._service.metrics.render(), CONTENT_TYPE_LATEST.encode())

    async def _models(self, _scope: asgi.Scope, _receive: asgi.Receive, send: asgi.Send) -> None:
        names = [*self._service.settings.served_names, *self._service.supervisor.adapters]
        body = {"object": "list", "data": [self._card(name) for name in names]}
        await asgi.respond(send, 200, orjson.dumps(body))

    async def _model(self, scope: asgi.Scope, _receive: asgi.Receive, send: asgi.Send) -> None:
        name = scope["path"].removeprefix("/v1/models/")
        self._service.check_model(name)
        await asgi.respond(send, 200, orjson.dumps(self._card(name)))

    async def _embeddings(self, scope: asgi.Scope, receive: asgi.Receive, _send: asgi.Send) -> None:
        """A model that writes text makes no embeddings: said in words, after the same checks as elsewhere."""
        settings = self._service.settings
        body = await asgi.read_body(scope, receive, settings.max_body_bytes, settings.receive_timeout)
        name = model_name(body)
        self._service.check_model(name)
        raise bad_request(
            f"The model {name!r} writes text and makes no embeddings; use /v1/chat/completions or /v1/completions.",
            "model",
            "unsupported_model",
        )

    def _card(self, name: str) -> dict[str, object]:
        service = self._service
        base, adapter = service.settings.served_names[0], service.supervisor.adapters.get(name)
        return {
            "id": name,
            "object": "model",
            "created": adapter.created if adapter else service.created,
            "owned_by": "slmops",
            "root": str(adapter.folder) if adapter else base,
            "parent": base if adapter else None,
            "max_model_len": service.max_len,
        }
