"""Olive in a process of its own: its memory comes back when it ends, and being killed for memory has a name.

Run as a program (`python -m slmops_trainer.onnx_build ORDER.json`) it builds; imported, it starts that program.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.api.quantized import QuantizedModelSpec
from slmops_trainer.failure import RunFailure, translate

if TYPE_CHECKING:
    from slmops_trainer.context import Context

STAGE = "Converting"
OURS = ("model_config.json",)  # Olive's own notes: they name folders of this pod

log = logging.getLogger("slmops")


def options(spec: QuantizedModelSpec) -> dict[str, Any]:
    """The spec as options of Olive's ModelBuilder pass. Pure; the child checks them against Olive's schema."""
    # The builder trusts code of the model's repository unless told otherwise.
    extra: dict[str, Any] = {"hf_remote": False, "hf_token": "false"}
    found: dict[str, Any] = {"precision": spec.precision, "extra_options": extra}
    if spec.precision == "int4":
        level = 4 if spec.accuracy_level is None else spec.accuracy_level
        found |= {
            "int4_block_size": spec.block_size or 32,
            "int4_is_symmetric": True if spec.symmetric is None else spec.symmetric,
            # The embedding too: left in fp32, it is most of a small model.
            "int4_op_types_to_quantize": ["MatMul", "Gather"],
        }
        if level:
            found["int4_accuracy_level"] = level
        else:
            extra["int4_accuracy_level"] = 0  # Olive's own enumeration begins at 1, the builder's default is 4
    return found


def build(ctx: "Context", source: Path, out: Path, wanted: Mapping[str, Any], name: str) -> None:
    """Convert the transformers model in `source` into the new folder `out`. `name` tells people which model it is.

    Raises RunFailure(UnsupportedModel, OutOfMemory, DiskFull, Interrupted, InternalError).
    """
    scratch = ctx.work / "olive"
    shutil.rmtree(scratch, ignore_errors=True)
    # Olive takes any text option that is the name of an existing file for a path: its working folder must be empty.
    empty = scratch / "empty"
    empty.mkdir(parents=True)
    order, verdict, output = scratch / "order.json", scratch / "verdict.json", scratch / "log.txt"
    order.write_text(
        json.dumps({"source": str(source), "out": str(out), "cache": str(scratch / "cache"), "options": dict(wanted),
                    "verdict": str(verdict)})
    )  # fmt: skip
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "slmops_trainer.onnx_build", str(order)],
            cwd=empty,
            env=_environment(scratch),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        _wait(ctx, process)
    failure = json.loads(verdict.read_text()) if process.returncode == 0 else None
    if failure == {}:
        shutil.rmtree(scratch, ignore_errors=True)
        return
    for line in output.read_text(errors="replace").splitlines()[-20:]:
        log.error("Olive: %s", line)
    if failure:
        message = failure["message"].replace(str(source), name)
        raise RunFailure(failure["reason"], message, retryable=failure["retryable"])
    if process.returncode == -signal.SIGKILL:
        raise RunFailure(
            "OutOfMemory",
            "The conversion was killed, most likely for memory: it was measured to need half a gigabyte and up to "
            "18 bytes for each parameter. Raise spec.pod.resources.limits.memory.",
        )
    raise RunFailure(
        "InternalError", f"The conversion ended with status {process.returncode}; the pod's log has its last lines.",
        retryable=True,
    )  # fmt: skip


def _environment(scratch: Path) -> dict[str, str]:
    ours = {
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OLIVE_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return {**os.environ, **ours}


def _wait(ctx: "Context", process: "subprocess.Popen[bytes]") -> None:
    """Until it ends. A pod that is asked to stop ends it: half a conversion is worth nothing."""
    began = time.monotonic()
    try:
        while process.poll() is None:
            ctx.check()
            ctx.report(STAGE, 0, 1, f"Olive has been at work for {time.monotonic() - began:.0f} s")
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def main(order: Mapping[str, Any]) -> dict[str, Any]:
    """In the child: run Olive. Returns a failure as a dict, empty on success."""
    try:
        _run(order)
    except (NotImplementedError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.exception("Olive failed")
        what = (str(error).strip().splitlines() or [""])[0][:300]
        return _failure(
            RunFailure("UnsupportedModel", f"Olive cannot convert {order['source']}: {type(error).__name__}: {what}")
        )
    except Exception as error:
        log.exception("Olive failed")
        return _failure(translate(error))
    return {}


def _failure(failure: RunFailure) -> dict[str, Any]:
    return {"reason": failure.reason, "message": failure.message, "retryable": failure.retryable}


def _run(order: Mapping[str, Any]) -> None:
    import olive.workflows
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.passes.onnx.model_builder import ModelBuilder

    wanted = dict(order["options"])
    check_options(wanted, ModelBuilder._default_config(AcceleratorSpec("cpu", "CPUExecutionProvider")))
    # Olive's pass refuses fp16 for CPUs. The graph that the builder makes for CUDA is the same but for its provider
    # options, which quantize.py removes; onnxruntime runs it on a CPU with fp16 weights and KV cache.
    passes: dict[str, Any] = {"build": {"type": "ModelBuilder", **wanted}}
    if wanted["precision"] != "int4" and _tied(Path(order["source"])):
        # The builder stores a tied embedding twice: once for looking up, once, transposed, for the head.
        tie = {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}]}
        save = {"save_as_external_data": True, "all_tensors_to_one_file": True, "remove_duplicate_initializers": False}
        passes["tie"] = {**tie, **save}
    device, provider = ("gpu", "CUDA") if wanted["precision"] == "fp16" else ("cpu", "CPU")
    target = {"device": device, "execution_providers": [f"{provider}ExecutionProvider"]}
    olive.workflows.run(
        {
            "input_model": {"type": "HfModel", "model_path": order["source"], "task": "text-generation"},
            "systems": {"here": {"type": "LocalSystem", "accelerators": [target]}},
            "passes": passes,
            "host": "here",
            "target": "here",
            "cache_dir": order["cache"],
            "output_dir": order["out"],
            "no_artifacts": True,
        }
    )
    if not (Path(order["out"]) / "model.onnx").is_file():
        raise ValueError("it wrote no model.onnx")
    for name in OURS:
        (Path(order["out"]) / name).unlink(missing_ok=True)


def _tied(source: Path) -> bool:
    """Gemma's config.json does not say it: it is the class that does."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    return bool(config.tie_word_embeddings)


def check_options(wanted: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse options that Olive, or the builder behind it, would silently ignore. Raises RunFailure(InternalError)."""
    import inspect

    from onnxruntime_genai.models import builders

    source = inspect.getsource(builders.base)
    extra = wanted.get("extra_options", {})
    odd = [name for name in wanted if name not in known] + [name for name in extra if f'"{name}"' not in source]
    if odd:
        raise RunFailure("InternalError", f"This version of Olive does not know {', '.join(odd)}.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["verdict"]).write_text(json.dumps(main(given)))
