"""Debian packages: installed with no service started or enabled, also where an earlier apt was interrupted."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from localkube import paths, shell
from localkube.say import Failure, step

# invoke-rc.d and deb-systemd-invoke ask this program before they start anything; 101 means no.
POLICY = Path("/usr/sbin/policy-rc.d")
NO_SERVICES = "#!/bin/sh\n# Until slmops has installed its packages.\nexit 101\n"
# deb-systemd-helper enables a new package's services, so that the next boot starts them, unless a preset says no.
# The first file in the order of their names decides; below /run none outlives a boot.
PRESET = Path("/run/systemd/system-preset/00-slmops-localkube.preset")
LOCK_SECONDS = 180.0

# Debian package -> the program or file that shows it is there, whoever brought it.
NODE = {
    "ca-certificates": "/etc/ssl/certs/ca-certificates.crt",
    "openssl": "openssl",
    "iproute2": "ip",
    "mount": "umount",
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ethtool": "ethtool",
    "socat": "socat",
    "catatonit": "/usr/bin/catatonit",
    "mmdebstrap": "mmdebstrap",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "buildah": "buildah",
    "skopeo": "skopeo",
}
TESTS = {
    "docker-registry": "docker-registry",
    "apache2-utils": "htpasswd",
    "haproxy": "haproxy",
    "skopeo": "skopeo",
}


def ensure(wanted: Mapping[str, str]) -> None:
    """Install the packages whose proof is missing; take back what a killed installation left. Raises Failure."""
    missing = [package for package, proof in wanted.items() if not present(proof)]
    if missing:
        install(missing)
    elif os.geteuid() == 0 and _forbidden(POLICY, PRESET):
        with shell.locked(paths.APT_LOCK):
            allow_services(POLICY, PRESET)


def present(proof: str) -> bool:
    if proof.startswith("/"):
        return Path(proof).exists()
    return any(
        (Path(folder) / proof).exists() for folder in ("/usr/local/bin", "/usr/bin", "/usr/sbin", "/bin", "/sbin")
    )


def install(names: Iterable[str]) -> None:
    """`apt-get install`, after mending what stops it. Nothing is removed from the machine. Raises Failure."""
    wanted = list(names)
    if shutil.which("apt-get") is None:
        raise Failure(
            f"missing: {', '.join(wanted)}, and this machine has no apt-get",
            hint="use Debian 12 or newer, or a cluster you have: CLUSTER=current",
        )
    if os.geteuid() != 0:
        raise Failure(f"missing: {', '.join(wanted)}", hint=f"as root: apt-get install {' '.join(wanted)}")
    step(f"installing {', '.join(wanted)}")
    # --no-remove: Docker's own containerd package, for example, may not have to go.
    command = ["apt-get", "install", "--yes", "--no-install-recommends", "--no-remove", *wanted]
    with shell.locked(paths.APT_LOCK), _no_services():
        deadline, tried = time.monotonic() + LOCK_SECONDS, set[str]()
        while True:
            try:
                _run(*command, hint=f"mend that, or install by hand: apt-get install {' '.join(wanted)}")
            except Failure as failure:
                mended = remedy(paths.LOG.joinpath("apt.log").read_text(errors="replace"))
                if not mended or mended in tried or time.monotonic() > deadline:
                    raise failure from None
                if mended == "wait":
                    step("another apt or dpkg is at work; waiting for it")
                    time.sleep(5)
                    continue
                tried.add(mended)
                _run(*mended.split(), hint="mend that and run again")
            else:
                return


def remedy(output: str) -> str:
    """What helps after apt-get failed with this output: "wait", a command, or nothing."""
    if "Could not get lock" in output or "is held by process" in output:
        return "wait"
    if "dpkg was interrupted" in output or "dpkg --configure -a" in output:
        return "dpkg --configure -a"
    if any(words in output for words in ("Unable to locate", "no installation candidate", "Failed to fetch")):
        return "apt-get update"
    if "--fix-broken" in output:
        return "apt-get install --yes --fix-broken --no-remove"
    return ""


def _run(*command: str, hint: str) -> None:
    env = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    shell.run(*command, env=env, log=paths.LOG / "apt.log", doing=" ".join(command[:2]), hint=hint)


@contextmanager
def _no_services(policy: Path = POLICY, preset: Path = PRESET) -> Iterator[None]:
    """New services stay stopped and disabled; the machine's own policy comes back afterwards."""
    allow_services(policy, preset)
    if policy.exists():
        policy.rename(_kept(policy))
    policy.write_text(NO_SERVICES)
    policy.chmod(0o755)
    preset.parent.mkdir(parents=True, exist_ok=True)
    preset.write_text("disable *\n")
    try:
        yield
    finally:
        allow_services(policy, preset)


def clean() -> None:
    """What an installation that was killed left."""
    with shell.locked(paths.APT_LOCK):
        allow_services()
        paths.APT_LOCK.unlink()


def allow_services(policy: Path = POLICY, preset: Path = PRESET) -> None:
    """Put the machine's own policy back, also after a run that was killed."""
    preset.unlink(missing_ok=True)
    if _kept(policy).exists():
        _kept(policy).replace(policy)
    elif _is_ours(policy):
        policy.unlink()


def _forbidden(policy: Path, preset: Path) -> bool:
    return preset.exists() or _kept(policy).exists() or _is_ours(policy)


def _is_ours(policy: Path) -> bool:
    return policy.exists() and policy.read_text(errors="replace") == NO_SERVICES


def _kept(policy: Path) -> Path:
    return policy.with_name(f"{policy.name}.before-slmops")
