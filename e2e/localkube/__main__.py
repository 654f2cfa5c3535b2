"""Entry point for both `python3 -m localkube` and `python3 e2e/localkube`."""

import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  # said before an import fails with less clear words
    sys.exit(f"failed: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from localkube.cli import main

sys.exit(main())
