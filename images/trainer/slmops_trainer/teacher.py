"""The teacher: one OpenAI-compatible endpoint, asked with patience. What one question costs and yields is decided here.

Three things can go wrong, and they end differently:
  refused       the key, the URL or the account is no good: fatal at once (RunFailure)
  trouble       429, 5xx, no connection, no answer in time: asked again, with jittered backoff and Retry-After, until
                nothing was heard for `patience` seconds: then Silent
  rejection     the endpoint answers, but not with an answer: Rejected, after TRIES if another try may help (no JSON,
                no choices, empty text), at once if not (HTTP 400, but for a parameter that can be done without)
"""

import asyncio
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import httpx

from slmops.api.run import TeacherEndpoint
from slmops_trainer.failure import RunFailure

ENV_PATIENCE = "SLMOPS_TEACHER_PATIENCE_SECONDS"
PATIENCE = 300.0  # seconds without any answer before the pod gives up; the next one goes on from what was saved
TRIES = 3  # of a question whose answer is garbage
OWN_TRIES = 8  # of a question that alone runs into trouble, over half a minute, while others are answered
OWN_PROOFS = 3  # so often others were answered between two of its tries: one such answer may be the teacher's last
OWN_CODES = (408, 500, 502, 504, 524)  # a question may bring a worker down, or take longer than a gateway waits
CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_HINT = 0.25, 15.0, 900.0  # seconds
BODY_MAX = 16 << 20  # bytes of a response
EXCERPT = 160  # characters of a bad response in messages
# OpenAI's words: "Unsupported parameter: 'max_tokens' is ..", "Unsupported value: 'temperature' does not .."
UNSUPPORTED = re.compile(
    rb"unsupported (?:parameter|value): \W{0,2}(max_tokens|temperature|top_p|seed)\b", re.IGNORECASE
)

log = logging.getLogger("slmops")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `finish` is the endpoint's finish_reason ("length": cut off); `tokens` counts the answer's tokens."""

    text: str
    finish: str
    tokens: int


class Rejected(Exception):  # noqa: N818  # a verdict, not an error
    """A question got no usable answer. The text says what came instead.

    final        asking again would bring the same
    tokens       that the teacher wrote for it nevertheless
    unsupported  the parameter that the teacher does not take, if that was all that was wrong
    """

    def __init__(self, what: str, *, final: bool = False, tokens: int = 0, unsupported: str = "") -> None:
        super().__init__(what)
        self.final = final
        self.tokens = tokens
        self.unsupported = unsupported


class Silent(Exception):  # noqa: N818  # a verdict, not an error
    """Nothing was heard of the teacher for `patience` seconds.

    failure  how the run ends if this is the teacher's fault
    own      it may be this question's fault alone
    """

    def __init__(self, what: str, failure: RunFailure, *, own: bool) -> None:
        super().__init__(what)
        self.failure = failure
        self.own = own


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Worth another try. `hint`: seconds that the endpoint asks for; `own`: may be this question's fault alone."""

    what: str
    hint: float = 0.0
    own: bool = False


class Teacher:
    """A client for one endpoint; an async context manager.

    timeout     seconds for one request
    on_trouble  called with a sentence while the endpoint does not answer
    patience    seconds without a sign of life before Silent
    """

    def __init__(
        self,
        endpoint: TeacherEndpoint,
        key: str | None,
        *,
        timeout: float,
        concurrency: int,
        on_trouble: Callable[[str], None],
        patience: float | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._key = key
        head, mark, query = endpoint.url.partition("?")
        self._url = f"{head.rstrip('/')}/chat/completions{mark}{query}"
        self._timeout = timeout
        self._on_trouble = on_trouble
        self._patience = float(os.environ.get(ENV_PATIENCE, PATIENCE)) if patience is None else patience
        self._silent_since: float | None = None  # the first trouble after the last sign of life
        self._not_before = 0.0  # the endpoint asked all of us to wait
        self._last_answer = 0.0
        self._unsupported: set[str] = set()  # parameters that the endpoint does not take
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            headers={"User-Agent": "slmops", **headers},
            # asyncio.timeout below bounds the whole exchange, not each read; a host that does not even take the
            # connection (a Service without pods, say) is known sooner
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def ask(
        self, messages: Sequence[dict[str, str]], sampling: Sampling, seed: int, since: float | None = None
    ) -> Reply:
        """One answer to one conversation; `since`: when it was put off (monotonic seconds), if it was.

        Raises Rejected, Silent, RunFailure(AccessDenied, BadSpec).
        """
        body = self._body(messages, sampling, seed)
        troubled, tries, garbage, tokens = 0.0, 0, 0, 0
        last, proofs = time.monotonic(), 0  # last: end of the last try
        while True:
            await self._wait()
            found = await self._once(body)
            if isinstance(found, Reply):
                self._last_answer = time.monotonic()
                return found
            if isinstance(found, Rejected) and found.unsupported in body:
                self._do_without(found.unsupported)
                body = self._body(messages, sampling, seed)
                continue
            if isinstance(found, Rejected):
                garbage += 1
                tokens += found.tokens
                if found.final or garbage >= TRIES:
                    raise Rejected(str(found), tokens=tokens)
                await asyncio.sleep(FIRST_PAUSE * random.uniform(0.5, 1.5))  # noqa: S311  # jitter
                continue
            tries += 1
            troubled = troubled or time.monotonic()
            proofs += self._last_answer > last
            last = time.monotonic()
            apart = proofs >= OWN_PROOFS or self.answered_since(since)
            if found.own and tries >= OWN_TRIES and apart:
                raise Rejected(f"{found.what}, {tries} times, while other questions were answered", tokens=tokens)
            await self._pause(found, tries, troubled)

    def answered_since(self, moment: float | None) -> bool:
        """Whether anything was answered after that moment (monotonic seconds); None: there was no such moment."""
        return moment is not None and self._last_answer > moment

    def _body(self, messages: Sequence[dict[str, str]], sampling: Sampling, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": list(messages),
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            "stream": False,
        }
        if sampling.temperature > 0:
            body["seed"] = seed
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if "max_tokens" in self._unsupported:
            body["max_completion_tokens"] = body["max_tokens"]
        return {name: value for name, value in body.items() if name not in self._unsupported}

    def _do_without(self, name: str) -> None:
        """Models of OpenAI that think call the limit otherwise, and set their temperature themselves."""
        if name not in self._unsupported:
            instead = "max_completion_tokens" if name == "max_tokens" else "the teacher's own"
            log.warning("The teacher takes no %s: %s is used", name, instead)
        self._unsupported.add(name)

    async def _once(self, body: dict[str, Any]) -> "Reply | Rejected | _Trouble":
        """One exchange. Everything that the server says, as a value; only what is fatal is raised."""
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.stream(
                    "POST", self._url, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
                ) as response,
            ):
                raw = bytearray()
                async for block in response.aiter_bytes():
                    raw += block
                    if len(raw) > BODY_MAX:
                        self._alive()
                        return Rejected(f"a response of more than {BODY_MAX >> 20} MiB")
        except TimeoutError:
            return _Trouble(f"no answer within {self._timeout:.0f} s", own=True)
        except httpx.HTTPError as error:
            # A connection that is taken and then cut may be what one question does to a worker or to a gateway.
            cut = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError)
            return _Trouble(f"{str(error) or type(error).__name__}"[:EXCERPT], own=cut)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise RunFailure("BadSpec", f"The teacher's URL {self._endpoint.url} cannot be used: {error}.") from error
        return self._judge(response, bytes(raw))

    def _judge(self, response: httpx.Response, raw: bytes) -> "Reply | Rejected | _Trouble":
        code = response.status_code
        # Once it has answered, it is not the key or the URL: some endpoints say 403 of a single question.
        if code in (401, 402) or (code == 403 and not self._last_answer):
            raise self._denied(code)
        if (code in (404, 405) or response.has_redirect_location) and not self._last_answer:
            raise self._misdirected(response, raw)
        if code in (404, 408, 425, 429) or code >= 500:
            said = f": {self._excerpt(raw)}" if raw.lstrip().startswith(b"{") else ""
            return _Trouble(f"HTTP {code}{said}", _retry_after(response), own=code in OWN_CODES)
        self._alive()
        if code != 200:
            odd = UNSUPPORTED.search(raw) if code == 400 else None
            name = odd[1].decode() if odd else ""
            return Rejected(f"HTTP {code}: {self._excerpt(raw)}", final=True, unsupported=name)
        return self._read(raw)

    def _read(self, raw: bytes) -> Reply | Rejected:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return Rejected(f"no JSON: {self._excerpt(raw)}")
        try:
            choice = body["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return Rejected(f"no choices[0].message.content: {self._excerpt(raw)}")
        finish = str(choice.get("finish_reason") or "")
        usage = body.get("usage")
        counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
        tokens = counted if isinstance(counted, int) and counted > 0 else 0
        if not isinstance(text, str) or not text.strip():
            if finish == "length":  # a model that reasons aside has used up its tokens
                return Rejected("no room for an answer: raise generation.maxTokens", final=True, tokens=tokens)
            return Rejected(f"an empty answer: {self._excerpt(raw)}", tokens=tokens)
        if any("\ud800" <= char <= "\udfff" for char in text):
            return Rejected("half a surrogate pair, which is no text", tokens=tokens)
        # A server that counts nothing must not make the token budget endless: four characters are about a token.
        return Reply(text, finish, tokens or (len(text) + 3) // 4)

    def _alive(self) -> None:
        self._silent_since = None

    async def _wait(self) -> None:
        """Wait until the moment that the endpoint asked for; a later answer may have moved it."""
        while (rest := self._not_before - time.monotonic()) > 0:  # noqa: ASYNC110  # a moment, not an event
            await asyncio.sleep(rest + random.uniform(0, 0.1))  # noqa: S311  # jitter

    async def _pause(self, trouble: _Trouble, tries: int, troubled: float) -> None:
        """Wait before the next try; raise Silent when there was trouble for too long, with this question, too."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        hint = min(trouble.hint, LONGEST_HINT)
        if hint:
            self._not_before = max(self._not_before, now + hint)
        if now - max(self._silent_since, troubled) >= self._patience + hint:
            raise Silent(trouble.what, self._unavailable(now - self._silent_since, trouble.what), own=trouble.own)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries - 1, 10)) * random.uniform(0.5, 1.5)  # noqa: S311  # jitter
        silent = now - self._silent_since
        if tries > 1:
            self._on_trouble(f"Teacher unavailable for {silent:.0f} s ({trouble.what}); trying again")
        await asyncio.sleep(max(pause, hint))

    def _unavailable(self, seconds: float, what: str) -> RunFailure:
        return RunFailure(
            "TeacherUnavailable",
            f"The teacher at {self._endpoint.url} did not answer for {seconds:.0f} s ({what}). Check that it runs, its "
            "name, network policies, and data.generation.requestTimeoutSeconds.",
        )

    def _denied(self, code: int) -> RunFailure:
        # The body is not quoted: some servers repeat the key in it.
        given = self._endpoint.secret
        remedy = (
            f"Put a valid key under {self._endpoint.key} in Secret {given}."
            if given
            else "Give a key with spec.teacher.endpoint.apiKeySecretRef."
        )
        if code == 402:
            remedy = "Its account has nothing left to pay with: top it up."
        return RunFailure("AccessDenied", f"The teacher at {self._endpoint.url} refused access (HTTP {code}). {remedy}")

    def _misdirected(self, response: httpx.Response, raw: bytes) -> RunFailure:
        code = response.status_code
        if response.has_redirect_location:
            # Not followed: the key would go along.
            target = response.headers["location"].partition("?")[0][:EXCERPT]
            what = f"leads elsewhere (HTTP {code}, to {target!r})"
        else:
            what = (
                f"has no /chat/completions, or knows no model {self._endpoint.model!r} "
                f"(HTTP {code}: {self._excerpt(raw)})"
            )
        return RunFailure(
            "BadSpec",
            f"The teacher at {self._endpoint.url} {what}. Correct the URL (up to and with /v1) and the model in "
            "spec.teacher.",
        )

    def _excerpt(self, raw: bytes) -> str:
        text = " ".join(raw[: 4 * EXCERPT].decode("utf-8", "replace").split())
        if self._key:
            text = text.replace(self._key, "***")
        return repr(text[:EXCERPT]) if text else "an empty body"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the endpoint asks us to wait: a number or an HTTP date."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
