"""A scriptable HTTP proxy between the operator and the API server: it counts writes and does what networks do."""

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from tests.kube.api import Access

from localkube.pki import Authority

WRITES = {"POST", "PUT", "PATCH", "DELETE"}
HOP = {"host", "connection", "transfer-encoding", "content-length", "content-encoding"}


class Proxy:
    """Plain HTTP in front, TLS with the admin's certificate behind. `start` to `close` it runs in a thread.

    With an `authority` it is TLS in front, too, by its certificate `proxy` at the time of listening.
    """

    def __init__(self, access: Access, authority: Authority | None = None) -> None:
        self.access, self.authority = access, authority
        self.port = 0
        self.answer: int | None = None  # this status for everything, instead of asking the server
        self.silent = False  # no answer to anything; what is being answered, as watches are, goes on
        self.writes: list[str] = []  # "PATCH /path" of every write that the server has accepted
        self.requests: list[str] = []
        self.denied: list[str] = []  # requests that the server answered with 403
        self.user = ""  # who asks, instead of the admin
        self.after_write: Callable[[int], bool] = lambda number: False  # True: lose the answer
        self._errors: set[asyncio.Queue[bytes]] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._site: web.TCPSite | None = None

    @property
    def url(self) -> str:
        return f"http{'s' * (self.authority is not None)}://127.0.0.1:{self.port}"

    def start(self) -> "Proxy":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def refuse(self) -> None:
        """Nobody listens any more, and open connections break."""
        self._call(self._close_site())

    def listen(self) -> None:
        """Somebody listens again, on the same port."""
        self._call(self._open_site())

    def error_in_watches(self, code: int = 500) -> int:
        """Send an ERROR event into every open watch and end it; returns how many there were."""
        status = {"kind": "Status", "apiVersion": "v1", "code": code, "message": "injected", "status": "Failure"}
        line = json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"
        streams = list(self._errors)
        for queue in streams:
            self._loop.call_soon_threadsafe(queue.put_nowait, line)
        return len(streams)

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._set_up())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        await self._session.close()
        await self._runner.cleanup()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _set_up(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self.access.ssl(), limit=0)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._open_site()

    async def _open_site(self) -> None:
        tls = None
        if self.authority is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self.authority.cert("proxy"), self.authority.key("proxy"))
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=tls)
        await self._site.start()
        assert self._site._server is not None
        self.port = self._site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def _close_site(self) -> None:
        assert self._site is not None
        await self._site.stop()
        server = self._runner.server
        assert server is not None
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path_qs}")
        if self.silent:
            await asyncio.Event().wait()  # until the other side has gone
        if self.answer is not None:
            return web.json_response({"kind": "Status", "code": self.answer, "message": "scripted"}, status=self.answer)
        headers = CIMultiDict({name: value for name, value in request.headers.items() if name.lower() not in HOP})
        headers["Accept-Encoding"] = "identity"  # the API server compresses long lists, and its word for it is dropped
        if self.user:
            headers["Impersonate-User"] = self.user
            headers.add("Impersonate-Group", "system:authenticated")
            headers.add("Impersonate-Group", "system:serviceaccounts")
        body = await request.read()
        url = self.access.server + request.path_qs
        async with self._session.request(
            request.method, url, data=body or None, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
        ) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
            if "watch=true" in request.query_string and answer.status == 200:
                return await self._stream(request, answer, kept)
            data = await answer.read()
            if answer.status == 403:
                self.denied.append(f"{request.method} {request.path_qs}")
            if request.method in WRITES and answer.status < 300:
                self.writes.append(f"{request.method} {request.path}")
                if self.after_write(len(self.writes)):
                    assert request.transport is not None
                    request.transport.abort()
            return web.Response(status=answer.status, body=data, headers=kept)

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, headers: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        injected: asyncio.Queue[bytes] = asyncio.Queue()
        self._errors.add(injected)
        error = asyncio.create_task(injected.get())
        line: asyncio.Task[bytes] = error
        try:
            while True:
                line = asyncio.create_task(answer.content.readline())
                done, _ = await asyncio.wait((line, error), return_when=asyncio.FIRST_COMPLETED)
                if error in done:
                    await response.write(error.result())
                    return response
                if not line.result():
                    return response
                await response.write(line.result())
        except (ConnectionError, aiohttp.ClientError):
            return response
        finally:
            error.cancel()
            line.cancel()
            self._errors.discard(injected)
