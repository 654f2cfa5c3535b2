"""A base model in multi-adapter form: the ONNX graph takes the weights of LoRA adapters as optional inputs.

    python -m slmops_trainer.multi_lora MODEL OUT [--precision int4] [--targets q_proj,v_proj]

MODEL is a folder as transformers writes it, OUT one for slmops-server. Adapters that peft has saved are converted one
by one with `olive convert-adapters -a ADAPTER -o FOLDER/adapter_weights`; `slmops-server --adapter NAME=FOLDER` takes
them. It is Olive's ModelBuilder pass followed by ExtractAdapters. What these need is put around them:
an adapter to shape the graph (a random one, for all linear layers or those named), and that the int4 quantizer leaves
the adapter's matrices alone, because inputs that are quantized have one rank only.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from slmops_trainer import convertible, local, models, onnx_graph, quantize
from slmops_trainer.failure import RunFailure
from slmops_trainer.onnx_build import check_options

WEIGHTS = "adapter_weights.onnx_adapter"  # of the random adapter
NOTES = "model_config.json"  # Olive's own, it names folders of this machine
BLOCKS = ("attn", "mlp")  # the builder's names for the parts of a layer


def excluded(weights: Iterable[str]) -> list[str]:
    """The builder's names of the nodes that multiply these weights of a peft adapter. Pure.

    A name says the layer and the module; in which part of a layer the builder puts that, the candidates cover.
    """
    found = []
    for name in weights:
        path, _, side = name.removesuffix(".weight").rpartition(".")
        layer = path.partition(".layers.")[2].partition(".")[0]
        module = path.rpartition(".")[2]
        found += [f"/model/layers.{layer}/{block}/{module}/{side}/MatMul" for block in BLOCKS]
    return found


def shape(model: Any, targets: list[str], folder: Path) -> list[str]:
    """Write a random adapter of rank 1; the names of its weights. ValueError when a target fits no module."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig(r=1, target_modules=targets or "all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    names = list(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    absent = [target for target in targets if not any(f".{target}." in name for name in names)]
    if absent:
        raise ValueError(f"{', '.join(absent)}: no module of the model is named so")
    return names


def passes(precision: str, block_size: int, exclude: list[str]) -> dict[str, dict[str, Any]]:
    """Olive's passes with their options. Pure."""
    build: dict[str, Any] = {
        "precision": precision,
        "extra_options": {"hf_remote": False, "hf_token": "false"},  # as in onnx_build
    }
    if precision == "int4":
        build |= {
            "int4_block_size": block_size,
            "int4_is_symmetric": True,
            "int4_accuracy_level": 4,
            "int4_op_types_to_quantize": ["MatMul", "Gather"],
            "int4_nodes_to_exclude": exclude,
        }
    return {"build": {"type": "ModelBuilder", **build}, "extract": {"type": "ExtractAdapters"}}


def check(graph: onnx.GraphProto, weights: int) -> None:
    """ValueError unless each weight of the adapter is an optional input of any rank."""
    inputs = {value.name for value in graph.input if ".lora_A." in value.name or ".lora_B." in value.name}
    defaults = {tensor.name: list(tensor.dims) for tensor in graph.initializer if tensor.name in inputs}
    empty = [name for name, dims in defaults.items() if dims[1 if ".lora_A." in name else 0] == 0]
    if len(inputs) != weights or len(empty) != weights:
        raise ValueError(
            f"of {weights} matrices of an adapter {len(empty)} became optional inputs: Olive cannot make the "
            "multi-adapter form of this architecture"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="slmops_trainer.multi_lora", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", choices=("int4", "fp32"), default="int4")
    parser.add_argument("--block-size", type=int, default=32, choices=(16, 32, 64, 128, 256))
    parser.add_argument("--targets", default="", help="modules that adapters may change; default: all linear layers")
    given = parser.parse_args(arguments)
    targets = [name for name in given.targets.split(",") if name]
    try:
        _build(given.model.resolve(), given.out.resolve(), given.precision, given.block_size, targets)
    except (OSError, ValueError, RunFailure) as error:
        print(f"Cannot make {given.out}: {error}", file=sys.stderr)
        return 1
    return 0


def _build(source: Path, out: Path, precision: str, block_size: int, targets: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        copy = scratch / "model"
        convertible.refuse(local.checked(source, copy), str(source))
        loaded = models.load(copy, str(source))
        weights, windows = shape(loaded.model, targets, scratch / "adapter"), onnx_graph.windows(loaded.model.config)
        loaded = replace(loaded, model=None)  # Olive needs the memory
        wanted = passes(precision, block_size, excluded(weights))
        _olive(copy, scratch, out, wanted)
        check(onnx.load(out / "model.onnx", load_external_data=False).graph, len(weights))
        onnx_graph.slide(out, windows, str(source))
        quantize.finish(loaded, out)
    for name in (WEIGHTS, NOTES):
        (out / name).unlink(missing_ok=True)


def _olive(source: Path, scratch: Path, out: Path, wanted: Mapping[str, dict[str, Any]]) -> None:
    import olive.workflows
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.passes.onnx.extract_adapters import ExtractAdapters
    from olive.passes.onnx.model_builder import ModelBuilder

    here = AcceleratorSpec("cpu", "CPUExecutionProvider")
    save = {"save_as_external_data": True, "all_tensors_to_one_file": True}
    for given, kind in zip(wanted.values(), (ModelBuilder, ExtractAdapters), strict=True):
        check_options({name: value for name, value in given.items() if name != "type"}, kind._default_config(here))
    target = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    order = {
        "input_model": {
            "type": "HfModel",
            "model_path": str(source),
            "adapter_path": str(scratch / "adapter"),
            "task": "text-generation",
        },
        "systems": {"here": {"type": "LocalSystem", "accelerators": [target]}},
        "passes": {"build": wanted["build"], "extract": {**wanted["extract"], **save}},
        "host": "here",
        "target": "here",
        "cache_dir": str(scratch / "cache"),
        "output_dir": str(out),
        "no_artifacts": True,
    }
    try:
        olive.workflows.run(order)
    except Exception as error:  # what the builder does not know ends in any of them
        raise ValueError(f"Olive cannot convert {source}: {type(error).__name__}: {error}") from error
    if not (out / "model.onnx").is_file():
        raise ValueError("Olive wrote no model.onnx")


if __name__ == "__main__":
    sys.exit(main())
