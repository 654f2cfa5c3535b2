"""Removing folders that may still have something mounted below them."""

from __future__ import annotations

import shutil
from pathlib import Path

from localkube import shell
from localkube.say import Failure


def below(folder: Path) -> list[str]:
    """Mount points under a folder, deepest first."""
    real = folder.resolve()
    lines = Path("/proc/mounts").read_text().splitlines()
    places = (line.split()[1].replace("\\040", " ") for line in lines)
    return sorted((place for place in places if place.startswith(f"{real}/")), reverse=True)


def remove(folder: Path) -> None:
    """Unmount, then delete: never the other way round, a mount may be a part of the machine."""
    for place in below(folder):
        if shell.attempt("umount", place).returncode:
            shell.attempt("umount", "--lazy", place)
    left = below(folder)
    if left:
        raise Failure(f"could not unmount {left[0]}", hint="see which process holds it, end it and run again")
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise Failure(f"could not remove {folder}", hint="see which process still writes there")
