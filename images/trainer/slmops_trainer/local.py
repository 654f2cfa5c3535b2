"""A model folder of this machine as a run of the operator takes it: for commands that are started by hand."""

import shutil
from pathlib import Path
from typing import Any

from slmops_trainer import models

SMALL = (".json", ".txt", ".model", ".jinja")  # what there is of a model beside its weights; no code, no pickle


def checked(source: Path, copy: Path) -> dict[str, Any]:
    """Fill the folder `copy` with the model, mended, its weights by links; its config. RunFailure as in models.check.

    `source` is left as it is.
    """
    copy.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            (copy / path.name).symlink_to(path.resolve())
        elif path.suffix in SMALL and path.is_file():
            shutil.copyfile(path, copy / path.name)
    template = source / models.TOOL_TEMPLATE
    if template.is_file():
        (copy / models.TOOL_TEMPLATE).parent.mkdir()
        shutil.copyfile(template, copy / models.TOOL_TEMPLATE)
    return models.check(copy, str(source))
