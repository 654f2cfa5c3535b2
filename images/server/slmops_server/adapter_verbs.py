"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: vLLM's two verbs, for folders below one root only."""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any
from weakref import WeakValueDictionary

from slmops_server import asgi
from slmops_server.engines.adapters import SUFFIX
from slmops_server.errors import MAX_RETRY_AFTER, ApiError, bad_request, unavailable
from slmops_server.fields import flag
from slmops_server.model_folder import BadModelFolderError
from slmops_server.schema import fields_of
from slmops_server.service import Service
from slmops_server.settings import adapter_flaw

log = logging.getLogger(__name__)

READ = 300.0  # seconds that reading an adapter may take, or its volume may hang
TEXT = b"text/plain; charset=utf-8"
LOAD = frozenset({"lora_name", "lora_path", "load_inplace"})
UNLOAD = frozenset({"lora_name", "lora_int_id"})  # the latter is vLLM's own number, which nothing here has


class AdapterVerbs:
    """The two endpoints. BadModelFolderError when the root is no folder."""

    def __init__(self, service: Service) -> None:
        self._service, self._root = service, service.settings.adapter_root
        # one at a time for a name: what is checked has to hold until it is done
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # not asyncio's, which long prompts need: a volume that hangs holds its thread for good
        self._looking = ThreadPoolExecutor(1, "adapter-folder")
        if self._root is not None and not self._root.is_dir():
            raise BadModelFolderError(f"--adapter-root {self._root} is not a folder")

    async def load(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """ApiError 400, 404 without such a folder or without a root, 503 without an engine or in time."""
        fields, root = await self._fields(scope, receive, LOAD)
        name, given = (fields.get(field) for field in ("lora_name", "lora_path"))
        if not name or not given or not isinstance(name, str) or not isinstance(given, str):
            raise bad_request("Both 'lora_name' and 'lora_path' must be provided, as strings.")
        if flaw := adapter_flaw(name):
            raise bad_request(f"lora_name {flaw}.", "lora_name")
        in_place = flag(fields, "load_inplace")
        try:
            async with asyncio.timeout(READ), self._turn(name):
                folder = await self._load(name, given, root, in_place)
        except TimeoutError:
            raise unavailable(
                f"The adapter was not read within {READ:g} seconds: look whether its volume answers. "
                "If it is read later, /v1/models lists it.",
                "adapter_timeout",
                MAX_RETRY_AFTER,
            ) from None
        log.info("Loaded an adapter name=%r folder=%s", name, folder)
        await asgi.respond(send, 200, f"Success: LoRA adapter '{name}' added successfully.".encode(), TEXT)

    async def unload(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """ApiError 400, 404 without such an adapter or without a root, 503 without an engine."""
        fields, _ = await self._fields(scope, receive, UNLOAD)
        name = fields.get("lora_name")
        if not name or not isinstance(name, str):
            raise bad_request("'lora_name' needs to be provided, as a string.", "lora_name")
        async with self._turn(name):
            if name not in self._service.supervisor.adapters:
                raise ApiError(
                    404, f"The lora adapter '{name}' cannot be found.", param="lora_name", code="model_not_found"
                )
            self._service.supervisor.unload_adapter(name)
        log.info("Unloaded an adapter name=%r", name)
        await asgi.respond(send, 200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), TEXT)

    def _turn(self, name: str) -> asyncio.Lock:
        return self._turns.setdefault(name, asyncio.Lock())

    async def _load(self, name: str, given: str, root: Path, in_place: bool) -> Path:
        if name in self._service.settings.served_names:
            raise bad_request(f"The name {name!r} is the base model's; an adapter needs another.", "lora_name")
        if name in self._service.supervisor.adapters and not in_place:
            raise bad_request(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                "set 'load_inplace' to true.",
                "lora_name",
            )
        folder = await asyncio.get_running_loop().run_in_executor(self._looking, below, root, given)
        await self._service.supervisor.load_adapter(name, folder)
        return folder

    async def _fields(
        self, scope: asgi.Scope, receive: asgi.Receive, known: frozenset[str]
    ) -> tuple[Mapping[str, Any], Path]:
        """The body's fields, and the root."""
        if self._root is None:
            raise ApiError(
                404,
                "This server's adapters are fixed: it takes others at run time when it is started with "
                "--adapter-root DIR.",
                code="unknown_url",
            )
        settings = self._service.settings
        fields = fields_of(await asgi.read_body(scope, receive, settings.max_body_bytes, settings.receive_timeout))
        odd = next((name for name in fields if name not in known), None)
        if odd is not None:
            raise bad_request(f"{odd} is not a field of this request.", odd, "unknown_parameter")
        return fields, self._root


def below(root: Path, given: str) -> Path:
    """The adapter's folder, with nothing in it that leads out of the root. ApiError 400, 404 where there is none."""
    outside = bad_request("lora_path leads out of the folder of --adapter-root.", "lora_path", "invalid_adapter")
    if ".." in PurePath(given).parts:
        raise outside
    try:
        top, folder = root.resolve(), (root / given).resolve()
        if not folder.is_relative_to(top):  # by a link, or by an absolute path
            raise outside
        files = [path.resolve() for path in folder.iterdir() if path.name.endswith(SUFFIX)]
        for path in (folder, *files):
            str(path).encode()
    except (OSError, RuntimeError, ValueError):  # no such folder, links in a circle, a name that cannot be or be told
        raise ApiError(404, f"No adapter found for {given!r}.", param="lora_path", code="adapter_not_found") from None
    if not all(path.is_relative_to(top) for path in files):
        raise outside
    return folder
