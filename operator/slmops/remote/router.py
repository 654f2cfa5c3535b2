"""Talking to the agent of a router pod."""

import hashlib
import hmac
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import httpx
from pydantic import Field, ValidationError

from slmops.api.base import Model
from slmops.remote.client import shared
from slmops.remote.errors import RemoteError, TokenRefusedError
from slmops.remote.exchange import TooMuchError, ask
from slmops.remote.silence import Silence
from slmops.settings import Settings

AGENT_PORT = 9091
READ_SECONDS = 3.0
CUT_OFF_SECONDS = 30.0  # how long a router is not asked again that takes no connection: a NetworkPolicy forbids it
WRITE_SECONDS = 20.0  # another set of revisions is a reload of HAProxy
BODY_MAX = 262_144  # bytes


class Share(Model):
    """What one revision did since the epoch began."""

    weight: int = 0
    ready: int = 0  # servers that the router finds healthy
    requests: int = 0  # answered
    chosen: int = 0  # of the report's turns, those that were this revision's


class Report(Model):
    """An agent's answer."""

    routes: dict[str, Any] = Field(default_factory=dict)
    epoch: str = ""
    turns: int = 0  # requests without a conversation since the epoch began, while every share had pods
    revisions: dict[str, Share] = Field(default_factory=dict)


class Order(Protocol):
    """What the pusher takes: state.Routes, which this layer may not import."""

    @property
    def url(self) -> str:
        """Base URL of the agent."""

    @property
    def token(self) -> str:
        """Its token."""

    @property
    def body(self) -> dict[str, Any]:
        """The routes."""


def token(key: str, uid: str) -> str:
    """The token of the router of the ModelDeployment with this uid: only who has the operator's key can make it."""
    return hmac.new(key.encode(), uid.encode(), hashlib.sha256).hexdigest()


def agent_url(address: str) -> str:
    """Base URL of the agent on the pod with this IP address."""
    return f"http://[{address}]:{AGENT_PORT}" if ":" in address else f"http://{address}:{AGENT_PORT}"


def observe(url: str, secret: str, *, client: httpx.Client | None = None) -> Report:
    """Read what the router does. Raises RemoteError, of which TokenRefusedError is one."""
    return _call("GET", f"{url}/observed", secret, None, READ_SECONDS, client)


class Observer:
    """`observe`, but one that takes no connection is left alone for a while; may be used from many threads.

    Not at once: a lost packet must not keep a rollback from it. One that takes connections and is slow is asked again
    each time: it may obey what it is told.
    """

    def __init__(self, *, client: httpx.Client | None = None) -> None:
        self._client = client
        self._missed, self._silence = Silence(2 * CUT_OFF_SECONDS), Silence(CUT_OFF_SECONDS)

    def __call__(self, url: str, secret: str, *, clock: Callable[[], float] = monotonic) -> Report:
        """See `observe`. Raises RemoteError."""
        now = clock()
        if self._silence.keeps(url, now):
            raise RemoteError(f"The router's agent at {url} takes no connection.")
        try:
            return observe(url, secret, client=self._client)
        except RemoteError as error:
            if isinstance(error.__cause__, httpx.ConnectTimeout):
                if self._missed.keeps(url, now):
                    self._silence.begin(url, now)
                self._missed.begin(url, now)
            raise


def push(url: str, secret: str, body: dict[str, Any], *, client: httpx.Client | None = None) -> Report:
    """Set the routes; the router has them when this returns. Raises RemoteError."""
    return _call("PUT", f"{url}/routes", secret, body, WRITE_SECONDS, client)


def pusher(settings: Settings) -> Callable[[Order], None]:  # noqa: ARG001  # the driver's seam
    """Make what the driver calls for each wanted change. It raises RemoteError."""

    def send(order: Order) -> None:
        push(order.url, order.token, order.body)

    return send


def _call(
    method: str, url: str, secret: str, body: dict[str, Any] | None, seconds: float, client: httpx.Client | None
) -> Report:
    try:
        said = ask(
            client or shared(),
            method,
            url,
            json=body,
            headers={"authorization": f"Bearer {secret}"},
            seconds=seconds,
            connect=READ_SECONDS,
            limit=BODY_MAX,
        )
        if said.status == httpx.codes.UNAUTHORIZED:
            raise TokenRefusedError(f"The router's agent at {url} refuses the operator's token.")
        if said.status != httpx.codes.OK:
            words = said.body.decode(errors="replace")[:300]
            raise RemoteError(f"The router's agent at {url} answered with HTTP {said.status}: {words}")
        return Report.model_validate_json(said.body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RemoteError(f"The router's agent at {url} does not answer: {error or type(error).__name__}") from error
    except (TooMuchError, ValidationError) as error:
        raise RemoteError(f"The router's agent at {url} gave an answer that is none.") from error
