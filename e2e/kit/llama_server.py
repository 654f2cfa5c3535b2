"""llama.cpp's own server, as the xllamacpp wheel holds it, set as it is fastest here.

python llama_server.py MODEL PORT THREADS SLOTS: it answers on that port until killed.

Each slot has the whole context and a cache of its own (one for all makes every row look at all rows' cells). Prompts
are not kept: those of the benchmark are all different.
"""

import json
import sys
import threading
from pathlib import Path

import xllamacpp


def main() -> None:
    """Serve."""
    folder, port, threads, slots = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.hostname, params.port = "127.0.0.1", port
    params.n_parallel, params.kv_unified = slots, False
    params.n_ctx = slots * json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt, params.cache_ram_mib = False, 0
    params.ui, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main()
