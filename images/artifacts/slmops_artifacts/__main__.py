"""`python -m slmops_artifacts`."""

from .cli import main

raise SystemExit(main())
