"""`python -m slmops_artifacts`."""

import signal

from .cli import main

# As process 1 of a container it hears SIGTERM only this way; a pod that still pulls would take all of its grace.
signal.signal(signal.SIGTERM, signal.default_int_handler)
raise SystemExit(main())
