"""The command line: `python -m slmops_artifacts pull | push | resolve | show | delete`.

Exit codes: 0 done; 1 it may work in another try; 2 wrong usage; 3 it will not work until somebody mends it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import ArtifactError, Manifest, delete, pull, push, read_manifest, resolve

TERMINATION_LOG = "/dev/termination-log"
_LOG_LIMIT = 4000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors are one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except ArtifactError as failure:
        error = failure.from_secret(args.secret_name)
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        _tell_kubernetes(args.termination_log, error)
        return exit_code(error)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where this one stopped.", file=sys.stderr)
        return 130


def exit_code(error: ArtifactError) -> int:
    """Return the exit code for a failure."""
    return 1 if error.retryable else 3


def _run(args: argparse.Namespace) -> int:
    secret = _secret(args.secret_dir)
    match args.command:
        case "pull":
            manifest = pull(args.uri, args.dest, secret=secret, progress=_Meter("Pulled"))
            print(manifest.digest)
        case "push":
            uri, manifest = push(args.src, args.uri, _describe(args), secret=secret, progress=_Meter("Pushed"))
            print(uri)
        case "resolve":
            print(_resolve(args.uri, secret))
        case "delete":
            digest = _resolve(args.uri, secret)
            if not delete(args.uri, secret=secret):
                raise ArtifactError("Refused", f"The store of {args.uri} allows no removal. Allow it there.")
            print(digest)
        case _:
            found = read_manifest(args.uri, secret=secret)
            if found is None:
                raise ArtifactError("SourceNotFound", f"There is nothing at {args.uri}.")
            print(found.model_dump_json(indent=2))
    return 0


def _resolve(uri: str, secret: dict[str, str] | None) -> str:
    digest = resolve(uri, secret=secret)
    if digest is None:
        raise ArtifactError("SourceNotFound", f"There is nothing at {uri}.")
    return digest


def _describe(args: argparse.Namespace) -> Manifest:
    """Make the manifest of a push from the options; parents are looked up, so that the lineage is complete."""
    manifest = Manifest(kind=args.kind, format=args.format)
    if args.manifest:
        try:
            manifest = Manifest.model_validate_json(args.manifest.read_bytes())
        except (OSError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ArtifactError("BadUri", f"Cannot read the manifest {args.manifest}: {line}.") from None
    for uri in args.parent:
        ancestor = read_manifest(uri, secret=_secret(args.secret_dir))
        if ancestor is None:
            raise ArtifactError("SourceNotFound", f"The parent {uri} does not exist. Push it first.")
        manifest = manifest.derived_from(uri, ancestor)
    return manifest


def _secret(folder: Path | None) -> dict[str, str] | None:
    """Read the keys of a mounted Secret: one file each."""
    if folder is None:
        return None
    try:
        return {item.name: item.read_text() for item in folder.iterdir() if item.is_file()}
    except (OSError, UnicodeDecodeError):
        raise ArtifactError("AccessDenied", f"Cannot read the Secret mounted at {folder}. Check the mount.") from None


class _Meter:
    """Prints progress: in place on a terminal, else one line now and then."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._live = sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + (0.0 if self._live else 5.0)

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now < self._next:
            return
        self._next = now + (0.2 if self._live else 5.0)
        percent = 100 * done // total if total else 100
        text = f"{self._verb} {done / 2**20:.1f} of {total / 2**20:.1f} MiB ({percent} %, {now - self._start:.0f} s)"
        print(
            f"\r{text}" if self._live else text,
            end="" if self._live and done < total else "\n",
            file=sys.stderr,
        )


def _tell_kubernetes(path: str, error: ArtifactError) -> None:
    """Write the failure where the kubelet picks it up, if there is such a place."""
    if not path or (path == TERMINATION_LOG and not os.access(path, os.W_OK)):
        return
    message = error.message
    while len(text := json.dumps({"reason": error.reason, "message": message}).encode()) > _LOG_LIMIT:
        message = message[: len(message) * 3 // 4]
    try:
        Path(path).write_bytes(text)
    except OSError as problem:
        print(f"Cannot write {path}: {problem.strerror}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slmops_artifacts", description="Move models and data by content.")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--secret-dir", type=Path, help="folder of a mounted Secret with credentials")
    shared.add_argument("--secret-name", default="", help="what that Secret is called, for messages")
    shared.add_argument("--termination-log", default=TERMINATION_LOG, help="file that gets reason and message")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pull", parents=[shared], help="bring an artifact to a folder")
    one.add_argument("uri")
    one.add_argument("dest", type=Path)
    one = commands.add_parser("push", parents=[shared], help="publish a folder")
    one.add_argument("src", type=Path)
    one.add_argument("uri")
    one.add_argument("--kind", choices=("model", "dataset", "checkpoint"), default="model")
    one.add_argument("--format", default="", help="found out from the files when left out")
    one.add_argument("--parent", action="append", default=[], metavar="URI", help="an ancestor; may be repeated")
    one.add_argument("--manifest", type=Path, help="JSON file with recipe, metrics, versions and so on")
    one = commands.add_parser("resolve", parents=[shared], help="print the digest that a URI means now")
    one.add_argument("uri")
    one = commands.add_parser("show", parents=[shared], help="print the manifest of an artifact")
    one.add_argument("uri")
    one = commands.add_parser("delete", parents=[shared], help="remove an artifact, with every tag on its content")
    one.add_argument("uri")
    return parser
