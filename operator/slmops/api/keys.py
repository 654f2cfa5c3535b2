"""Names that are part of the API: group, labels, annotations, child names."""

import hashlib

GROUP = "slmops.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
CATEGORY = "slm"
FIELD_MANAGER = "slmops"

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "slmops"
LABEL_KIND = f"{GROUP}/kind"  # DistillationJob, ...: the owner's kind
LABEL_OWNER = f"{GROUP}/owner"  # the owner's name, cut to a valid label value
LABEL_OWNER_UID = f"{GROUP}/owner-uid"
LABEL_ROLE = f"{GROUP}/role"  # worker | server | router
LABEL_REVISION = f"{GROUP}/revision"  # a model revision of a ModelDeployment
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"

ANNOTATION_PROMOTE = f"{GROUP}/promote"  # value: the revision meant, or "*"
ANNOTATION_ABORT = f"{GROUP}/abort"
ANNOTATION_RETRY = f"{GROUP}/retry"
ANNOTATION_PAUSE = f"{GROUP}/pause"

ROLE_WORKER = "worker"
ROLE_SERVER = "server"
ROLE_ROUTER = "router"

API_PORT = 8000  # OpenAI API, of servers and of routers
METRICS_PORT = 9090  # /metrics and, in workers, /progress

DNS_LABEL_MAX = 63


def child_name(owner: str, role: str = "", limit: int = DNS_LABEL_MAX) -> str:
    """`<owner>-<role>`, cut to `limit` characters with a hash of the whole name so that two long names stay apart."""
    full = f"{owner}-{role}" if role else owner
    full = full.replace(".", "-") if len(full) <= limit else full
    if len(full) <= limit and "." not in owner:
        return full
    digest = hashlib.sha256(f"{owner}/{role}".encode()).hexdigest()[:8]
    tail = f"-{role}-{digest}" if role else f"-{digest}"
    return owner.replace(".", "-")[: limit - len(tail)].rstrip("-") + tail


def label_value(name: str) -> str:
    """`name` as a label value: at most 63 characters, with a hash where it had to be cut."""
    if len(name) <= DNS_LABEL_MAX:
        return name
    return name[:54].rstrip("-.") + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
