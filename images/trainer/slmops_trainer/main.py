"""Start: read the spec, answer /progress and /metrics, run the recipe, leave the result. Heavy imports come last."""

import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from slmops.api.run import ENV_GPU, ENV_RUN, EXIT_OK, TERMINATION_LOG, WORK_DIR, RunResult, RunSpec
from slmops_trainer import cpus, result
from slmops_trainer.context import Context
from slmops_trainer.failure import RunFailure, translate
from slmops_trainer.progress import Board, serve

Recipe = Callable[[Context], RunResult]

log = logging.getLogger("slmops")


def main() -> int:
    """Run what SLMOPS_RUN says. Returns the exit status (slmops.api.run.EXIT_*)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # below that it tells of every request, with its whole URL
    termination_log = Path(os.environ.get("SLMOPS_TERMINATION_LOG", TERMINATION_LOG))
    work = Path(os.environ.get("SLMOPS_WORK", WORK_DIR))
    board = Board()
    try:
        serve(board, int(os.environ.get("SLMOPS_METRICS_PORT", "9090")))
        ctx = Context(read_spec(os.environ), _clean(work), board)
    except Exception as error:  # noqa: BLE001  # every end of a run gets a name
        return _fail(translate(error), {}, termination_log, error)
    _stop_on_sigterm(ctx.stop)
    threads = cpus.apply()
    log.info("Run began: %s/%s, %d threads", ctx.spec.namespace, ctx.spec.name, threads)
    try:
        if os.environ.get(ENV_GPU):
            _find_gpu()
        done = recipe(ctx.spec)(ctx)
    except Exception as error:  # noqa: BLE001  # every end of a run gets a name
        failure = translate(error)
        if failure.reason in ("QualityBelowThreshold", "GateFailed"):
            ctx.checkpoints.discard()  # its model is kept aside, and another pod would find that
        return _fail(failure, ctx.metrics, termination_log, error)
    ctx.checkpoints.discard()
    result.write(done, termination_log)
    log.info("Run succeeded: %s", done.artifact.uri if done.artifact else "no artifact")
    return EXIT_OK


def read_spec(env: Mapping[str, str]) -> RunSpec:
    """The spec in SLMOPS_RUN. Raises RunFailure(BadSpec)."""
    text = env.get(ENV_RUN)
    if not text:
        raise RunFailure("BadSpec", f"{ENV_RUN} is not set: this image is started by the slmops operator.")
    try:
        spec = RunSpec.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunFailure(
            "BadSpec",
            f"{ENV_RUN} cannot be read: {where or 'the document'}: {first['msg']}. "
            "Operator and trainer image may be of different versions.",
        ) from error
    check(spec)
    return spec


def check(spec: RunSpec) -> None:
    """Refuse what the spec alone shows to fail, before anything is pulled. Raises RunFailure(BadSpec)."""
    batch = spec.finetune or spec.distill
    if batch is None:
        return
    evaluation = batch.evaluation
    if evaluation is None and batch.training.early_stopping is not None:
        raise RunFailure("BadSpec", "training.earlyStopping needs an evaluation set: give spec.evaluation.")
    unknown = sorted(set(evaluation.thresholds or {}) - set(evaluation.metrics)) if evaluation else []
    if unknown:
        raise RunFailure(
            "BadSpec", f"evaluation.thresholds names {', '.join(unknown)}, which evaluation.metrics does not measure."
        )


def _find_gpu() -> None:
    """Look for the GPU that the pod asks for before anything is pulled or paid for. Raises RunFailure(BadSpec)."""
    from slmops_trainer import models  # torch takes seconds to load

    models.device()


def recipe(spec: RunSpec) -> Recipe:
    """The recipe for what is set in the spec; it is imported only now, for its libraries take seconds to load."""
    if spec.finetune is not None:
        from slmops_trainer import finetune

        return finetune.run
    if spec.distill is not None:
        from slmops_trainer import distill

        return distill.run
    if spec.quantize is not None:
        from slmops_trainer import quantize

        return quantize.run
    raise RunFailure("BadSpec", "The run names nothing to do: one of distill, finetune and quantize must be set.")


def _clean(work: Path) -> Path:
    """Empty the scratch folder: a container that restarts in its pod finds what the last one left."""
    work.mkdir(parents=True, exist_ok=True)
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return work


def _stop_on_sigterm(stop: threading.Event) -> None:
    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the signature of signal handlers
        log.info("Asked to stop")
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def _fail(failure: RunFailure, metrics: Mapping[str, float], termination_log: Path, error: Exception) -> int:
    known = failure.reason != "InternalError"
    log.error("Run failed: %s: %s", failure.reason, failure.message, exc_info=None if known else error)
    result.write(result.failed(failure, dict(metrics)), termination_log)
    return failure.exit_code
