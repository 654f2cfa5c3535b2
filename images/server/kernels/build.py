"""Compile the operators beside this file into the library that onnxruntime loads.

python3 build.py OUT.so
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
PLATFORM = "linux-x86_64"
# For any such CPU: what a function needs beyond that it says itself, and it is called where the CPU has it.
OPTIONS = ("-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=default")


class Failed(Exception):  # noqa: N818  # reads as what happened
    """There is no library; the message says why."""


def compiler() -> list[str]:
    """The command that CC names, or the system's. Raises Failed without one."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"]]:
        if shutil.which(command[0]):
            return command
    raise Failed(f"there is no C compiler {named[0]} (from CC)" if named else "there is no C compiler, cc or gcc")


def build(out: Path) -> None:
    """Write the library, whole or not at all. Raises Failed, OSError."""
    if (here := sysconfig.get_platform()) != PLATFORM:
        raise Failed(f"the operators are for {PLATFORM}, this is {here}")
    command = [*compiler(), *OPTIONS, *map(str, sorted(SOURCES.glob("*.c")))]
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / out.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
        made.replace(out)


def main() -> int:
    """0 when the library is there."""
    if len(sys.argv) != 2:
        print("usage: python3 build.py OUT.so", file=sys.stderr)
        return 2
    try:
        build(Path(sys.argv[1]))
    except (Failed, OSError) as error:
        print(f"failed: {sys.argv[1]} was not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
