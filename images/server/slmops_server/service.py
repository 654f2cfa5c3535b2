"""What the front knows: the model's text side, the engine behind it, and whether it takes requests."""

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from slmops_server import model_folder
from slmops_server.detok import CLOSE, OPEN, DetokenizerFactory
from slmops_server.engines.choose import EngineOptions
from slmops_server.errors import UNREACHABLE, ApiError, bad_request, come_again, overloaded, too_late, unavailable
from slmops_server.keys import ApiKeys
from slmops_server.messages import Tools
from slmops_server.metrics import Metrics
from slmops_server.model_folder import BadModelFolderError
from slmops_server.queue_time import QueueTime, Work
from slmops_server.schema import Request, unknown_model
from slmops_server.settings import Settings
from slmops_server.supervisor import Supervisor
from slmops_server.template import GREETING, TOOL, ChatTemplate

if TYPE_CHECKING:
    from slmops_server.traces import Traces

log = logging.getLogger(__name__)

LONG_TEXT = 20_000  # characters in all prompts of a request from which tokenizing leaves the event loop
QUEUED_SHARE = 8  # a place in the queue is worth this part of the longest prompt
ANY = Work(1, 1)  # stands for a request that was not read yet


class Service:
    """One model, served. BadModelFolderError when the folder cannot be."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = model_folder.read(settings.model)
        self.tokenizer = model_folder.read_tokenizer(settings.model)
        self.pieces = DetokenizerFactory(self.tokenizer)
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.special_tags = {token.content for token in added if token.special} & {OPEN, CLOSE}
        self.template = self._template(self.folder.chat_template)
        self.tool_template = self._template(self.folder.tool_template)
        self._try_templates()
        self.max_len = min(settings.max_model_len or self.folder.context_length, self.folder.context_length)
        self.keys = ApiKeys(settings.api_keys_dir)
        options = EngineOptions(
            settings.engine,
            settings.threads,
            settings.slots,
            settings.max_model_len,
            settings.prefill_chunk,
            settings.speculate,
            [(name, str(folder)) for name, folder in settings.adapters],
            None if settings.adapter_root is None else [],
        )
        self.supervisor = Supervisor(settings.model, options, settings.log_level, settings.step_timeout)
        self.metrics = Metrics(settings.served_names, self.supervisor, self.max_len)
        self.supervisor.on_restart = self.metrics.restarted
        self.draining = False
        self.begin = time.monotonic()
        self.created = int(time.time())
        self.queue_time = QueueTime()
        self.traces: Traces | None = None
        self._max_queue_tokens = settings.max_queue_tokens or max(
            self.max_len, settings.max_queue * self.max_len // QUEUED_SHARE
        )

    def _template(self, source: str | None) -> ChatTemplate | None:
        try:
            return None if source is None else ChatTemplate(source, self.folder.special_tokens)
        except TemplateError as error:
            raise BadModelFolderError(
                f"the chat template of {self.settings.model} is not valid Jinja: {error}"
            ) from None

    def _try_templates(self) -> None:
        """A warning where no chat can be answered. The server starts all the same: completions need no template."""
        tooled = self.tool_template or self.template
        tried: list[tuple[str, ChatTemplate | None, list[Mapping[str, Any]] | None]] = [("chat", self.template, None)]
        if tooled and tooled.takes_tools:
            tried.append(("chat with tools", tooled, [TOOL]))
        tried.append(("chat with earlier calls and no tools", self.tool_template, []))
        for what, template, tools in tried:
            try:
                if template:
                    template.render(GREETING, tools)
            except ApiError as error:
                log.warning(
                    "Failed to render a user's message, so every %s is to be refused problem=%s", what, error.message
                )

    def template_of(self, request: Request) -> ChatTemplate | None:
        """The chat template for a request: models may have one of their own for tools."""
        return self.tool_template if self.tool_template and request.speaks_of_tools else self.template

    def tools_of(self, request: Request) -> Tools | None:
        """The tools that a request's answer may call: one of them, where the template prints no more."""
        tools, template = request.tools, self.template_of(request)
        return replace(tools, parallel=False) if tools and template and template.one_call else tools

    @property
    def ready(self) -> bool:
        """Whether a request sent now will be answered, and more should be sent here."""
        return self.supervisor.ready and not self.draining

    @property
    def _room(self) -> int:
        """Answers that run or wait at a time."""
        return self.supervisor.slots + self.settings.max_queue

    def check_room(self, count: int) -> None:
        """ApiError 400 when so many answers cannot be had at a time, whatever else runs."""
        if count > self._room:
            raise bad_request(f"The request asks for {count} answers; this server takes {self._room} at a time.", "n")

    def admit(self, wanted: Sequence[Work] = (ANY,), deadline: float = math.inf) -> None:
        """ApiError when these answers cannot be had: 503 without an engine, without room, or without the time.

        Cheap: asked before any work is done, too. deadline: of CLOCK_MONOTONIC, in seconds.
        """
        if not self.supervisor.ready:
            raise self.supervisor.not_ready()
        slots = self.supervisor.slots
        if deadline == math.inf and self.supervisor.active + len(wanted) <= slots:
            return
        running, waiting = self.supervisor.work()
        if self.supervisor.active + len(wanted) > self._room:
            raise self._full(f"{len(waiting)} requests are waiting.", "queue_full", running, waiting)
        # one request alone may be longer than the limit: refused now, it would always be
        late = wanted[max(0, slots - len(running)) :]
        tokens = sum(work.prompt for work in waiting)
        if waiting and tokens + sum(work.prompt for work in late) > self._max_queue_tokens:
            raise self._full(f"Prompts of {tokens} tokens are waiting.", "queue_tokens", running, waiting)
        if deadline < math.inf:
            self._check_time(deadline - time.monotonic(), running, [*waiting, *late], wanted[-1])

    def _full(self, message: str, reason: str, running: list[Work], waiting: list[Work]) -> ApiError:
        seconds = self.queue_time.wait(running, waiting, self.supervisor.slots)
        after = come_again(seconds)
        if self.draining:
            return unavailable("The server is about to end; send the request to another one.", "draining", after)
        return overloaded(f"{message} Try again in {after} seconds.", reason, after)

    def _check_time(self, left: float, running: list[Work], waiting: list[Work], last: Work) -> None:
        if left <= 0:
            raise too_late("The time that the request was given has passed.")
        if not self.queue_time.measured:
            return
        # the last one waits for those before it, and then takes its own time
        wait = self.queue_time.wait(running, waiting[:-1], self.supervisor.slots) if waiting else 0.0
        needed = wait + self.queue_time.seconds(last)
        if needed > left:
            raise unavailable(
                f"The request was given {left:.3g} seconds; it would wait about {wait:.3g} "
                f"and then take {needed - wait:.3g}.",
                UNREACHABLE,
                come_again(needed - left),
            )

    async def prompts(self, request: Request) -> list[list[int]]:
        """Token ids of the request's prompts. ApiError 400 or 404 when they cannot be served."""
        self.check_model(request.model)
        biased = [token for token, _ in request.sampling.logit_bias]
        for name, tokens in (("logit_bias", biased), ("stop_token_ids", list(request.sampling.stop_ids))):
            self._check_ids(tokens, name)
        if request.messages is None:
            aside = sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str)) >= LONG_TEXT
            return [await self._prompt(request, prompt, aside) for prompt in request.prompts]
        template = self.template_of(request)
        if template is None:
            raise bad_request("This model has no chat template; use /v1/completions.", "messages", "no_chat_template")
        if request.tools and not template.takes_tools:
            raise bad_request("This model's chat template knows no tools.", "tools", "unsupported_parameter")
        if "reasoning_effort" in request.template_fields and "reasoning_effort" not in template.names:
            raise bad_request(
                "This model's chat template knows no reasoning_effort.", "reasoning_effort", "unsupported_parameter"
            )
        specs = request.tools.specs if request.tools else [] if template is self.tool_template else None
        text = template.render(request.messages, specs, request.template_fields)
        return [await self._prompt(request, text, len(text) >= LONG_TEXT)]

    async def _prompt(self, request: Request, prompt: str | list[int], aside: bool) -> list[int]:
        where = "prompt" if request.messages is None else "messages"
        ids = prompt if isinstance(prompt, list) else await self._encode(prompt, where == "prompt", aside)
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

    def limit(self, request: Request, prompt: list[int]) -> int:
        """Tokens that an answer to this prompt may have. Scoring (max_tokens 0) needs one, to be thrown away."""
        return self.max_len - len(prompt) if request.max_tokens is None else max(1, request.max_tokens)

    def _check_ids(self, ids: list[int], where: str) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self.folder.vocab_size):
            raise bad_request(f"{where} holds a token id outside 0..{self.folder.vocab_size - 1}.", where)

    async def _encode(self, text: str, special: bool, aside: bool) -> list[int]:
        # encode is the faster one for short texts, but holds Python's lock to its end: nothing runs beside it
        beside = partial(self.tokenizer.encode_batch, [text], add_special_tokens=special)
        try:
            if not aside:
                return self.tokenizer.encode(text, add_special_tokens=special).ids
            return (await asyncio.get_running_loop().run_in_executor(None, beside))[0].ids
        except TypeError:  # the library's word for half a character, which JSON can spell and UTF-8 cannot
            raise bad_request("The text is not valid Unicode.") from None

    def check_model(self, name: str) -> None:
        """ApiError 404 unless the name is served."""
        if name not in self.settings.served_names and name not in self.supervisor.adapters:
            raise unknown_model(name, (*self.settings.served_names, *self.supervisor.adapters))

    def adapter(self, name: str) -> str:
        """The adapter that answers under that name, "" for the base. ApiError 404 when there is none any more."""
        self.check_model(name)
        return name if name in self.supervisor.adapters else ""
