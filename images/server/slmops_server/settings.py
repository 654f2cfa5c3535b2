"""What can be set: every option as a flag and as an environment variable SLMOPS_SERVER_<OPTION>."""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ENGINES = ("auto", "onnxruntime", "genai", "openvino", "llamacpp")
LOG_LEVELS = ("debug", "info", "warning", "error")
PREFIX = "SLMOPS_SERVER_"
GUESSES_MAX = 16
ADAPTER_NAME = 256  # characters
# As browsers send it: without a slash at its end, web hosts in small letters and without the scheme's own port
ORIGIN = re.compile(
    r"\*|(?!http:.*:80$|https:.*:443$)https?://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[1-9][0-9]*)?"
    r"|(?!https?:)[a-z][a-z0-9+.-]*://[^/\s]+"
)
LARGEST = (1 << 63) - 1  # whole number that the front can tell the engine


@dataclass(frozen=True)
class Settings:
    """All options, checked. Times are seconds, sizes are bytes, lengths are tokens; 0 means "work it out"."""

    model: Path
    served_names: tuple[str, ...]
    host: str = ""  # all addresses, IPv4 and IPv6: a server in a pod listens to the pod's network
    port: int = 8000
    metrics_port: int = 0
    engine: str = "auto"
    threads: int = 0
    slots: int = 0
    max_model_len: int = 0
    prefill_chunk: int = 128
    speculate: int = 0
    max_queue: int = 64
    max_queue_tokens: int = 0
    max_body_bytes: int = 4 << 20
    max_connections: int = 0
    receive_timeout: float = 30.0
    send_timeout: float = 30.0
    keep_alive: float = 75.0
    adapters: tuple[tuple[str, Path], ...] = ()
    adapter_root: Path | None = None
    api_keys_dir: Path | None = None
    allowed_origins: tuple[str, ...] = ()
    drain_grace: float = 5.0
    step_timeout: float = 120.0
    log_level: str = "info"


def _one_of(words: Sequence[str]) -> Callable[[str], str]:
    """Not argparse's `choices`, which lets anything come from the environment."""

    def convert(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return convert


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # so Python shows bytes of the command line and of the environment that are no text
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


def _path(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise argparse.ArgumentTypeError("no folder is given")
    return Path(_text(text))


def _whole(text: str, most: int = LARGEST) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 0 to {most}")
    return value


def _guesses(text: str) -> int:
    value = _whole(text)
    if value > GUESSES_MAX:
        raise argparse.ArgumentTypeError(f"more than {GUESSES_MAX} tokens are never guessed right")
    return value


def _origins(text: str) -> tuple[str, ...]:
    origins = tuple(origin for origin in (part.strip() for part in text.split(",")) if origin)
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise argparse.ArgumentTypeError(
                f"{origin!r} is neither * nor an origin as browsers send it, as in https://chat.example.com: "
                "small letters, nothing after host and port, and no port where it is 80 of http or 443 of https"
            )
    return origins


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _timeout(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 seconds leave no time at all")
    return value


def _port(text: str) -> int:
    return _whole(text, 65535)


def adapter_flaw(name: str) -> str:
    """What is wrong with an adapter's name, in words that follow it; "" for nothing."""
    if "," in name:  # in metrics and in the environment it stands between names
        return "has a comma"
    return f"has {len(name)} characters, {ADAPTER_NAME} are allowed" if len(name) > ADAPTER_NAME else ""


def _adapter(text: str) -> tuple[str, Path]:
    name, _, folder = _text(text).partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    if flaw := adapter_flaw(name):
        raise argparse.ArgumentTypeError(f"the name {name!r} {flaw}")
    return name, Path(folder)


def parse(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Settings:
    """Flags win over the environment, the environment over the defaults. Exits 2 with usage on a bad value."""
    parser = argparse.ArgumentParser(prog="slmops-server", description=__doc__, allow_abbrev=False)

    def option(
        name: str,
        default: str | None,
        convert: Callable[[str], object],
        text: str,
    ) -> None:
        variable = PREFIX + name.upper().replace("-", "_")
        value = env.get(variable, default)
        parser.add_argument(
            f"--{name}",
            default=value,
            type=convert,
            help=f"{text} [{variable}, {default or 'none'}]",
        )

    option("model", None, _path, "folder of the tokenizer and of ONNX with genai_config.json, OpenVINO IR or GGUF")
    option("served-name", None, _text, "model name(s) in the API, comma separated; default: the folder's name")
    option("host", Settings.host, _text, "address to listen on; empty: all, IPv4 and IPv6")
    option("port", "8000", _port, "port of the API (0: any free one)")
    option("metrics-port", "0", _port, "port of /metrics and the probes; 0: the same as the API")
    option("engine", "auto", _one_of(ENGINES), f"one of {', '.join(ENGINES)}")
    option("threads", "0", _whole, "threads of one model step; 0: from the CPU limit, measured for small models")
    option("slots", "0", _whole, "answers generated at the same time; 0: up to 8, as the memory limit allows")
    option("max-model-len", "0", _whole, "prompt + answer, in tokens; 0: the model's context length")
    option("prefill-chunk", "128", _whole, "prompt tokens per step, so that running answers keep moving")
    option("speculate", "0", _guesses, "tokens of an answer guessed ahead where its text repeats itself; 0: none")
    option("max-queue", "64", _whole, "requests that may wait for a slot; the next one gets 503")
    option(
        "max-queue-tokens",
        "0",
        _whole,
        "tokens of the prompts that may wait; 0: an eighth of the longest prompt for each place in the queue",
    )
    option("max-body-bytes", str(4 << 20), _whole, "largest request body; larger ones get 413")
    option("max-connections", "0", _whole, "clients at once; 0: 4096, or fewer where the limit of open files is low")
    option("receive-timeout", "30", _timeout, "seconds for a request's headers to arrive, and for its body")
    option("send-timeout", "30", _timeout, "a client that does not take up its answer for this long is cut off")
    option("keep-alive", "75", _timeout, "an idle connection is closed after this long: after a proxy would do it")
    parser.add_argument(
        "--adapter",
        metavar="NAME=DIR",
        action="append",
        type=_adapter,
        help=f"LoRA adapter and its name in the API; may be given again [{PREFIX}ADAPTER, comma separated, none]",
    )
    option("adapter-root", None, _path, "folder below which adapters may be loaded and unloaded by the API; none: off")
    option("api-keys-dir", None, _path, "folder (or file) with the accepted API keys, re-read while running")
    option("allowed-origins", "", _origins, "origins of web pages that may use the API, comma separated; *: all")
    option("drain-grace", "5", _seconds, "after SIGTERM, go on accepting requests for this long")
    option("step-timeout", "120", _timeout, "an engine silent for this long is killed and started again")
    option("log-level", "info", _one_of(LOG_LEVELS), f"one of {', '.join(LOG_LEVELS)}")
    got = parser.parse_args(argv)
    if got.model is None:
        parser.error(f"--model (or {PREFIX}MODEL) is required")
    try:
        names = tuple(n.strip() for n in _text(got.served_name or got.model.resolve().name).split(",") if n.strip())
    except argparse.ArgumentTypeError as error:
        parser.error(f"--served-name: {error}")
    if not names:
        parser.error("--served-name is empty")
    try:
        adapters = got.adapter or [_adapter(text) for text in env.get(f"{PREFIX}ADAPTER", "").split(",") if text]
    except argparse.ArgumentTypeError as error:
        parser.error(f"{PREFIX}ADAPTER: {error}")
    taken = set(names)
    for name, _ in adapters:
        if name in taken:
            parser.error(f"--adapter {name}: the name is taken by the model or by another adapter")
        taken.add(name)
    return Settings(
        model=got.model,
        served_names=names,
        host=got.host,
        port=got.port,
        metrics_port=got.metrics_port,
        engine=got.engine,
        threads=got.threads,
        slots=got.slots,
        max_model_len=got.max_model_len,
        prefill_chunk=max(1, got.prefill_chunk),
        speculate=got.speculate,
        max_queue=got.max_queue,
        max_queue_tokens=got.max_queue_tokens,
        max_body_bytes=got.max_body_bytes,
        max_connections=got.max_connections,
        receive_timeout=got.receive_timeout,
        send_timeout=got.send_timeout,
        keep_alive=got.keep_alive,
        adapters=tuple(adapters),
        adapter_root=got.adapter_root,
        api_keys_dir=got.api_keys_dir,
        allowed_origins=got.allowed_origins,
        drain_grace=got.drain_grace,
        step_timeout=got.step_timeout,
        log_level=got.log_level,
    )
