"""The server installed by pip as a package of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
from server_harness import TINY, free_ports, wait_for

SOURCE = Path(__file__).parents[2] / "images/server"
WHERE = "import importlib.util as u; print(u.find_spec('slmops_kernels').origin)"  # as the server looks for it
COMPILED = sysconfig.get_platform() == "linux-x86_64" and (shutil.which("cc") or shutil.which("gcc"))


def test_the_package_brings_the_command_which_serves(tmp_path: Path) -> None:
    """Its dependencies are those of this environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs, (port,) = tmp_path / "venv/bin", free_ports(1)
    pip = [programs / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, SOURCE], check=True)
    if COMPILED:
        where = subprocess.run([programs / "python", "-c", WHERE], check=True, capture_output=True, text=True).stdout
        assert Path(where).is_relative_to(tmp_path)
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


def test_without_a_compiler_the_package_is_for_any_platform_and_the_build_says_why(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "wheel", "-v", "--disable-pip-version-check", "--no-deps"]
    env = {**os.environ, "CC": "no-such-compiler"}
    built = subprocess.run([*pip, "-w", tmp_path, SOURCE], env=env, check=True, capture_output=True, text=True)
    assert [path.name.split("-", 2)[2] for path in tmp_path.glob("*.whl")] == ["py3-none-any.whl"]
    why = "no C compiler no-such-compiler" if sysconfig.get_platform() == "linux-x86_64" else "are for linux-x86_64"
    assert why in built.stderr
