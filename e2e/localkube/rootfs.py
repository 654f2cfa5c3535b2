"""What images start from when no hub is in reach: Debian's own packages."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from localkube import images, paths, shell
from localkube.say import Failure, step

PUBLIC_MIRROR = "http://deb.debian.org/debian"
SUITE = "trixie"
SOURCES = "/etc/apt/sources.list.d/debian.sources"


def context(name: str) -> Path | None:
    """The build context of an image that is not made from the repo's files alone."""
    if name == "pause":
        folder = paths.WORK / "pause"
        folder.mkdir()
        shutil.copy2("/usr/bin/catatonit", folder / "catatonit")
        return folder
    if name == "base":
        return _base()
    return None


def host_sources() -> Path | None:
    """An apt source file for RUN steps, where this machine has a mirror of its own."""
    mirror = host_mirror()
    if mirror == PUBLIC_MIRROR:
        return None
    file = paths.WORK / "debian.sources"
    file.write_text(sources(mirror))
    return file


def host_mirror() -> str:
    """The Debian mirror this machine is set up to use."""
    listed = shell.attempt("apt-get", "indextargets", "--format", "$(ORIGIN)|$(REPO_URI)", "Created-By: Packages")
    for line in listed.stdout.splitlines():
        origin, _, uri = line.partition("|")
        if origin == "Debian" and re.search(r"/debian/?$", uri):
            return uri.rstrip("/")
    return PUBLIC_MIRROR


def sources(mirror: str) -> str:
    security = re.sub(r"/debian$", "/debian-security", mirror)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    return "\n".join(
        f"Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\nSigned-By: {keyring}\n"
        for uri, suites in [(mirror, f"{SUITE} {SUITE}-updates"), (security, f"{SUITE}-security")]
    )


def _base() -> Path:
    folder = paths.WORK / "base"
    folder.mkdir()
    packages = (paths.REPO / "images" / "base" / "packages.txt").read_text().split()
    step(f"base: installing Debian {SUITE} into a folder")
    public = folder / "public.sources"
    public.write_text(sources(PUBLIC_MIRROR))
    used = folder / "used.sources"
    used.write_text(sources(host_mirror()))
    shell.run(
        "mmdebstrap", "--mode=root", "--variant=apt", "--format=tar",
        f"--include={','.join(packages)}",
        "--aptopt=Apt::Install-Recommends false",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        # Whatever mirror this machine uses, the image names the public one.
        '--customize-hook=rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/*',
        f"--customize-hook=copy-in {public} /etc/apt/sources.list.d",
        f'--customize-hook=mv "$1"/etc/apt/sources.list.d/public.sources "$1"{SOURCES}',
        SUITE, folder / "rootfs.tar", used,
        env={"TMPDIR": str(paths.WORK / "tmp"), "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "0")},
        log=paths.LOG / "build-rootfs.log",
        doing="mmdebstrap",
        hint=f"check that {host_mirror()} is reachable",
    )  # fmt: skip
    if not (folder / "rootfs.tar").exists():
        raise Failure(f"mmdebstrap made no root file system for {images.reference('base')}")
    return folder
