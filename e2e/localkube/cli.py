"""Command line: one line per command, no tracebacks for failures that can be expected."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from localkube import bare, build, cluster, packages, paths, venv
from localkube.say import Failure, step

# What su, sudo and cron leave out of the PATH: root's programs, and the place that go.dev says to unpack Go to.
LEFT_OUT = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/go/bin")


def main(argv: list[str] | None = None) -> int:
    os.umask(0o022)  # what daemons, builds and pods of other users have to read does not hang on the shell's
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = no_proxy(os.environ)
    os.environ["KUBECTL_KUBERC"] = "false"  # the user's own flags: a `delete` that asks back would delete nothing
    os.environ["PATH"] = search_path(os.environ)
    os.environ.setdefault("HOME", str(Path.home()))  # Go and buildah ask for it, and no other place
    arguments = _parser().parse_args(argv)
    try:
        return _dispatch(arguments)
    except Failure as failure:
        print(failure.report(), file=sys.stderr)
        return 1
    except OSError as problem:
        # A full disk, a folder of another user: the system's own words name what, and mostly where.
        print(Failure(f"{arguments.command}: {problem}").report(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; running the same command again goes on from here", file=sys.stderr)
        return 130


def no_proxy(environment: Mapping[str, str]) -> str:
    """What is reached without the machine's proxy: what the user says, loopback, and the node's networks.

    One value for both spellings: Go's programs go by the upper case first, Python and curl by the lower.
    """
    said = [each for name in ("NO_PROXY", "no_proxy") for each in environment.get(name, "").split(",") if each]
    return ",".join(dict.fromkeys([*said, "localhost", "127.0.0.1", paths.POD_CIDR, paths.SERVICE_CIDR]))


def search_path(environment: Mapping[str, str]) -> str:
    """The PATH with the folders that lack in it: dpkg and iptables lie there, and mostly Go."""
    said = environment.get("PATH", os.defpath).split(":")
    return ":".join([*said, *(folder for folder in LEFT_OUT if folder not in said)])


def _dispatch(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "up":
            cluster.up()
        case "down":
            cluster.down(purge=arguments.purge)
        case "status":
            return cluster.status()
        case "build":
            build.ensure(*arguments.names)
            step("done")
        case "load":
            for target in arguments.targets:
                build.load(target)
        case "debs":
            packages.ensure(packages.TESTS)
        case "venv":
            venv.ensure()
        case "apiserver":
            bare.sweep(paths.LOCAL)
            owner = arguments.owner
            print(bare.up(bare.owned(paths.LOCAL, owner) if owner else arguments.dir.resolve(), owner))
        case "apiserver-down":
            bare.down(bare.owned(paths.LOCAL, arguments.owner) if arguments.owner else arguments.dir.resolve())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="localkube", description="A single-node Kubernetes on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="bring the cluster up; does nothing when it is up and healthy")
    down = commands.add_parser("down", help="take everything off the machine but the caches")
    down.add_argument("--purge", action="store_true", help="remove the caches as well")
    commands.add_parser("status", help="say what runs; exit code 1 when the cluster is not healthy")
    built = commands.add_parser("build", help="build images and load them onto the node")
    built.add_argument("names", nargs="*", metavar="NAME", help="default: all that have a Dockerfile")
    loaded = commands.add_parser("load", help="load built images onto the node")
    loaded.add_argument("targets", nargs="+", metavar="NAME|IMAGE")
    commands.add_parser("debs", help="install the Debian packages that the tests on this machine use")
    commands.add_parser("venv", help="make the virtual environment of the tests and tools, unless it is there")
    for name, text in [
        ("apiserver", "start etcd and an API server alone; prints the path of its kubeconfig"),
        ("apiserver-down", "stop what `apiserver` started in that folder"),
    ]:
        command = commands.add_parser(name, help=text)
        where = command.add_mutually_exclusive_group()
        where.add_argument("--dir", type=Path, default=paths.LOCAL / "apiserver")
        where.add_argument("--owner", type=int, metavar="PID", help="in .local/apiserver-PID, swept once PID is gone")
    return parser
