"""Commands side by side: what waits in one lane leaves the CPUs to another.

python -m kit.lanes COMMAND [-- COMMAND ...] [/ COMMAND [-- COMMAND ...]]...

`--` goes on in a lane, `/` begins the next one. Each command's output goes into a log below .local/lanes; on the screen
are its last line when it ends, the end of its log when it fails, and once a minute what runs. After a failure no
command is begun, those that run go on to their end. A terminal's Ctrl-C reaches all of them; SIGTERM is passed on.
What earlier runs left on the local node is removed first, and until the end no demo begins.
"""

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from kit import earlier
from kit.alone import BusyError
from kit.kubectl import LOCAL, KubectlError

TELL_SECONDS = 60.0
SHOWN_LINES = 200  # of the log of what failed
Command = Sequence[str]


def parse(arguments: Iterable[str]) -> list[list[list[str]]]:
    """The lanes, each a list of commands."""
    return [_split(lane, "--") for lane in _split(arguments, "/")]


def _split(arguments: Iterable[str], at: str) -> list[list[str]]:
    return [list(group) for is_mark, group in groupby(arguments, lambda one: one == at) if not is_mark]


@dataclass
class Lanes:
    """One run. `say` gets whole lines."""

    folder: Path
    say: Callable[[str], None]
    keep: tuple[int, ...] = ()  # open files that the commands hold too: they may outlive a run that is killed
    began: float = field(default_factory=time.monotonic)
    failed: list[str] = field(default_factory=list)
    stopping: bool = False
    _running: dict[int, tuple[str, "subprocess.Popen[bytes]"]] = field(default_factory=dict)
    # Its owner may be interrupted by a signal whose handler takes it too.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def run(self, lanes: Sequence[Sequence[Command]]) -> bool:
        """Whether all succeeded. KeyboardInterrupt: after what ran has ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        threads = [threading.Thread(target=self._lane, args=(number, lane)) for number, lane in enumerate(lanes, 1)]
        for thread in threads:
            thread.start()
        try:
            told = self.began
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.2)
                if time.monotonic() - told > TELL_SECONDS:
                    told = time.monotonic()
                    self._tell("still running: " + "; ".join(name for name, _ in list(self._running.values())))
        except KeyboardInterrupt:
            self.stopping = True
            for thread in threads:
                while thread.is_alive():
                    with suppress(KeyboardInterrupt):  # another one hurries the commands, which have it too
                        thread.join()
            raise
        return not self.failed

    def _lane(self, number: int, commands: Sequence[Command]) -> None:
        for place, command in enumerate(commands, 1):
            if self.failed or self.stopping:
                return
            try:
                self._one(number, command, self.folder / f"{number}-{place}.log")
            except OSError as error:
                self.failed.append(shlex.join(command))
                self._tell(f"failed: {shlex.join(command)}: {error}")

    def _one(self, lane: int, command: Command, log: Path) -> None:
        name, began = shlex.join(command[-3:]), time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, pass_fds=self.keep
            )
        with self._lock:
            self._running[lane] = (name, process)
            if self.stopping:  # since the lane looked
                process.send_signal(signal.SIGINT)
        code = process.wait()
        with self._lock:
            del self._running[lane]
        lines = log.read_text(errors="replace").splitlines()
        took = f"{time.monotonic() - began:.0f} s"
        if code == 0:
            self._tell(f"{name}: {lines[-1] if lines else 'done'} ({took})")
            return
        self.failed.append(name)
        for line in lines[-SHOWN_LINES:]:
            self.say(line)
        self._tell(f"failed: {shlex.join(command)}: exit status {code} after {took}\n  its log: {log}")

    def stop(self) -> None:
        """Interrupt what runs, begin nothing more."""
        with self._lock:
            self.stopping = True
            for _, process in self._running.values():
                process.send_signal(signal.SIGINT)

    def _tell(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        self.say(f"[{minutes:2d}:{seconds:02d}] {text}")


def main() -> int:
    """The exit code."""
    lanes = Lanes(LOCAL / "lanes", lambda text: print(text, flush=True))

    def terminated(number: int, frame: object) -> None:
        again = lanes.stopping
        lanes.stop()
        if not again:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    # What a script starts with `&` ignores SIGINT, and so would the commands. One with a handler is not handed down.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with earlier.beside_nothing() as lock:
            lanes.keep = (lock,)
            done = lanes.run(parse(sys.argv[1:]))
    except (BusyError, KubectlError, OSError) as problem:
        print(f"failed: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
