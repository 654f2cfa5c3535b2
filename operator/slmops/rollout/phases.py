"""Names of the phases, and how often the world is asked again."""

STABLE, PREPARING, STEP, PROMOTING, DRAINING = "Stable", "Preparing", "Step", "Promoting", "Draining"
ROLLING_BACK, ROLLED_BACK = "RollingBack", "RolledBack"
ROLLING_OUT = (PREPARING, STEP, PROMOTING)

ROUTER_SECONDS = 1.0  # until a router is asked again whether it has the weights
SILENT_SECONDS = 5.0  # until a router that does not answer is asked again
READY_SECONDS = 2.0  # until the routers are asked again whether they reach new pods; pods themselves wake us
SAMPLES_SECONDS = 2.0  # until the routers are asked again for a number of requests that a step waits for
TOLD_SECONDS = 10.0  # and for one that is merely told

LOSSES_MAX = 3  # times that a candidate's pods may fall over by themselves; what nodes and drains take is not counted
RETIRING_MAX = 6  # revisions kept on their way out: with stable and candidate as many as a router takes
