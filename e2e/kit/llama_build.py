"""llama.cpp's own server, compiled for this machine's CPU, as its users do who want it fast.

Made once and kept below .local. The source comes with the package llama-cpp-python, which holds all of llama.cpp.
"""

import sys
import tarfile
from pathlib import Path

from kit.serving_models import kept, python
from localkube import packages
from localkube.say import step
from localkube.shell import run

OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def llama_server() -> Path:
    """The program. Failure where it cannot be made."""
    return kept("llama", "llama.txt", _build) / "build" / "bin" / "llama-server"


def _build(folder: Path, requirements: Path) -> None:
    packages.ensure({"g++": "g++"})
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    run(*pip, "--require-hashes", "--no-binary=:all:", "-d", folder, "-r", requirements, doing="llama.cpp's source")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    cmake, source, build = python().with_name("cmake"), next(folder.glob("*/vendor/llama.cpp")), folder / "build"
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    options.append(f"-DCMAKE_MAKE_PROGRAM={python().with_name('ninja')}")
    run(cmake, "-G", "Ninja", "-S", source, "-B", build, *options, log=folder / "configure.log")
    step("compiling llama.cpp's server for this CPU, some ten minutes on two cores")
    run(cmake, "--build", build, "--target", "llama-server", log=folder / "build.log", doing="compiling llama.cpp")
