"""What a QuantizedModel has computed, kept in its checkpoint: the converted model, and what was measured of it.

A pod that follows, because the node or the store went away, neither converts nor measures again. In a registry it costs
one upload: the layers of the checkpoint are those of the artifact that is published in the end.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops_trainer import evaluate

if TYPE_CHECKING:
    from slmops_trainer.context import Context

PART = "conversion"  # the checkpoint's subfolder
MODEL, ORIGIN, MEASURED = "model", "origin.json", "measured.json"

log = logging.getLogger("slmops")


def recall(ctx: "Context", origin: Mapping[str, Any]) -> Path | None:
    """The folder of the converted model, if an earlier pod made it from the same. Raises the failures of the store.

    `origin`: all that decides what comes out. A tag may have moved since, or the trainer may be another one.
    """
    ctx.resume()
    folder = ctx.checkpoints.folder / PART
    if _read(folder / ORIGIN) == origin:
        log.info("Found the model that an earlier pod of this run converted")
        return folder / MODEL
    if folder.exists():
        log.warning("Ignored a conversion of another model, or by other programs")
        shutil.rmtree(folder)
    return None


def keep(ctx: "Context", made: Path, origin: Mapping[str, Any]) -> Path:
    """Move the converted model into the checkpoint and save it, if the store takes it. Returns its new folder."""
    folder = ctx.checkpoints.folder / PART
    folder.mkdir(parents=True, exist_ok=True)
    made.rename(folder / MODEL)
    (folder / ORIGIN).write_text(json.dumps(origin))
    ctx.keep()
    return folder / MODEL


def measured(ctx: "Context", examples: str) -> dict[str, float]:
    """What an earlier pod measured of the converted model, as it is measured now, on the examples with this digest.

    Empty if nothing.
    """
    found = _read(ctx.checkpoints.folder / PART / MEASURED)
    same = found.get("examples") == examples and found.get("scoring") == evaluate.SCORING
    return dict(found["metrics"]) if same else {}


def note(ctx: "Context", examples: str, metrics: Mapping[str, float]) -> None:
    """Keep what was measured."""
    path = ctx.checkpoints.folder / PART / MEASURED
    path.write_text(json.dumps({"examples": examples, "scoring": evaluate.SCORING, "metrics": dict(metrics)}))
    ctx.keep()


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
