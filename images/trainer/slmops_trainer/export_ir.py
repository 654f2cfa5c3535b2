"""Write a Hugging Face model folder as OpenVINO IR with int4 weights and all that slmops-server reads beside it.

    python -m slmops_trainer.export_ir MODEL OUT [--block-size 128]

It is optimum-intel's exporter, whose packages are not in the image: requirements/export.txt names those that fit it.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from slmops_trainer import local
from slmops_trainer.failure import RunFailure

PACKAGES = "requirements/export.txt"  # of the repository


def command(model: Path, out: Path, block_size: int) -> list[str]:
    """What optimum-cli is told: linear layers of 4 bits, symmetric, in blocks. Pure."""
    return [
        *("optimum-cli", "export", "openvino", "--model", str(model), "--task", "text-generation-with-past"),
        *("--weight-format", "int4", "--sym", "--group-size", str(block_size), "--ratio", "1.0", str(out)),
    ]


def export(model: Path, out: Path, block_size: int) -> None:
    """Fill the folder. ImportError where optimum-intel is not installed, RunFailure for what it would get wrong."""
    from optimum.commands.optimum_cli import main as optimum_cli

    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "model"
        if local.checked(model, copy).get("attn_logit_softcapping"):
            raise RunFailure(
                "UnsupportedModel",
                f"{model} caps what is attended to (attn_logit_softcapping), which optimum-intel leaves out. Serve it "
                "as ONNX (QuantizedModel).",
            )
        told, sys.argv = sys.argv, command(copy, out, block_size)
        try:
            optimum_cli()
        finally:
            sys.argv = told


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="slmops_trainer.export_ir", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--block-size", type=int, default=128, choices=(32, 64, 128))
    given = parser.parse_args(arguments)
    try:
        export(given.model, given.out, given.block_size)
    except ImportError as error:
        print(f"Cannot make {given.out}: {error}. It takes the packages of {PACKAGES}", file=sys.stderr)
        return 1
    except (OSError, RunFailure) as error:
        print(f"Cannot make {given.out}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
