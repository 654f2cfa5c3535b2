"""Models on disk: what is refused and why, loading, and writing a folder that every later step can read."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slmops.api.run import ENV_GPU
from slmops_artifacts import Manifest
from slmops_trainer import chat_text, encoding
from slmops_trainer.failure import RunFailure, translate

if TYPE_CHECKING:
    from slmops_trainer.context import Context

# What a tokenizer consists of. Copied, not written anew: training changes no tokenizer, and rewriting one has
# broken end-of-text tokens and templates in other tools. But see _backend.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"  # where transformers keeps it
OTHER_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")

log = logging.getLogger("slmops")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to train or to answer.

    stop_ids  the tokens at which generation ends: what the model declares, and what its chat template writes
    dtype     of the weights on disk; in memory they are fp32
    """

    folder: Path
    model: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    dtype: torch.dtype


def device() -> torch.device:
    """The GPU if there is one. Raises RunFailure(BadSpec) if the pod asks for one that torch does not see."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    asked = os.environ.get(ENV_GPU)
    if asked:
        raise RunFailure(
            "BadSpec",
            f"spec.pod.resources asks for {asked}, but this image's PyTorch {torch.__version__} sees no GPU. In a new "
            "object name a CUDA trainer as spec.pod.image (docs/install.md, GPUs; the default image is for the CPU) "
            "and, if need be, spec.pod.runtimeClassName; or ask for no GPU.",
        )
    return torch.device("cpu")


def computes_bf16(where: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there, not emulated: a GPU from Ampere on, a CPU with AVX-512."""
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_bf16(precision: str, where: torch.device) -> bool:
    """What `training.precision` means on this device. An explicit bf16 is obeyed where it is slow, and said."""
    native = computes_bf16(where)
    if precision == "bf16" and not native:
        log.warning("This device only emulates bf16, many times slower than fp32; see training.precision: auto")
    return precision == "bf16" or (precision == "auto" and native)


def fetch(
    ctx: "Context", folder: str, refuse: Callable[[Mapping[str, Any], str], None] | None = None
) -> tuple[Path, Manifest]:
    """Pull the run's model. What its config.json and the names of its files show to be unfit costs no weights.

    `refuse(config, source)` may know of more. From a volume all is read at once, and looked at then (check): to read
    a part of it takes as long, for its digest. Raises RunFailure(UnsupportedModel) and those of Context.pull.
    """
    source = ctx.spec.model
    if not source.uri.startswith(("pvc://", "file://")):
        names: list[str] = []

        def choose(paths: Sequence[str]) -> list[str]:
            names.extend(paths)
            if "config.json" not in paths:
                _judge(ctx.work / f"{folder}-config", paths, source.uri)  # which raises
            return ["config.json"]

        seen, _ = ctx.pull(source, f"{folder}-config", choose=choose)
        config = modernise(_judge(seen, names, source.uri), source.uri)
        if refuse is not None:
            refuse(config, source.uri)
    return ctx.pull(source, folder)


def load(folder: Path, source: str, began: datetime | None = None) -> Loaded:
    """Load a pulled causal language model from safetensors, never from code. `source` names it to people.

    `began`: what a chat template that writes the date takes for now (Context.began).
    Raises RunFailure(UnsupportedModel).
    """
    check(folder, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # torch's own attention leaves the soft cap of Gemma 2 out, in silence.
        capped = getattr(config, "attn_logit_softcapping", None)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            local_files_only=True, output_loading_info=True, attn_implementation="eager" if capped else None,
        )  # fmt: skip
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        if translate(error).reason in ("OutOfMemory", "DiskFull"):
            raise
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunFailure("UnsupportedModel", f"{source} cannot be loaded by transformers: {text[:300]}") from error
    if info["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise RunFailure(
            "UnsupportedModel",
            f"{source} lacks weights of its architecture, among them {min(info['missing_keys'])}. Publish it whole.",
        )
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if began is not None:
        chat_text.date(tokenizer, began)
    if tokenizer.eos_token_id is None:
        raise RunFailure(
            "UnsupportedModel", f"The tokenizer of {source} has no eos_token, so no answer could ever end. Set one."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if _beyond(tokenizer, rows):
        raise RunFailure(
            "UnsupportedModel",
            f"The tokenizer of {source} knows {len(tokenizer)} tokens, its model {rows}: they do not belong together.",
        )
    encoding.bound(tokenizer, rows)
    # Beyond its context a model computes nonsense or fails; some tokenizers do not know of it.
    tokenizer.model_max_length = context(model)
    stops = _stop_ids(model, tokenizer)
    return Loaded(folder, model.to(device()), tokenizer, stops, _disk_dtype(folder))


def context(model: Any) -> int:
    """The most tokens that the model can look at, prompt and answer together."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def check(folder: Path, source: str) -> dict[str, Any]:
    """Look at a pulled folder before anything is loaded, mend what transformers 4 would misread, return its config.

    Raises RunFailure(UnsupportedModel) with the remedy.
    """
    config = _judge(folder, {path.name for path in folder.iterdir()}, source)
    mended = modernise(config, source)
    if mended != config:
        (folder / "config.json").write_text(json.dumps(mended, indent=2))
    _mend_tokenizer(folder, source)
    return mended


def _judge(folder: Path, files: Collection[str], source: str) -> dict[str, Any]:
    """The config.json in `folder` of a model with these files. Raises RunFailure(UnsupportedModel)."""
    if "adapter_config.json" in files and "config.json" not in files:
        raise RunFailure(
            "UnsupportedModel",
            f"{source} is a LoRA adapter, not a model. Merge it (FineTuneJob with merge: true) first.",
        )
    config = _json(folder / "config.json", source)
    names = config.get("architectures") or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not names or names[0] not in known or not names[0].endswith(("ForCausalLM", "LMHeadModel")):
        what = f"is a {names[0]}" if names else "names no architecture in config.json"
        raise RunFailure(
            "UnsupportedModel",
            f"{source} {what}; a causal language model that transformers knows is needed (for example "
            "Qwen2ForCausalLM, LlamaForCausalLM, Phi3ForCausalLM). Models that bring their own code are refused.",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise RunFailure(
            "UnsupportedModel", f"{source} is quantized already ({method}). Use its original, unquantized weights."
        )
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        raise RunFailure("UnsupportedModel", f"{source} has no .safetensors weights. Convert them and publish again.")
    if not any(name in files for name in ("tokenizer.json", "vocab.json")):
        what = "a tokenizer.model alone" if "tokenizer.model" in files else "no tokenizer"
        raise RunFailure(
            "UnsupportedModel",
            f"{source} has {what}. Publish tokenizer.json with the model: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it, where sentencepiece is installed.",
        )
    return config


def modernise(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A config of transformers 5 as transformers 4 reads it; others unchanged.

    Version 5 moved the RoPE base into `rope_parameters`, which version 4 does not know: it would silently compute
    with a base of 10,000.
    """
    rope = config.get("rope_parameters")
    if rope is None:
        return config
    known = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise RunFailure(
            "UnsupportedModel",
            f"{source} was written by transformers 5 with rotary embeddings per layer type, which this version cannot "
            "read faithfully. Save it with transformers 4.57.",
        )
    found = {name: value for name, value in config.items() if name != "rope_parameters"}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            found[name] = rope[name]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return found
    scaling = {"rope_type": kind, **{name: value for name, value in rope.items() if name not in known}}
    if config.get("model_type") == "phi3" and kind == "longrope":
        scaling = _phi3_scaling(scaling, found, source)
    return {**found, "rope_scaling": scaling}


def _phi3_scaling(scaling: dict[str, Any], found: dict[str, Any], source: str) -> dict[str, Any]:
    """The three keys that version 4 takes from Phi-3; what it computes from the rest of the config is left to it."""
    original = scaling.get("original_max_position_embeddings")
    if original is not None:
        found.setdefault("original_max_position_embeddings", original)
    if scaling.get("attention_factor") is not None:
        raise RunFailure(
            "UnsupportedModel",
            f"{source} was written by transformers 5 with an attention_factor of its own, which this version computes. "
            "Save it with transformers 4.57.",
        )
    return {"type": "longrope", **{name: scaling.get(name) for name in ("short_factor", "long_factor")}}


def write(loaded: Loaded, model: Any, folder: Path) -> None:
    """Write `model` with the tokenizer of `loaded`, its weights in the dtype of the weights it came from.

    The generation config lists every stop token, so that no later step has to guess where an answer ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = getattr(model.config, "max_position_embeddings", None)
    model.config.eos_token_id = _one_or_all(loaded.stop_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=loaded.tokenizer.bos_token_id,
        eos_token_id=_one_or_all(loaded.stop_ids),
        pad_token_id=loaded.tokenizer.pad_token_id,
        **({"max_length": limit} if limit else {}),
    )
    model.to(loaded.dtype)
    broken = next((name for name, value in model.named_parameters() if not value.isfinite().all()), None)
    if broken is not None:
        raise RunFailure(
            "LossDiverged",
            f"{broken} holds values that {str(loaded.dtype).removeprefix('torch.')}, the base's type, cannot hold. "
            "Lower training.learningRate, or use a base model in bfloat16 or float32.",
        )
    model.save_pretrained(folder, safe_serialization=True)
    copy_tokenizer(loaded, folder)


def copy_tokenizer(loaded: Loaded, folder: Path) -> None:
    """Copy the tokenizer's files and the licence; the chat template goes to both places where tools look for it."""
    for name in (*TOKENIZER_FILES, *OTHER_FILES):
        if (loaded.folder / name).is_file():
            shutil.copyfile(loaded.folder / name, folder / name)
    backend = _backend(loaded)
    if backend is not None:
        (folder / "tokenizer.json").write_text(backend, encoding="utf-8")
    template = loaded.tokenizer.chat_template
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    tools = _tool_template(loaded.folder, config)
    if tools:
        (folder / TOOL_TEMPLATE).parent.mkdir(exist_ok=True)
        (folder / TOOL_TEMPLATE).write_text(tools)
    if template and config:
        path.write_text(json.dumps({**config, "chat_template": template}, indent=2, ensure_ascii=False))
        (folder / "chat_template.jinja").write_text(template)


def _backend(loaded: Loaded) -> str | None:
    """tokenizer.json as the run's tokenizer would be read from it; None where that is the file which is there.

    transformers puts a beginning-of-text token and added tokens of tokenizer_config.json into a tokenizer while it
    reads it. The server reads tokenizer.json alone, and has to give the ids that were trained.
    """
    if not loaded.tokenizer.is_fast:
        return None
    path = loaded.folder / "tokenizer.json"
    used = _whole(Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str()))
    if path.is_file() and _whole(Tokenizer.from_file(str(path))).to_str() == used.to_str():
        return None
    text: str = used.to_str(pretty=True)
    return text


def _whole(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without what the last call told it to cut or to fill up."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _tool_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template of requests with tools, where it is one of its own: a file, in older models an entry of a list."""
    if (folder / TOOL_TEMPLATE).is_file():
        return (folder / TOOL_TEMPLATE).read_text()
    named = config.get("chat_template")
    entries = [one for one in named if isinstance(one, dict)] if isinstance(named, list) else []
    return next((one.get("template") for one in entries if one.get("name") == "tool_use"), None)


def _one_or_all(ids: Sequence[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def _stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end first, then what the two configs and the chat template add."""
    found: list[int] = [tokenizer.eos_token_id]
    for declared in (model.generation_config.eos_token_id, model.config.eos_token_id, encoding.turn_end(tokenizer)):
        found += declared if isinstance(declared, list) else [] if declared is None else [declared]
    return tuple(dict.fromkeys(found))


def _beyond(tokenizer: Any, rows: int) -> bool:
    """Whether the model has no row for a token that any text may have, or that every answer needs.

    A token that was added and that only a text with its very name has is no reason: Gemma 3 for text alone has such a
    one for images. encoding names the line that does.
    """
    if len(tokenizer) <= rows:
        return False
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    needed = own | {*encoding.template_ids(tokenizer)}
    ordinary = set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys()
    return bool(max(needed | ordinary) >= rows)


def _disk_dtype(folder: Path) -> torch.dtype:
    """The dtype of most weights on disk."""
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    counts: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as stream:
            for key in stream.keys():  # noqa: SIM118  # not a dict
                entry = stream.get_slice(key)
                counts[entry.get_dtype()] = counts.get(entry.get_dtype(), 0) + 1
    return names.get(max(counts, key=lambda name: counts[name], default="F32"), torch.float32)


def _mend_tokenizer(folder: Path, source: str) -> None:
    """What keeps version 4 from reading a tokenizer.json as it stands.

    Version 5 names a tokenizer class that version 4 does not have, and lists further special tokens elsewhere.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = _json(path, source)
    mended = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        mended["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # version 4 keeps a table of names there
        known = config.get("additional_special_tokens") or []
        more = [token for token in mended.pop("extra_special_tokens") if token not in known]
        mended["additional_special_tokens"] = [*known, *more]
    if str(config.get("tokenizer_class")).startswith("LlamaTokenizer") and (folder / "tokenizer.json").is_file():
        # It would be made again from the sentencepiece file, which needs that library; tokenizer.json has the prefix.
        mended.pop("add_prefix_space", None)
    if mended != config:
        path.write_text(json.dumps(mended, indent=2))


def _json(path: Path, source: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFailure(
            "UnsupportedModel", f"{source} has no {path.name}: it is not a transformers model. Check the URI."
        ) from error
    except ValueError as error:
        raise RunFailure("UnsupportedModel", f"{source}: {path.name} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise RunFailure("UnsupportedModel", f"{source}: {path.name} is not a JSON object.")
    return found
