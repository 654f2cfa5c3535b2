"""Users for locust: whole answers and streams, by its own HTTP client."""

import json

from locust import HttpUser, task

ASK = {"model": "tiny", "prompt": "The printer", "max_tokens": 20, "ignore_eos": True, "temperature": 0}


class User(HttpUser):
    @task
    def whole(self) -> None:
        with self.client.post("/v1/completions", json=ASK, name="whole", catch_response=True) as answer:
            if answer.json()["usage"]["completion_tokens"] != 20:
                answer.failure("not the answer that was asked for")

    @task
    def stream(self) -> None:
        ask = {**ASK, "stream": True}
        with self.client.post("/v1/completions", json=ask, name="stream", stream=True, catch_response=True) as answer:
            lines = [line for line in answer.iter_lines() if line]
            if lines[-1] != b"data: [DONE]" or "error" in json.loads(lines[-2][6:]):
                answer.failure("the stream broke off")
