"""Files that a full disk or a kill must not leave by half."""

import json
from pathlib import Path


def write_json(file: Path, value: object) -> None:
    """The whole file or none."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(file)
