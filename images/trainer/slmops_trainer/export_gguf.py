r"""Write a Hugging Face model folder as GGUF, with the tokenizer files that slmops-server reads beside it.

    python -m slmops_trainer.export_gguf MODEL OUT --type q4_0|f16|f32

Decoders of the types llama, mistral, qwen2 and qwen3 with a byte-level BPE and plain rotation. Needs numpy only.
Weights become blocks of 32 of 4 bits (q4_0, the output head too) or floats; norms and biases stay float32.
"""

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 32  # bytes
BLOCK = 32  # weights of a block of q4_0
TYPES = {"f32": 0, "f16": 1, "q4_0": 2}  # of tensors, as GGUF numbers them
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # regular expressions that cut text before BPE, and llama.cpp's names of them
    _LETTERS + r"\p{N}" + _OTHERS: "qwen2",
    _LETTERS + r"\p{N}{1,3}" + _OTHERS: "llama-bpe",
}
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
CONFIGS = ("config.json", "generation_config.json")

Weights = NDArray[np.float32]


class UnsupportedError(Exception):
    """The model cannot be written as GGUF here; the message says why."""


def read_weights(folder: Path) -> Iterator[tuple[str, Weights]]:
    """Every tensor of the folder's safetensors files, as float32."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedError(f"{folder} holds no safetensors")
    kinds: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, told in header.items():
            if told["dtype"] not in kinds:
                raise UnsupportedError(f"{name} is of type {told['dtype']}")
            kind, (begin, end) = kinds[told["dtype"]], told["data_offsets"]
            flat = np.fromfile(path, kind, (end - begin) // kind.itemsize, offset=8 + size + begin)
            if told["dtype"] == "BF16":
                flat = (flat.astype(np.uint32) << 16).view(np.float32)
            yield name, flat.astype(np.float32, copy=False).reshape(told["shape"])


def rename(name: str) -> str:
    """llama.cpp's name of a tensor. UnsupportedError when the decoder is of another kind."""
    stem, _, part = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{part}"
    if stem.startswith("model.layers."):
        number, _, inner = stem.removeprefix("model.layers.").partition(".")
        if inner in LAYER:
            return f"blk.{number}.{LAYER[inner]}.{part}"
    raise UnsupportedError(f"the decoder has a {name}, which is not one of a llama or a qwen")


def interleave(weights: Weights, heads: int) -> Weights:
    """Rows of a llama's query or key as llama.cpp rotates them: pairs side by side instead of halves."""
    shape = weights.shape
    halves = weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def q4_0(weights: Weights) -> NDArray[np.uint8]:
    """Rows in blocks of 32: a float16 scale and 16 bytes of two weights each, [rows, bytes]."""
    blocks = weights.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / -8
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    levels = np.clip((blocks * inverse + np.float32(8.5)).astype(np.int8), 0, 15).astype(np.uint8)
    packed = levels[:, : BLOCK // 2] | levels[:, BLOCK // 2 :] << 4
    rows = np.concatenate([scale.astype("<f2").view(np.uint8), packed], axis=1)
    return rows.reshape(weights.shape[0], -1)


def packed(weights: Weights, wanted: str) -> tuple[str, NDArray[Any]]:
    """The type that a tensor gets, and its bytes."""
    if weights.ndim == 1 or wanted == "f32":
        return "f32", weights
    if wanted == "q4_0" and weights.shape[1] % BLOCK == 0:
        return "q4_0", q4_0(weights)
    return "f16", weights.astype("<f2")


def split_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer cuts text before BPE. UnsupportedError when it has none here."""
    told = tokenizer.get("pre_tokenizer") or {}
    steps = told.get("pretokenizers", [told])
    if tokenizer["model"]["type"] != "BPE" or not steps or steps[-1].get("type") != "ByteLevel":
        raise UnsupportedError("its tokenizer is not a byte-level BPE")
    also = steps[-1].get("use_regex", True)  # GPT-2's
    match [step["type"] for step in steps]:
        case ["ByteLevel"] if also:
            return "gpt-2"
        case ["Digits", "ByteLevel"] if also and steps[0]["individual_digits"]:
            return "smollm"
        case ["Split", "ByteLevel"] if not also and (name := SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
            return name
    raise UnsupportedError("its tokenizer cuts text in a way that is not known here")


def vocabulary(tokenizer: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The metadata of a tokenizer with `size` tokens."""
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number], kinds[number] = text, NORMAL
    for one in tokenizer.get("added_tokens", []):
        if one["id"] < size:  # the model has no row for the others (Gemma 3 for text alone), and no text needs them
            tokens[one["id"]], kinds[one["id"]] = one["content"], CONTROL if one["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split_name(tokenizer),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }


def shapes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the decoder. UnsupportedError when it is none that is written here."""
    arch = ARCHITECTURES.get(config.get("model_type", ""))
    if not arch:
        raise UnsupportedError(f"model type {config.get('model_type')!r} is none of {', '.join(ARCHITECTURES)}")
    if not _plain(config) or _slides(config):
        raise UnsupportedError("its rotation is scaled or partial, or its attention slides")
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    base = {**config, **(config.get("rope_parameters") or {})}.get("rope_theta", 10000.0)
    return {
        "general.architecture": arch,
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": config.get("num_key_value_heads") or heads,
        f"{arch}.attention.key_length": size,
        f"{arch}.attention.value_length": size,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.rope.dimension_count": size,
        f"{arch}.rope.freq_base": float(base),
        f"{arch}.vocab_size": config["vocab_size"],
    }


def _plain(config: Mapping[str, Any]) -> bool:
    """Whether all of each head is rotated, unscaled: as transformers 4 tells it, and 5 in rope_parameters."""
    rope = config.get("rope_parameters") or {}
    told = (config.get("rope_scaling") or {}, rope)
    kinds = {one.get("rope_type") or one.get("type") or "default" for one in told}
    by_layer = any(isinstance(value, dict) for value in rope.values())
    share = {**config, **rope}.get("partial_rotary_factor")
    return kinds == {"default"} and not by_layer and share in (None, 1)


def _slides(config: Mapping[str, Any]) -> bool:
    """Mistral has no switch of its own for its window; without a word it is 4096."""
    if config["model_type"] != "mistral":
        return bool(config.get("use_sliding_window"))
    window = config.get("sliding_window", 4096)
    return bool(window) and window < config["max_position_embeddings"]


def ends(config: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens, as far as the config names them."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    told = {name: config.get(key) for name, key in names.items()}
    firsts = {name: value[0] if isinstance(value, list) else value for name, value in told.items()}
    return {f"tokenizer.ggml.{name}_token_id": value for name, value in firsts.items() if value is not None}


def encoded(value: object) -> bytes:
    """A metadata value with its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    assert isinstance(value, list)
    if value and isinstance(value[0], int):
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def write(file: BinaryIO, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Weights]], wanted: str) -> None:
    """The file's bytes. Every tensor is held in memory, in its type of the file."""
    made = [(name, weights.shape, *packed(weights, wanted)) for name, weights in tensors]
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(made), len(metadata)))
    file.writelines(_text(key) + encoded(value) for key, value in metadata.items())
    offset = 0
    for name, shape, kind, data in made:
        axes = shape[::-1]
        file.write(_text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, TYPES[kind], offset))
        offset += _padded(data.nbytes)
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for *_, data in made:
        file.write(data.tobytes())
        file.write(bytes(_padded(data.nbytes) - data.nbytes))


def _padded(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def export(source: Path, out: Path, wanted: str) -> None:
    """A folder with model.gguf and the files that a server needs beside it. UnsupportedError says why there is none."""
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    metadata = {
        **shapes(config),
        "general.file_type": FILE_TYPES[wanted],
        **vocabulary(tokenizer, config["vocab_size"]),
    }
    metadata |= ends(config)
    is_llama = metadata["general.architecture"] == "llama"  # the others rotate halves
    heads = config["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads} if is_llama else {}

    def tensors() -> Iterator[tuple[str, Weights]]:
        for name, weights in read_weights(source):
            new = rename(name)
            if new == "output.weight" and config.get("tie_word_embeddings"):
                continue
            count = turned.get(new.split(".")[-2])  # their rows are turned, weights and biases
            yield new, interleave(weights, count) if count else weights

    out.mkdir(parents=True, exist_ok=True)
    part = out / "model.gguf.part"
    with part.open("wb") as file:
        write(file, metadata, tensors(), wanted)
    for name in (*BESIDE, *CONFIGS):
        if (source / name).exists():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copy(source / name, out / name)
    part.rename(out / "model.gguf")


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="slmops_trainer.export_gguf", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q4_0", choices=sorted(FILE_TYPES))
    given = parser.parse_args(arguments)
    try:
        export(given.model, given.out, given.type)
    except (UnsupportedError, OSError, KeyError, ValueError) as error:
        print(f"Cannot make {given.out}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
