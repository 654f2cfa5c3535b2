"""A load generator that others wrote, and what it counts against what the server counts."""

import json
import subprocess
from pathlib import Path

from server_harness import Server, wait_for


def test_locust_and_the_server_count_the_same(server: Server, programs: Path) -> None:
    def answered() -> float:
        return server.metric("vllm:request_success_total", finished_reason="length")

    before = answered()
    command = [
        *(str(programs / "locust"), "-f", str(Path(__file__).with_name("locust_users.py")), "--headless"),
        *("--host", server.url, "-u", "16", "-r", "16", "-t", "8s", "--stop-timeout", "20"),
        "--json",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    told = {entry["name"]: entry for entry in json.loads(ran.stdout)}
    assert [told[name]["num_failures"] for name in ("whole", "stream")] == [0, 0]
    assert min(told[name]["num_requests"] for name in ("whole", "stream")) > 20
    total = sum(entry["num_requests"] for entry in told.values())
    wait_for(lambda: answered() - before == total, "counted")
    assert server.idle
    assert "Traceback" not in server.log.read_text()
