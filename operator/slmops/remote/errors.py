"""The errors of this layer."""


class RemoteError(Exception):
    """Something outside the Kubernetes API did not answer, or not usefully; asking again may help."""


class TokenRefusedError(RemoteError):
    """It answers, but takes the token for a wrong one."""
