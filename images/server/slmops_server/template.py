"""Chat templates, rendered as transformers renders them: sandboxed Jinja with the same globals, filters and options."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slmops_server.errors import ApiError, bad_request


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens in training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def json_text(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
    """json.dumps with letters as they are. Half a character, which JSON can spell and UTF-8 cannot, stays escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **more).encode(errors="backslashreplace").decode()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json_text(value, ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


GREETING = [{"role": "user", "content": "Hello"}]
TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object"}},
}


class ChatTemplate:
    """A compiled template. Raises jinja2's TemplateError when the source is not Jinja."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = lambda form: now().strftime(form)
        self._template = env.from_string(source)
        self.names = meta.find_undeclared_variables(env.parse(source))  # what it reads
        self.takes_tools = "tools" in self.names
        self.tags_calls = "<tool_call>" in source  # else the model writes bare JSON
        self._tokens = dict(special_tokens)
        # Llama's refuses an answer with several calls: a conversation that has one could not go on
        self.one_call = self.takes_tools and self._prints_calls(1) and not self._prints_calls(2)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt up to where the assistant begins; `more` is what this template knows beside the usual.

        ApiError 400 when the template refuses the messages.
        """
        try:
            given = {"messages": messages, "tools": tools, "add_generation_prompt": True}
            return self._template.render({**self._tokens, "documents": None, **(more or {}), **given})
        except TemplateError as error:
            raise bad_request(f"The model's chat template refused the messages: {error}", "messages") from None
        except Exception as error:  # noqa: BLE001 - a template is a program: what it trips over is the messages
            raise bad_request(
                f"The model's chat template could not render the messages: {type(error).__name__}", "messages"
            ) from None

    def _prints_calls(self, count: int) -> bool:
        """Whether it renders an answer with so many calls, and their results."""
        ids = [f"call{number:05}" for number in range(count)]
        calls = [{"id": id_, "type": "function", "function": {"name": "f", "arguments": {}}} for id_ in ids]
        results = [{"role": "tool", "tool_call_id": id_, "name": "f", "content": "1"} for id_ in ids]
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            self.render([*GREETING, answer, *results], [TOOL])
        except ApiError:
            return False
        return True
