"""Web pages that use the API from the browser, which asks before it lets them."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from server_harness import Server

PAGE = "https://chat.example.com"
KEY = {"authorization": "Bearer sesame"}
QUESTION = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
CHAT = "/v1/chat/completions"


def allowed(answer: httpx.Response) -> str | None:
    return answer.headers.get("access-control-allow-origin")


def test_pages_of_listed_origins_may_ask_and_read_every_answer(start: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    server = start("--api-keys-dir", str(tmp_path / "key"), "--allowed-origins", f"http://localhost:3000, {PAGE}")
    asked = server.http.options(CHAT, headers={"origin": PAGE, **QUESTION})  # a browser sends no key with it
    assert (asked.status_code, asked.content, allowed(asked)) == (204, b"", PAGE)
    assert asked.headers["access-control-allow-methods"] == "GET, POST"
    assert asked.headers["access-control-allow-headers"] == QUESTION["access-control-request-headers"]
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    page = {"origin": PAGE}
    for answer, status in (
        (server.http.post(CHAT, json=ask, headers={**page, **KEY}), 200),
        (server.http.post(CHAT, json={**ask, "stream": True}, headers={**page, **KEY}), 200),
        (server.http.post(CHAT, json={}, headers={**page, **KEY}), 400),
        (server.http.post(CHAT, json=ask, headers=page), 401),
        (server.http.get("/v1/nothing", headers={**page, **KEY}), 404),
    ):
        assert (answer.status_code, allowed(answer)) == (status, PAGE)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "origin"
    for origin in ("https://other.example.com", "null", PAGE + ":8443"):
        assert allowed(server.http.options(CHAT, headers={"origin": origin, **QUESTION})) is None
        assert allowed(server.http.post(CHAT, json=ask, headers={"origin": origin, **KEY})) is None
    assert server.http.options(CHAT, headers=page).status_code == 401  # no browser's question
    assert allowed(server.http.get("/metrics", headers=page)) is None


def test_a_star_allows_pages_of_all_origins(start: Callable[..., Server]) -> None:
    server = start("--allowed-origins", "*")
    assert allowed(server.http.options(CHAT, headers={"origin": PAGE, **QUESTION})) == "*"
    assert allowed(server.http.get("/v1/models", headers={"origin": PAGE})) == "*"


@pytest.mark.parametrize("headers", [{"origin": PAGE}, {"origin": PAGE, **QUESTION}])
def test_no_page_is_allowed_unless_it_is_set(server: Server, headers: dict[str, str]) -> None:
    answer = server.http.options(CHAT, headers=headers)
    assert (answer.status_code, allowed(answer)) == (405, None)
