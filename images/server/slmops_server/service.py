"""What the front knows: the model's text side, the engine behind it, and whether it takes requests."""

import asyncio
import math
import time
from functools import partial

from jinja2 import TemplateError
from tokenizers import Tokenizer

from slmops_server import model_folder
from slmops_server.detok import DetokenizerFactory
from slmops_server.engines.choose import EngineOptions
from slmops_server.errors import bad_request, unavailable
from slmops_server.keys import ApiKeys
from slmops_server.metrics import Metrics
from slmops_server.model_folder import BadModelFolderError
from slmops_server.schema import Request, unknown_model
from slmops_server.settings import Settings
from slmops_server.supervisor import Supervisor
from slmops_server.template import ChatTemplate

LONG_TEXT = 20_000  # characters from which tokenizing leaves the event loop
MAX_RETRY_AFTER = 60  # seconds


class Service:
    """One model, served. BadModelFolderError when the folder cannot be."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = model_folder.read(settings.model)
        try:
            self.tokenizer = Tokenizer.from_file(str(settings.model / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the library raises nothing finer
            raise BadModelFolderError(f"{settings.model / 'tokenizer.json'} cannot be read: {error}") from None
        self.pieces = DetokenizerFactory(self.tokenizer)
        self.template = None
        if self.folder.chat_template is not None:
            try:
                self.template = ChatTemplate(self.folder.chat_template, self.folder.special_tokens)
            except TemplateError as error:
                raise BadModelFolderError(
                    f"the chat template of {settings.model} is not valid Jinja: {error}"
                ) from None
        self.max_len = min(settings.max_model_len or self.folder.context_length, self.folder.context_length)
        self.keys = ApiKeys(settings.api_keys_dir)
        options = EngineOptions(
            settings.engine, settings.threads, settings.slots, settings.max_model_len, settings.prefill_chunk
        )
        self.supervisor = Supervisor(settings.model, options, settings.log_level, settings.step_timeout)
        self.metrics = Metrics(settings.served_names[0], self.supervisor, self.max_len)
        self.supervisor.on_restart = self.metrics.restarted
        self.draining = False
        self.begin = time.monotonic()
        self.created = int(time.time())
        self._seconds = 1.0  # moving average of one answer

    @property
    def ready(self) -> bool:
        """Whether a request sent now will be answered, and more should be sent here."""
        return self.supervisor.ready and not self.draining and not self.supervisor.stuck

    def took(self, seconds: float) -> None:
        """Note how long an answer took, for Retry-After."""
        self._seconds += 0.1 * (seconds - self._seconds)

    def admit(self, count: int = 1) -> None:
        """ApiError 503 when the engine is not there or `count` more answers do not fit into the queue.

        Cheap: asked before any work is done.
        """
        if not self.supervisor.ready:
            raise unavailable(f"The model is not ready ({self.supervisor.phase}).", "not_ready")
        room = self.supervisor.slots + self.settings.max_queue
        if count > room:
            raise bad_request(f"The request asks for {count} answers; this server takes {room} at a time.", "n")
        if self.supervisor.active + count > room:
            waiting = max(0, self.supervisor.active - self.supervisor.slots)
            after = math.ceil(self._seconds * (waiting + count) / self.supervisor.slots)
            raise unavailable(f"{waiting} requests are waiting.", "overloaded", max(1, min(after, MAX_RETRY_AFTER)))

    async def prompts(self, request: Request) -> list[list[int]]:
        """Token ids of the request's prompts. ApiError 400 or 404 when they cannot be served."""
        self.check_model(request.model)
        biased = [token for token, _ in request.sampling.logit_bias]
        for name, tokens in (("logit_bias", biased), ("stop_token_ids", list(request.sampling.stop_ids))):
            self._check_ids(tokens, name)
        if request.messages is None:
            return [await self._prompt(request, prompt) for prompt in request.prompts]
        if self.template is None:
            raise bad_request("This model has no chat template; use /v1/completions.", "messages", "no_chat_template")
        if request.tools and not self.template.takes_tools:
            raise bad_request("This model's chat template knows no tools.", "tools", "unsupported_parameter")
        specs = request.tools.specs if request.tools else None
        text = self.template.render(request.messages, specs, request.template_fields)
        return [await self._prompt(request, text)]

    async def _prompt(self, request: Request, prompt: str | list[int]) -> list[int]:
        where = "prompt" if request.messages is None else "messages"
        ids = prompt if isinstance(prompt, list) else await self._encode(prompt, special=where == "prompt")
        if not ids:
            raise bad_request("The prompt is empty.", where)
        if len(ids) >= self.max_len or len(ids) + (request.max_tokens or 1) > self.max_len:
            wanted = f" and {request.max_tokens} tokens were asked for" if request.max_tokens else ""
            raise bad_request(
                f"This model's maximum context length is {self.max_len} tokens. However, your {where} resulted in "
                f"{len(ids)} tokens{wanted}. Please shorten the {where} or the answer.",
                where,
                "context_length_exceeded",
            )
        self._check_ids(ids, where)
        return ids

    def _check_ids(self, ids: list[int], where: str) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self.folder.vocab_size):
            raise bad_request(f"{where} holds a token id outside 0..{self.folder.vocab_size - 1}.", where)

    async def _encode(self, text: str, special: bool) -> list[int]:
        encode = partial(self.tokenizer.encode, text, add_special_tokens=special)
        try:
            if len(text) < LONG_TEXT:
                return encode().ids
            return (await asyncio.get_running_loop().run_in_executor(None, encode)).ids
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            raise bad_request("The text is not valid Unicode.") from None

    def check_model(self, name: str) -> None:
        """ApiError 404 unless the name is served."""
        if name not in self.settings.served_names:
            raise unknown_model(name, self.settings.served_names)
