"""One of the answers to a request: from what the engine sends to what the client gets."""

from dataclasses import replace

from slmops_server.schema import Request
from slmops_server.service import Service
from slmops_server.stream import Delta
from slmops_server.tools import Call, ToolParser
from slmops_server.wire import Frames, TextLogprobs, chat_logprobs


class Choice:
    """`last` is the delta that finished it."""

    def __init__(self, service: Service, request: Request, frames: Frames, number: int, prompt: list[int]) -> None:
        self.number, self.prompt = number, prompt
        self.last: Delta | None = None
        self._request, self._frames = request, frames
        self._begun = False
        self._scoring = request.max_tokens == 0
        self._parser = None
        template = service.template_of(request)
        tools = service.tools_of(request)
        if tools and template:
            self._parser = ToolParser(template.tags_calls, tools.schemas, None if tools.parallel else 1)
        self._alternatives = request.sampling.logprobs
        self._text_logprobs = TextLogprobs()
        self._echo = ""
        self._first: str | None = None  # the prompt's first token, which nothing predicted
        if request.echo:
            given = request.prompts[number // request.n]
            decode = service.tokenizer.decode
            self._echo = given if isinstance(given, str) else decode(given, skip_special_tokens=False)
            self._first = service.pieces.piece(prompt[0]).decode("latin-1")

    def whole(self, delta: Delta) -> dict[str, object]:
        """The choice of an answer that is sent in one piece, from its only delta."""
        self.last = delta = self._cut(delta)
        text, calls = self._split(delta)
        text = self._echo + text
        return self._frames.choice(self.number, text, calls, self._logprobs(delta), self.reason(delta))

    def frames(self, delta: Delta) -> bytes:
        """The bytes of a stream that this delta is worth."""
        delta = self._cut(delta)
        self._frames.count(len(self.prompt), delta.tokens)
        out = b"" if self._begun else self._frames.role(self.number)
        text, calls = self._split(delta)
        if not self._begun:
            text = self._echo + text
        logprobs = self._logprobs(delta) if delta.scores else None
        self._begun = True
        if text or logprobs:
            out += self._frames.text(text, self.number, logprobs)
        if self._parser:
            for number, call in enumerate(calls, self._parser.called - len(calls)):
                out += self._frames.call(call, number, self.number)
        if delta.finish:
            self.last = delta
            out += self._frames.finish(self.reason(delta), self.number)
        return out

    def _cut(self, delta: Delta) -> Delta:
        """Without the token that the engine had to make where none was asked for."""
        if not self._scoring:
            return delta
        scored = delta.scores[0] if delta.scores else []
        return replace(delta, text="", tokens=0, finish=delta.finish and "length", scores=(scored, []))

    def _split(self, delta: Delta) -> tuple[str, list[Call]]:
        if self._parser is None:
            return delta.text, []
        text, calls = self._parser.feed(delta.text)
        if delta.finish:
            more, last = self._parser.end()
            text, calls = text + more, calls + last
        return text, calls

    def reason(self, delta: Delta) -> str:
        """Why it ended, in the API's words."""
        called = self._parser is not None and self._parser.called and delta.finish == "stop"
        return "tool_calls" if called else delta.finish or "error"

    def _logprobs(self, delta: Delta) -> dict[str, object] | None:
        if self._alternatives < 0:
            return None
        prompt, answer = delta.scores or ([], [])
        if self._frames.kind == "chat":
            return chat_logprobs(answer)
        first, self._first = self._first, None
        return self._text_logprobs([*prompt, *answer], first, self._alternatives)
