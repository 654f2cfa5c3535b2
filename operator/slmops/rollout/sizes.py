"""How many pods a share of the requests needs."""


def candidate_pods(replicas: int, weight: int) -> int:
    """Pods for `weight` percent of what `replicas` pods carry: rounded up, at least one where there are any."""
    return min(replicas, max(1, -(-replicas * weight // 100)))
