"""Entry point for both `python3 -m localkube` and `python3 e2e/localkube`."""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from localkube.cli import main

sys.exit(main())
