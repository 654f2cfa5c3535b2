"""Runs in a pod of the trainer image: the tiny artifacts as repositories of a server that speaks the Hub's HTTP API.

    python serve_hub.py oci://registry/e2e        tiny/base, private: token hf_good; datasets/tiny/data, public

The server is tests/artifacts/hub.py, mounted beside this file.
"""

import socket
import sys
import threading
from pathlib import Path

import hub

from slmops_artifacts import pull

ROOT = Path("/tmp/hub")


def main(store: str) -> None:
    pull(f"{store}/base:tiny", ROOT / "tiny/base")
    pull(f"{store}/data:tiny", ROOT / "datasets/tiny/data")
    # Large files are redirected to a second port of the same address: it has to be one that other pods reach.
    address = socket.gethostbyname(socket.gethostname())
    with hub.Hub(8000, address) as server:
        hub.load(server, ROOT)
        server.repositories["model", "tiny/base"].private = True
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
