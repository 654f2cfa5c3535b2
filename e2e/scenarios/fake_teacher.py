"""Runs in a pod: a scripted teacher for the tiny task, behind /v1/chat/completions. Standard library only.

    python fake_teacher.py [garbage | down-after N]

`garbage`: every answer is HTML under status 200. `down-after N`: after N answers connections are cut. Either lasts
until GET /revive. GET /asked gives {"<question>": times it was answered}.
"""

import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

COLOURS = ["red", "green", "blue", "black", "white", "yellow", "pink", "brown"]
SHAPES = ["box", "ball", "cone", "ring", "plate", "stick"]


class World:
    """What the handlers share."""

    lock = threading.Lock()
    asked: ClassVar[Counter[str]] = Counter()
    garbage = sys.argv[1:2] == ["garbage"]
    left = int(sys.argv[2]) if sys.argv[1:2] == ["down-after"] else 1 << 30  # answers until it is down


class Teacher(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with World.lock:
            if World.left <= 0:
                self.close_connection = True
                return
            World.left -= 1
            World.asked[question] += 1
        if World.garbage:
            self.reply(b"<html>Welcome to the captive portal</html>")
            return
        words = question.replace(",", " ").split()
        colour = next((word for word in words if word in COLOURS), "")
        shape = next((word for word in words if word in SHAPES), "")
        message = {"role": "assistant", "content": json.dumps({"colour": colour, "shape": shape})}
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18},
        }
        self.reply(json.dumps(answer).encode())

    def do_GET(self) -> None:
        with World.lock:
            if self.path == "/revive":
                World.left, World.garbage = 1 << 30, False
            self.reply(json.dumps(World.asked).encode())

    def reply(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Stay silent."""


if __name__ == "__main__":
    ThreadingHTTPServer(("", 8000), Teacher).serve_forever()
