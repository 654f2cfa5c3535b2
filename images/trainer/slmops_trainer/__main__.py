"""`python -m slmops_trainer`."""

import sys

from slmops_trainer.main import main

if __name__ == "__main__":
    sys.exit(main())
