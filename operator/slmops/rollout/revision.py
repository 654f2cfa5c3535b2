"""The identity of a revision: a hash of what the user declared, never of what the operator adds.

So an upgrade of the operator, with other defaults or another pod template, makes no new revision. `hashVersion` says
how it was made: should a later operator hash more, it still knows the revisions of before by their version.
"""

import hashlib
import json

from slmops.api.deployment import AUTO, ModelDeploymentSpec, Revision
from slmops.api.run import Input

HASH_VERSION = 1
LENGTH = 10


def identify(name: str, spec: ModelDeploymentSpec, model: Input, digest: str) -> Revision:
    """Compute the revision that the spec of object `name` asks for, its model resolved to `model`.

    `digest` is the artifact's, for a model named by reference; empty for one named by URI, whose URI is its identity.
    """
    served_name = spec.served_name or name
    keys = spec.endpoint.api_keys_secret_ref.name if spec.endpoint.api_keys_secret_ref else ""
    inputs = {
        "hashVersion": HASH_VERSION,
        "model": {"digest": digest} if digest else {"uri": model.uri},
        "modelSecret": model.secret or "",
        "engine": {
            "name": AUTO[1] if spec.engine.name in AUTO else spec.engine.name,  # as it was hashed when it got a name
            "image": spec.engine.image or (spec.pod.image if spec.pod else None) or "",
            "args": spec.engine.args or [],
        },
        "pod": _pod(spec),
        "servedName": served_name,
        "apiKeys": keys,
    }
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return Revision(
        revision=hashlib.sha256(text.encode()).hexdigest()[:LENGTH],
        model=model.uri,
        digest=digest,
        source=model.name,
        served_name=served_name,
        api_keys_secret=keys,
        hash_version=HASH_VERSION,
    )


def _pod(spec: ModelDeploymentSpec) -> dict[str, object]:
    """What the user set of the pod, the image apart; empty parts count as unset."""
    wire = spec.pod.wire() if spec.pod else {}
    return {key: value for key, value in wire.items() if key != "image" and value not in ({}, [], None)}
