"""Pure decisions, `decide(resource, observed, now) -> Plan`, and the one driver that carries them out."""
