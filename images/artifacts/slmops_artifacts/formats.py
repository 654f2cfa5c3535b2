"""Which files an artifact may hold. Data only: nothing that runs code when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from .errors import ArtifactError, from_os

Role = Literal["weight", "config", "dataset", "doc"]

MAX_FILES = 10_000
MARKER = ".slmops-complete"
FOLDER_MANIFEST = "slmops-manifest.json"

WEIGHTS = {
    ".safetensors": "safetensors",
    ".onnx": "onnx",
    ".onnx.data": "onnx",
    ".onnx_data": "onnx",
    ".data": "onnx",
    ".onnx_adapter": "onnx",
    ".gguf": "gguf",
}
DATA = {".jsonl": "jsonl", ".parquet": "parquet", ".csv": "csv"}
CONFIGS = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".yaml", ".yml", ".xml")
DOCS = (".md", ".png", ".svg", ".jpg", ".jpeg", ".pdf")
PLAIN_DOCS = frozenset({"license", "licence", "notice", "readme", "copying", "use_policy", "authors"})
PICKLED = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".joblib",
    ".npy",
    ".npz",
    ".h5",
    ".pt2",
    ".msgpack",
)
CODE = (".py", ".pyc", ".so", ".sh", ".ipynb", ".dll", ".js", ".exe")
TORCH_BIN = (
    "pytorch_model",
    "adapter_model",
    "training_args",
    "optimizer",
    "scheduler",
    "rng_state",
    "scaler",
)

# How native code begins: ELF, and Mach-O of either byte order or for several CPUs; Windows' is looked at more closely
PROGRAMS = (
    b"\x7fELF",
    *(bytes.fromhex(magic) for magic in ("feedface", "feedfacf", "cefaedfe", "cffaedfe", "cafebabe")),
)

FORMAT_ORDER = ("safetensors", "onnx", "openvino", "gguf")
ALLOWED_TEXT = "safetensors, ONNX, OpenVINO IR, GGUF, jsonl, parquet, csv, and their json/txt/jinja/md/png companions"


class Verdict(NamedTuple):
    """What a file is good for; `refusal` says why it is not."""

    role: Role | None
    format: str
    refusal: str


def classify(path: str, siblings: Iterable[str]) -> Verdict:
    """Judge one file by its name; `siblings` are all paths of the artifact."""
    lower = path.lower()
    name = lower.rpartition("/")[2]
    for suffix, fmt in WEIGHTS.items():
        if name.endswith(suffix):
            return Verdict("weight", fmt, "")
    if name.endswith(".bin") and _is_openvino(path, siblings):
        return Verdict("weight", "openvino", "")
    if name.endswith(PICKLED):
        return Verdict(None, "pickle", "pickled or legacy weights can run code when loaded")
    if name.endswith(CODE):
        return Verdict(None, "code", "an artifact holds no code; models that need trust_remote_code are refused")
    for suffix, fmt in DATA.items():
        if name.endswith(suffix):
            return Verdict("dataset", fmt, "")
    if name.endswith(CONFIGS):
        return Verdict("config", "", "")
    if name.endswith(DOCS) or name.split(".")[0].split("-")[0] in PLAIN_DOCS:
        return Verdict("doc", "", "")
    return Verdict(None, "", "its type is not on the allow-list")


def check_files(paths: Iterable[str], where: str) -> dict[str, Verdict]:
    """Judge all files of an artifact; the whole artifact is refused when one file is."""
    known = sorted(paths)
    if not known:
        raise ArtifactError("SourceNotFound", f"{where} holds no files. Check the path and publish it again.")
    if len(known) > MAX_FILES:
        raise ArtifactError("UnsupportedFormat", f"{where} holds {len(known)} files; at most {MAX_FILES} are allowed.")
    every = frozenset(known)
    verdicts = {path: classify(path, every) for path in known}
    refused = [(path, verdict) for path, verdict in verdicts.items() if verdict.role is None]
    if refused:
        first, verdict = refused[0]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ArtifactError(
            "UnsupportedFormat",
            f"{where} is refused because of {first}{more}: {verdict.refusal}. {remedy(verdict.format)}",
        )
    return verdicts


def remedy(fmt: str) -> str:
    """Say what to do with a file that was refused."""
    if fmt == "pickle":
        return "Convert the weights to safetensors (save_pretrained does) and publish again."
    return f"Remove it, or convert it to one of: {ALLOWED_TEXT}."


def detect_format(verdicts: dict[str, Verdict]) -> str:
    """Find the format of the artifact: that of its weights, else that of its data."""
    found = {verdict.format for verdict in verdicts.values() if verdict.format}
    for fmt in (*FORMAT_ORDER, *DATA.values()):
        if fmt in found:
            return fmt
    return "json"


def check_content(path: str, file: Path, where: str) -> None:
    """Look at the first bytes, so that code under any name and a pickle under that of weights are caught.

    Raises ArtifactError.
    """
    try:
        _check_head(path, file, where)
    except OSError as error:
        raise from_os(error, "Reading", file) from error


def _check_head(path: str, file: Path, where: str) -> None:
    if _is_program(file):
        raise ArtifactError(
            "UnsupportedFormat",
            f"{where}: {path} is native code, whatever its name. An artifact holds none: remove it.",
        )
    lower = path.lower()
    if not lower.endswith((".safetensors", ".gguf", ".bin", ".parquet")):
        return
    with file.open("rb") as stream:
        head = stream.read(9)
    size = int.from_bytes(head[:8], "little")
    good = {
        ".safetensors": len(head) == 9 and head[8:9] == b"{" and size + 8 <= file.stat().st_size,
        ".gguf": head.startswith(b"GGUF"),
        ".parquet": head.startswith((b"PAR1", b"PARE")),
        ".bin": not head.startswith(b"PK\x03\x04"),
    }
    for suffix, fine in good.items():
        if lower.endswith(suffix) and not fine:
            raise ArtifactError(
                "UnsupportedFormat",
                f"{where}: {path} is not a {suffix} file (wrong first bytes). Write it again with the right tool.",
            )


def _is_program(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(64)
        if head[:2] != b"MZ":  # raw weights may begin so by chance: such a program says where its next mark is
            return head.startswith(PROGRAMS)
        stream.seek(int.from_bytes(head[60:], "little"))
        return stream.read(4) == b"PE\0\0"


def _is_openvino(path: str, siblings: Iterable[str]) -> bool:
    """OpenVINO keeps raw weights in NAME.bin beside NAME.xml; Torch's pickles have well-known names."""
    name = path.rpartition("/")[2].lower()
    if name.startswith(TORCH_BIN):
        return False
    return f"{path[:-4]}.xml" in siblings
