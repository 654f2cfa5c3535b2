"""The teacher: one OpenAI-compatible endpoint, asked with patience. What one question costs and yields is decided here.

Four things can go wrong, and they end differently:
  refused       the key, the URL or the account is no good: fatal at once (RunFailure)
  forbidden     403 before any answer: of the key, or of this question alone. Others tell: Forbidden
  trouble       429, 5xx, no connection, no answer in time, one that broke off: asked again, with jittered backoff and
                Retry-After, until nothing was heard for `patience` seconds: then Silent. Also the answers of another
                revision than the one that is the teacher: a rollout's candidate, or what was promoted meanwhile
  rejection     the endpoint answers, but not with an answer: Rejected, after TRIES if another try may help (no JSON,
                no choices, empty text), at once if not (HTTP 400, but for a parameter that can be done without)
"""

import asyncio
import json
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote

import httpx

from slmops.api.run import TeacherEndpoint
from slmops_trainer import replies
from slmops_trainer.failure import RunFailure
from slmops_trainer.replies import EXCERPT, Rejected, Reply, Trouble

ENV_PATIENCE = "SLMOPS_TEACHER_PATIENCE_SECONDS"
PATIENCE = 300.0  # seconds without any answer before the pod gives up; the next one goes on from what was saved
TRIES = 3  # of a question whose answer is garbage
OWN_TRIES = 8  # of a question that alone runs into trouble, over half a minute, while others are answered
OWN_PROOFS = 3  # so often others were answered between two of its tries: one such answer may be the teacher's last
OWN_CODES = (408, 424, 500, 502, 504, 524)  # a question may bring a worker down, or take longer than a gateway waits
CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0  # seconds
LONGEST_HINT = 600.0  # seconds of Retry-After that a pod, and its GPU, waits: twice, and the pod has ended
REVISION = "x-slmops-revision"  # header of the answers of a ModelDeployment
BODY_MAX = 16 << 20  # bytes of a response
SECRET_MIN = 8  # characters of a query's value: shorter ones are parts of words and numbers
log = logging.getLogger("slmops")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_tokens: int


class Forbidden(Exception):  # noqa: N818  # a verdict, not an error
    """HTTP 403 before the teacher has answered anything.

    The text says what came; `failure`: how the run ends if nothing else is answered either.
    """

    def __init__(self, what: str, failure: RunFailure) -> None:
        super().__init__(what)
        self.failure = failure


class Silent(Exception):  # noqa: N818  # a verdict, not an error
    """Nothing was heard of the teacher for `patience` seconds.

    failure  how the run ends if this is the teacher's fault
    own      it may be this question's fault alone
    """

    def __init__(self, what: str, failure: RunFailure, *, own: bool) -> None:
        super().__init__(what)
        self.failure = failure
        self.own = own


def shown(url: str) -> str:
    """The URL without user, password and query, where gateways take keys: what may leave the pod."""
    return re.sub("(?<=://)[^/]*@", "", re.split("[?#]", url, maxsplit=1)[0])


def recorded(endpoint: TeacherEndpoint) -> dict[str, str]:
    """What an artifact tells of the teacher that it comes from."""
    return {"url": shown(endpoint.url), "model": endpoint.model, "name": endpoint.name}


class Teacher:
    """A client for one endpoint; an async context manager.

    timeout     seconds for one request
    on_trouble  called with a sentence while the endpoint does not answer
    known       it has answered in an earlier pod: its URL and its model are right
    trust       whose certificates are trusted; None: the usual authorities'
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
        known: bool = False,
        trust: ssl.SSLContext | None = None,
        patience: float | None = None,
    ) -> None:
        self._endpoint = endpoint
        head, mark, query = endpoint.url.partition("?")
        self._url = f"{head.rstrip('/')}/chat/completions{mark}{query}"
        self._secrets = _secrets(key, query)
        self._at = shown(endpoint.url)
        self._timeout = timeout
        self._on_trouble = on_trouble
        self._patience = float(os.environ.get(ENV_PATIENCE, PATIENCE)) if patience is None else patience
        self._silent_since: float | None = None  # the first trouble after the last sign of life
        self._not_before = 0.0  # the endpoint asked all of us to wait
        self._last_answer = 0.0
        self._known = known
        self._unsupported: set[str] = set()  # parameters that the endpoint does not take
        self._http = httpx.AsyncClient(
            headers={"User-Agent": "slmops", **(_credentials(self._url, key) if key else {})},
            verify=trust or True,
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

        Raises Rejected, Forbidden, Silent, RunFailure(AccessDenied, BadSpec).
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
            if isinstance(found, Rejected) and (odd := body.keys() & found.unsupported):
                self._do_without(odd)
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
            alone = self._last_answer <= last
            proofs += not alone
            last = time.monotonic()
            apart = proofs >= OWN_PROOFS or self.answered_since(since)
            if found.own and tries >= OWN_TRIES and apart:
                raise Rejected(f"{found.what}, {tries} times, while other questions were answered", tokens=tokens)
            await self._pause(found, tries, troubled, alone=alone)

    @property
    def answered(self) -> bool:
        """Whether it has answered anything in this pod."""
        return self._last_answer > 0

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

    def _do_without(self, names: set[str]) -> None:
        """Models of OpenAI that think call the limit otherwise, and set their temperature themselves."""
        for name in sorted(names - self._unsupported):
            instead = "max_completion_tokens" if name == "max_tokens" else "the teacher's own"
            log.warning("The teacher takes no %s: %s is used", name, instead)
        self._unsupported |= names

    async def _once(self, body: dict[str, Any]) -> Reply | Rejected | Trouble:
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
            return Trouble(f"no answer within {self._timeout:.0f} s", own=True)
        except httpx.HTTPError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise self._untrusted(str(error)) from error
            # A connection that is taken and then cut may be what one question does to a worker or to a gateway.
            cut = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError)
            return Trouble(f"{str(error) or type(error).__name__}"[:EXCERPT], own=cut)
        except (httpx.InvalidURL, UnicodeError) as error:
            if "@" in self._endpoint.url:  # what the error takes for a port may be the password up to its first slash
                remedy = "Give it without user and password, and a key with apiKeySecretRef."
                raise RunFailure("BadSpec", f"The teacher's URL cannot be used. {remedy}") from error
            raise RunFailure("BadSpec", f"The teacher's URL {self._at} cannot be used: {error}.") from error
        return self._judge(response, bytes(raw))

    def _judge(self, response: httpx.Response, raw: bytes) -> Reply | Rejected | Trouble:
        asked, answers = self._endpoint.revision, response.headers.get(REVISION)
        if asked and answers and answers != asked:  # whatever it says: a candidate may be bad, or want other keys
            return Trouble(f"revision {answers} of {self._endpoint.name} answers, {asked} is the teacher")
        body = replies.load(raw)
        code, away = replies.status(response.status_code, body), response.has_redirect_location
        if code in (401, 402):
            raise self._denied(code)
        # Once it has answered, it is not the key or the URL: some endpoints say 403 of a single question.
        if code == 403 and not self.answered:
            raise Forbidden(f"HTTP 403: {self._excerpt(raw)}", self._denied(code))
        if code in (404, 405) or away:
            if not (self._known or self.answered):
                raise self._misdirected(code, response, raw)
            return self._trouble(code, response, raw)
        passing = code in (408, 424, 425) or (code == 429 and not replies.too_large(raw)) or code >= 500
        if passing:
            return self._trouble(code, response, raw)
        if code != 200:
            self._alive()
            odd = replies.unsupported(raw) if code == 400 else frozenset()
            return Rejected(f"HTTP {code}: {self._excerpt(raw)}", final=True, unsupported=odd)
        found = replies.read(body, self._excerpt(raw))
        if not isinstance(found, Trouble):
            self._alive()
        return found

    def _trouble(self, code: int, response: httpx.Response, raw: bytes) -> Trouble:
        said = f": {self._excerpt(raw)}" if raw.lstrip().startswith(b"{") else ""
        hint = replies.retry_after(response.headers.get("retry-after", "").strip())
        return Trouble(f"HTTP {code}{said}", hint, own=code in OWN_CODES)

    def _alive(self) -> None:
        self._silent_since = None

    async def _wait(self) -> None:
        """Wait until the moment that the endpoint asked for; a later answer may have moved it."""
        while (rest := self._not_before - time.monotonic()) > 0:  # noqa: ASYNC110  # a moment, not an event
            await asyncio.sleep(rest + random.uniform(0, 0.1))  # noqa: S311  # jitter

    async def _pause(self, trouble: Trouble, tries: int, troubled: float, *, alone: bool) -> None:
        """Wait before the next try; raise Silent when there was trouble for too long, with this question, too.

        `alone`: nothing was answered since the try before: an endpoint that then asks for more time than a pod waits
        is left to a later one.
        """
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        hint = trouble.hint if trouble.hint <= LONGEST_HINT else 0.0
        if hint:
            self._not_before = max(self._not_before, now + hint)
        if trouble.hint > LONGEST_HINT and alone:
            text = f"The teacher at {self._at} asks for {trouble.hint:.0f} s without requests"
            failure = RunFailure("TeacherUnavailable", f"{text} ({trouble.what}). Look at its quota.")
            raise Silent(trouble.what, failure, own=False)
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
            f"The teacher at {self._at} did not answer for {seconds:.0f} s ({what}). Check that it runs, its "
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
        return RunFailure("AccessDenied", f"The teacher at {self._at} refused access (HTTP {code}). {remedy}")

    def _untrusted(self, error: str) -> RunFailure:
        why = error.partition("verify failed: ")[2].partition(" (_ssl")[0] or "verify failed"
        given = self._endpoint.secret
        where = f"Secret {given}" if given else "the Secret of spec.teacher.endpoint.apiKeySecretRef"
        return RunFailure(
            "AccessDenied",
            f"The teacher at {self._at} has a certificate that is not trusted here ({why}). "
            f"If its CA is your own, put that CA's certificate as ca.crt into {where}.",
        )

    def _misdirected(self, code: int, response: httpx.Response, raw: bytes) -> RunFailure:
        if response.has_redirect_location:
            # Not followed: the key would go along.
            target = shown(response.headers["location"])[:EXCERPT]
            what = f"leads elsewhere (HTTP {code}, to {target!r})"
        else:
            what = (
                f"has no /chat/completions, or knows no model {self._endpoint.model!r} "
                f"(HTTP {code}: {self._excerpt(raw)})"
            )
        return RunFailure(
            "BadSpec",
            f"The teacher at {self._at} {what}. Correct the URL (up to and with /v1) and the model in spec.teacher.",
        )

    def _excerpt(self, raw: bytes) -> str:
        text = " ".join(raw[: 4 * EXCERPT].decode("utf-8", "replace").split())
        text = self._secrets.sub("***", text)
        return repr(text[:EXCERPT]) if text else "an empty body"


def _secrets(key: str | None, query: str) -> re.Pattern[str]:
    """What an endpoint may quote and nobody else may read: the key, and the query with each of its longer values."""
    sent = query.partition("#")[0]
    values = [value for _, value in parse_qsl(sent) if len(value) >= SECRET_MIN]
    longest_first = sorted(filter(None, (key, sent, unquote(sent), *values)), key=len, reverse=True)
    return re.compile("|".join(map(_spelt, longest_first)) or "(?!)")


def _spelt(text: str) -> str:
    """A pattern of the text as it may stand in URLs, in JSON and in HTML."""

    def one(char: str) -> str:
        if char.isascii() and char.isalnum():
            return char
        percents = r"%\w\w" * len(char.encode())
        escapes = r"\\u\w{4}" * (len(char.encode("utf-16-le")) // 2)
        return rf"(?:\\?{re.escape(char)}|\+|{percents}|{escapes}|&#?\w+;)"

    return "".join(map(one, text))


def _credentials(url: str, key: str) -> dict[str, str]:
    """Azure's endpoints of one deployment take a key in a header of their own, and refuse one beside a bearer token.

    Entra ID's tokens (JWTs, RFC 7519) are bearer tokens there, too.
    """
    head, _, query = url.partition("?")
    token = key.startswith("eyJ") and key.count(".") == 2  # dots between a JWT's three parts
    if not token and ("/openai/deployments/" in head or "api-version=" in query):
        return {"api-key": key}
    return {"Authorization": f"Bearer {key}"}
