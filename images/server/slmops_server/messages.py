"""Chat messages and tools, checked and in the form that chat templates read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmops_server.errors import ApiError, bad_request
from slmops_server.fields import flag

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")
READ = frozenset({"role", "content", "tool_calls", *TEXTS})
OF_ASSISTANT = frozenset({"tool_calls", "reasoning_content", "reasoning"})
MAY_BE_SILENT = frozenset({"assistant", "tool"})
# Fields of answers, which clients send back whole; what the model said is in its content
HARMLESS = frozenset({"refusal", "annotations", "parsed", "type", "provider_specific_fields"})
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
OF_TOOL = {"type", "function"}  # what a function has, chat templates read
MAX_TOOLS = 128


@dataclass(frozen=True, slots=True)
class Tools:
    """`specs` as the client sent them, `schemas` of the arguments by name; choice is "auto", "required" or a name.

    `strict`: those whose arguments are kept to their schemas whole, however they come to be called.
    """

    specs: list[dict[str, Any]]
    schemas: dict[str, dict[str, Any]]
    strict: frozenset[str]
    choice: str
    parallel: bool

    @property
    def forced(self) -> list[str]:
        """Names of which one has to be called; none if the model may choose not to."""
        return [] if self.choice == "auto" else list(self.schemas) if self.choice == "required" else [self.choice]

    @property
    def prescribed(self) -> bool:
        """Whether answers are held to a grammar."""
        return bool(self.forced or self.strict)


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Text in `content`; the arguments of `tool_calls` as objects, which is what templates print."""
    if not isinstance(value, list) or not value:
        raise bad_request("messages is not a list with at least one message.", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad_request(f"{where} is not an object.", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_request(f"{where}.role is not one of {', '.join(sorted(ROLES))}.", f"{where}.role")
    told = {name: content for name, content in message.items() if name not in HARMLESS}
    given = {name: content for name, content in told.items() if content is not None and content != []}
    for name in given:
        if name not in READ or (name in OF_ASSISTANT and role != "assistant"):
            raise _unsupported(f"{where}.{name}")
    calls = _calls(given["tool_calls"], f"{where}.tool_calls") if "tool_calls" in given else []
    if "content" not in given and role not in MAY_BE_SILENT:
        raise bad_request(f"{where}.content is missing or empty.", f"{where}.content")
    content = _content(given.get("content", ""), f"{where}.content")
    checked: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if calls:
        checked["tool_calls"] = calls
    for name in TEXTS:
        if name in given:
            if not isinstance(given[name], str):
                raise bad_request(f"{where}.{name} is not a string.", f"{where}.{name}")
            checked[name] = given[name]
    thought = checked.pop("reasoning", None)  # vLLM's newer name; templates know the other one
    if thought is not None and checked.setdefault("reasoning_content", thought) != thought:
        raise bad_request(f"{where}.reasoning and reasoning_content differ; send one of them.", f"{where}.reasoning")
    if role == "tool" and "tool_call_id" not in checked:
        raise bad_request(f"{where}.tool_call_id is missing.", f"{where}.tool_call_id")
    return checked


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} is neither a string nor a list of parts.", where)
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_request(f"{where}[{index}] is not a text part; this model reads text only.", f"{where}[{index}]")
        texts.append(part["text"])
    return "\n".join(texts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise bad_request(f"{where} is not a list.", where)
    calls = []
    for index, call in enumerate(value):
        at = f"{where}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"{at} is not a function call.", at)
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (TypeError, ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise bad_request(f"{at}.function.arguments is not a JSON object in a string.", f"{at}.function.arguments")
        number = "" if call.get("id") is None else call["id"]
        if not isinstance(number, str):
            raise bad_request(f"{at}.id is not a string.", f"{at}.id")
        function = {"name": function["name"], "arguments": arguments}
        calls.append({"id": number, "type": "function", "function": function})
    return calls


def read_tools(fields: Mapping[str, Any]) -> Tools | None:
    """None without tools, and with tool_choice "none": then the model is not told of them."""
    value, choice = fields.get("tools"), fields.get("tool_choice", "auto")
    parallel = flag(fields, "parallel_tool_calls", True)
    if value is None or value == []:
        if choice not in ("none", "auto"):
            raise bad_request("tool_choice needs tools.", "tool_choice")
        return None
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise bad_request(f"tools is not a list of at most {MAX_TOOLS} tools.", "tools")
    schemas = dict(_tool(tool, f"tools[{index}]") for index, tool in enumerate(value))
    if len(schemas) < len(value):
        raise bad_request("tools has two functions of the same name.", "tools")
    strict = frozenset(tool["function"]["name"] for tool in value if tool["function"].get("strict"))
    if choice == "none":
        return None
    if choice in ("auto", "required"):
        return Tools(value, schemas, strict, choice, parallel)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise bad_request('tool_choice is not "none", "auto", "required" or a function.', "tool_choice")
    if name not in schemas:
        raise bad_request(f"tool_choice names {name!r}, which is not in tools.", "tool_choice")
    return Tools(value, schemas, strict, name, parallel=False)


def _tool(tool: Any, where: str) -> tuple[str, dict[str, Any]]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise bad_request(f"{where} is not a function tool.", where)
    for field in tool:
        if field not in OF_TOOL and tool[field] is not None:
            raise _unsupported(f"{where}.{field}")
    name = function.get("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise bad_request(f"{where}.function.name is not 1 to 64 letters, digits, _ or -.", f"{where}.function.name")
    if function.get("strict") is not None:
        flag(function, "strict", shown=f"{where}.function.strict")
    schema = function.get("parameters")
    if schema is None:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, dict):
        raise bad_request(f"{where}.function.parameters is not a JSON schema.", f"{where}.function.parameters")
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise bad_request(
            f'{where}.function.parameters is not the schema of an object; its type has to be "object".',
            f"{where}.function.parameters",
        )
    return name, schema


def _unsupported(where: str) -> ApiError:
    return bad_request(f"{where} is not supported by this server.", where, "unsupported_parameter")
