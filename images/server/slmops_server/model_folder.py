"""A model folder, read once, checked, typed: as the onnxruntime-genai builder writes it, OpenVINO IR or GGUF."""

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from slmops_server.engines import graph as onnx_graph

log = logging.getLogger(__name__)

IR = "openvino_model.xml"  # as optimum-intel names it
GGUF = ".gguf"
CPU = ("cpu", "cpuexecutionprovider")  # among execution providers
LONGROPE = ("longrope", "su")  # the second is its older name
OLD_NAMES = {  # GPT-2's in config.json
    "num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}  # fmt: skip
NATIVE = "custom_ops_library"  # key of session options: a library that onnxruntime-genai would load and run


class BadModelFolderError(Exception):
    """The folder cannot be served; the message says what is missing and where."""


@dataclass(frozen=True)
class ModelFolder:
    """Shapes are counts, `context_length` is tokens that can be served, `model_bytes` the graph with its weights.

    `inputs`, `outputs`, `share_buffer` and `providers` (other ones than the CPU that are to compute it, as
    onnxruntime-genai names them) are an ONNX graph's; IR and GGUF have none. `tool_template` is the chat template of
    requests with tools, where they have one of their own.
    """

    path: Path
    graph: Path
    model_type: str
    context_length: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_size: int
    eos_ids: frozenset[int]
    share_buffer: bool
    inputs: dict[str, str]
    outputs: dict[str, str]
    chat_template: str | None
    tool_template: str | None
    special_tokens: dict[str, str]
    model_bytes: int
    providers: tuple[str, ...] = ()

    @property
    def cache_inputs(self) -> list[str]:
        """An ONNX graph's inputs that hold the KV cache: of each layer keys and values."""
        parts = [self.inputs[f"past_{part}_names"] for part in ("key", "value")]
        return [name % layer for layer in range(self.layers) for name in parts]

    @property
    def cache_outputs(self) -> list[str]:
        """What the graph makes of `cache_inputs`, in their order."""
        parts = [self.outputs[f"present_{part}_names"] for part in ("key", "value")]
        return [name % layer for layer in range(self.layers) for name in parts]

    def kv_bytes(self, max_len: int, item_bytes: int) -> int:
        """KV cache of one answer of `max_len` tokens."""
        return 2 * self.layers * self.kv_heads * self.head_size * max_len * item_bytes


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadModelFolderError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise BadModelFolderError(f"{path} cannot be read: {error}") from None


def _data(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file. All its pairs are looked at: of two with one key other readers take the first."""
    if any(name == NATIVE for name, _ in pairs):
        raise BadModelFolderError(f"{NATIVE} is set: a model brings no native code. Remove it")
    return dict(pairs)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path), object_pairs_hook=_data)
    except BadModelFolderError as error:
        raise BadModelFolderError(f"{path} is refused: {error}") from None
    except ValueError as error:
        raise BadModelFolderError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        raise BadModelFolderError(f"{path} is nested too deeply") from None
    if not isinstance(value, dict):
        raise BadModelFolderError(f"{path} is not a JSON object")
    return value


def _templates(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """By name: "default", and "tool_use" where transformers takes another one for requests with tools."""
    told = settings.get("chat_template")
    named = told if isinstance(told, list) else [{"name": "default", "template": told}]
    old = {str(one.get("name")): one.get("template") for one in named if isinstance(one, dict)}
    files = {"default": path / "chat_template.jinja", "tool_use": path / "additional_chat_templates" / "tool_use.jinja"}
    new = {name: _text(file) for name, file in files.items() if file.is_file()}
    found = new if "default" in new else {**old, **new}
    return {name: template for name, template in found.items() if isinstance(template, str)}


def _special_tokens(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as strings: what chat templates refer to."""
    file = path / "special_tokens_map.json"
    found = {**(_json(file) if file.is_file() else {}), **settings}
    result = {}
    for key, value in found.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                result[key] = text
    return result


def read(path: Path) -> ModelFolder:
    """Raises BadModelFolderError with the remedy in words."""
    if not path.is_dir():
        raise BadModelFolderError(f"{path} is not a folder")
    other = None if (path / "genai_config.json").exists() else _other_graph(path)
    config = {} if other else _json(path / "genai_config.json")  # first: what is no model at all lacks a tokenizer too
    if not (path / "tokenizer.json").is_file():
        raise BadModelFolderError(f"tokenizer.json is missing in {path}: save the tokenizer in its fast form")
    tokenizer_file = path / "tokenizer_config.json"
    settings = _json(tokenizer_file) if tokenizer_file.is_file() else {}
    if other:
        return _read_other(path, other, settings)
    templates = _templates(path, settings)
    try:
        model = config["model"]
        decoder = model["decoder"]
        graph = path / decoder["filename"]
        eos = model.get("eos_token_id")
        folder = ModelFolder(
            path=path,
            graph=graph,
            model_type=str(model["type"]),
            context_length=int(model["context_length"]),
            vocab_size=int(model["vocab_size"]),
            layers=int(decoder["num_hidden_layers"]),
            kv_heads=int(decoder["num_key_value_heads"]),
            head_size=int(decoder["head_size"]),
            eos_ids=_ids(eos, str(path / "genai_config.json")),
            share_buffer=bool(config.get("search", {}).get("past_present_share_buffer", False)),
            inputs=dict(decoder["inputs"]),
            outputs=dict(decoder["outputs"]),
            chat_template=templates.get("default"),
            tool_template=templates.get("tool_use"),
            special_tokens=_special_tokens(path, settings),
            model_bytes=sum(p.stat().st_size for p in path.iterdir() if ".onnx" in p.name),
            providers=_providers(decoder),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadModelFolderError(f"{path / 'genai_config.json'} is not a decoder-only model's: {error!r}") from None
    if not folder.graph.is_file():
        raise BadModelFolderError(f"{folder.graph} is missing")
    return _within_one_table(folder)


def _providers(decoder: dict[str, Any]) -> tuple[str, ...]:
    """The execution providers that the folder names, but the CPU's."""
    options = (decoder.get("session_options") or {}).get("provider_options") or []
    return tuple(name for one in options for name in one if name.lower() not in CPU)


def _within_one_table(folder: ModelFolder) -> ModelFolder:
    """With the context in which the graph computes a token the same, whatever comes after it or runs beside it."""
    try:
        graph = onnx_graph.read(folder.graph)
        limits = [onnx_graph.rotary_switch(graph), onnx_graph.rotary_positions(graph)]
    except (OSError, ValueError):  # the engine tells what is wrong with it
        return folder
    return _lowered(folder, min((limit for limit in limits if limit is not None), default=None))


def _lowered(folder: ModelFolder, limit: int | None) -> ModelFolder:
    if limit is None or limit >= folder.context_length:
        return folder
    log.info(
        "Lowered the context tokens=%d from=%d: longer texts need rotary tables that are not used here, or not there",
        limit,
        folder.context_length,
    )
    return replace(folder, context_length=limit)


def read_tokenizer(path: Path) -> Tokenizer:
    """The folder's tokenizer, which leaves texts whole. BadModelFolderError when it cannot be read."""
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 - the library raises nothing finer
        raise BadModelFolderError(f"{path / 'tokenizer.json'} cannot be read: {error}") from None
    # a training run leaves in the file how it cut and filled up its texts
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _other_graph(path: Path) -> Path | None:
    """The file of a folder that is not ONNX: the graph of IR, or the GGUF."""
    if (path / IR).is_file():
        if not _weights(path / IR).is_file():
            raise BadModelFolderError(f"{_weights(path / IR).name} is missing in {path}")
        return path / IR
    found = sorted(one for one in path.iterdir() if one.suffix == GGUF)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise BadModelFolderError(
            f"{path} holds {len(found)} GGUF files ({names}): keep one, and join one that was split"
        )
    if found and re.search(r"-\d{5}-of-(?!00001)\d{5}$", found[0].stem):
        raise BadModelFolderError(f"{found[0].name} is one part of several: join them with llama-gguf-split --merge")
    return found[0] if found else None


def _weights(graph: Path) -> Path:
    """The file with the weights of IR or GGUF, which may be the graph's own."""
    return graph.with_suffix(".bin") if graph.suffix == ".xml" else graph


def _read_other(path: Path, graph: Path, settings: dict[str, Any]) -> ModelFolder:
    """IR or GGUF; config.json and generation_config.json are those of transformers."""
    config = _json(path / "config.json")
    config = {name: config[old] for name, old in OLD_NAMES.items() if old in config} | config
    if graph.suffix == ".xml" and config.get("attn_logit_softcapping"):
        raise BadModelFolderError(
            f"{path} is IR of a model that caps what is attended to (attn_logit_softcapping in config.json), which "
            "optimum-intel leaves out: serve its ONNX folder (QuantizedModel)"
        )
    generation = _json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    templates = _templates(path, settings)
    try:
        heads = int(config["num_attention_heads"])
        eos = next((ids for one in (generation, config) if (ids := one.get("eos_token_id")) is not None), None)
        folder = ModelFolder(
            path=path,
            graph=graph,
            model_type=str(config["model_type"]),
            context_length=int(config["max_position_embeddings"]),
            vocab_size=int(config["vocab_size"]),
            layers=int(config["num_hidden_layers"]),
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            eos_ids=_ids(eos, f"{path / 'config.json'} or generation_config.json"),
            share_buffer=False,
            inputs={},
            outputs={},
            chat_template=templates.get("default"),
            tool_template=templates.get("tool_use"),
            special_tokens=_special_tokens(path, settings),
            model_bytes=sum(p.stat().st_size for p in {graph, _weights(graph)}),
        )
        return _lowered(folder, _one_table(config))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadModelFolderError(f"{path / 'config.json'} is not a decoder-only model's: {error!r}") from None


def _one_table(config: dict[str, Any]) -> int | None:
    """The context up to which longrope (Phi-3.5, Phi-4-mini) takes its short factors, None of any other rotation.

    IR has these alone; llama.cpp takes the long ones for short texts too where its context is longer.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if (rope.get("rope_type") or rope.get("type")) not in LONGROPE:
        return None
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return int(original) if original else None


def _ids(value: Any, where: str) -> frozenset[int]:
    """One token id or several; `where`: the files that should have it."""
    if value in (None, []):
        raise BadModelFolderError(f"no eos_token_id in {where}: add the id of the token that ends an answer")
    return frozenset(int(one) for one in (value if isinstance(value, list) else [value]))
