"""A real single-node Kubernetes on a bare Debian machine, for the demo and the tests."""
