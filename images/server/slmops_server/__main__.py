"""`python -m slmops_server` is `slmops-server`."""

import sys

from slmops_server.main import main

sys.exit(main())
