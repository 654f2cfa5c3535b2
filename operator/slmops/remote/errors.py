"""The one error of this layer."""


class RemoteError(Exception):
    """Something outside the Kubernetes API did not answer, or not usefully; asking again may help."""
