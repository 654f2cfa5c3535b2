"""The server installed by pip as a package of its own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
from server_harness import TINY, free_ports, wait_for

SOURCE = Path(__file__).parents[2] / "images/server"


def test_the_package_brings_the_command_which_serves(tmp_path: Path) -> None:
    """Its dependencies are those of this environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs, (port,) = tmp_path / "venv/bin", free_ports(1)
    pip = [programs / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, SOURCE], check=True)
    command = [programs / "slmops-server", "--model", TINY, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    with subprocess.Popen(command, env=env, cwd=tmp_path) as server:
        try:
            asked = {"model": TINY.name, "prompt": "The printer", "max_tokens": 3}
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: server.poll() is not None or httpx.get(f"{url}/readyz").status_code == 200, "it is ready")
            answer = httpx.post(f"{url}/v1/completions", json=asked)
            assert answer.json()["usage"]["completion_tokens"] == 3
        finally:
            server.terminate()
    assert server.returncode == 0
