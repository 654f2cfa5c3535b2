"""`python -m slmops_router`."""

import sys

from slmops_router.main import main

if __name__ == "__main__":
    sys.exit(main())
