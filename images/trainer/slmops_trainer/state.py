"""The training state on disk: weights, optimizer, random numbers, counters. Safetensors and JSON, never a pickle."""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from slmops.api.batch import Training
from slmops_trainer.encoding import Encoded

WEIGHTS, BEST, OPTIMIZER, RANDOM, COUNTERS = (
    "weights.safetensors",
    "best.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "counters.json",
)


@dataclass
class Counters:
    """Where the run stands after a whole optimizer step.

    `loss` is smoothed, `seconds` were spent training, `measured` is the step of the last evaluation, `least` the least
    evaluation loss, that of the weights in BEST, `best` the last that was less by minDelta, and `waited` counts the
    evaluations since. `evaluation` is the digest of the rows that were measured, empty in a state of an older trainer.
    """

    fingerprint: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    least: float | None = None
    best: float | None = None
    waited: int = 0
    measured: int = 0
    done: bool = False
    evaluation: str = ""

    def forget_evaluations(self) -> None:
        """Measure anew from here on: losses of other rows cannot be compared."""
        self.least, self.best, self.waited, self.measured = None, None, 0, 0


def fingerprint(model: Any, encoded: Sequence[Encoded], training: Training, base: str) -> str:
    """Changes with everything that a resumed run must have in common with the run that was saved.

    `base`: the digest of what the model was before training, for shapes alone do not tell one from another.
    """
    digest = hashlib.sha256(json.dumps([training.wire(), base], sort_keys=True).encode())
    for name, parameter in trainable(model).items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    _add(digest, encoded)
    return digest.hexdigest()


def rows_digest(encoded: Sequence[Encoded]) -> str:
    """Changes with every token of the rows."""
    digest = hashlib.sha256()
    _add(digest, encoded)
    return digest.hexdigest()


def trainable(model: Any) -> dict[str, Any]:
    """The parameters that training changes, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(folder: Path, model: Any, optimizer: Any, counters: Counters) -> None:
    """Write the state, replacing an older one, whose best weights stay. A finished run needs its weights only."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    parameters = trainable(model)
    _save_weights(model, fresh / WEIGHTS)
    if counters.least is not None:
        os.link(folder / BEST, fresh / BEST)
    if not counters.done:
        names = {id(parameter): name for name, parameter in parameters.items()}
        save_file(
            {
                f"{names[id(parameter)]}/{key}": value.contiguous()
                for parameter, entries in optimizer.state.items()
                for key, value in entries.items()
            },
            fresh / OPTIMIZER,
        )
        save_file(randoms(), fresh / RANDOM)
    (fresh / COUNTERS).write_text(json.dumps(asdict(counters)))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def save_best(folder: Path, model: Any) -> None:
    """Keep these weights beside the state, as the best so far."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{BEST}.new"
    _save_weights(model, fresh)
    fresh.replace(folder / BEST)


def restore_best(folder: Path, model: Any) -> None:
    """Bring the best weights into the model."""
    _load_weights(folder / BEST, model)


def read_counters(folder: Path) -> Counters | None:
    """The counters of a saved state, None where there is none. What only another version knows begins anew."""
    path = folder / COUNTERS
    if not path.is_file():
        return None
    said, known = json.loads(path.read_text()), {field.name for field in fields(Counters)}
    counters = Counters(**{name: value for name, value in said.items() if name in known})
    if not (folder / BEST).is_file():
        counters.forget_evaluations()
    return counters


def restore(folder: Path, model: Any, optimizer: Any, counters: Counters) -> None:
    """Bring the saved state into the model and the optimizer."""
    _load_weights(folder / WEIGHTS, model)
    if counters.done:
        return
    parameters = trainable(model)
    index = {id(parameter): at for at, parameter in enumerate(_in_order(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(folder / OPTIMIZER).items():
        name, _, entry = key.rpartition("/")
        state.setdefault(index[id(parameters[name])], {})[entry] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    set_randoms(load_file(folder / RANDOM))


def randoms() -> dict[str, Any]:
    """Where torch's random numbers stand, by device."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_randoms(saved: dict[str, Any]) -> None:
    """Go back to where the random numbers stood."""
    torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def _add(digest: "hashlib._Hash", encoded: Sequence[Encoded]) -> None:
    for row in encoded:
        digest.update(array("q", row.input_ids).tobytes())
        digest.update(array("q", row.labels).tobytes())


def _save_weights(model: Any, path: Path) -> None:
    save_file({name: value.detach().contiguous() for name, value in trainable(model).items()}, path)


def _load_weights(path: Path, model: Any) -> None:
    saved = load_file(path)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(saved[name])


def _in_order(optimizer: Any) -> list[Any]:
    """The parameters in the order in which the optimizer's state counts them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
