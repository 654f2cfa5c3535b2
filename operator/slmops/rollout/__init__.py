"""The rollout state machine, its verdicts and statistics: pure."""
