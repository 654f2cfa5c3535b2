"""The rollout of a new revision: identity, verdicts, and the state machine. Pure: no I/O, no clock."""
