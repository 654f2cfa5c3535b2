"""The router of a ModelDeployment: HAProxy, and beside it an agent that sets its routes. Standard library only."""
