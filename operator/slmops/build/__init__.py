"""Pure: (resource, resolved inputs) -> manifests. No I/O, no clock, no randomness."""
