"""`python -m slmops_server` is `slmops-server`."""

import signal
import sys

# Process 1 of a container hears SIGTERM by a handler only, and until main has its own nothing runs that has to end.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

from slmops_server.main import main  # noqa: E402  # it takes a second, in which a pod may be given up

sys.exit(main())
