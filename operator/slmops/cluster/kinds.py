"""Where each kind lives in the API."""

from dataclasses import dataclass
from urllib.parse import quote

from slmops.api.keys import API_VERSION, GROUP, VERSION


@dataclass(frozen=True)
class Place:
    """Group, version and plural of a namespaced kind."""

    group: str  # empty for the core group
    version: str
    plural: str
    ours: bool = False

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        """The URL path of the collection, of an object in it, or of a subresource.

        Names are quoted: those in owner references are what somebody wrote there, slashes too.
        """
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = ["namespaces", namespace, self.plural, name, subresource]
        return "/".join([root, *(quote(part, safe="") for part in parts if part)])


PLACES = {
    "DistillationJob": Place(GROUP, VERSION, "distillationjobs", ours=True),
    "FineTuneJob": Place(GROUP, VERSION, "finetunejobs", ours=True),
    "QuantizedModel": Place(GROUP, VERSION, "quantizedmodels", ours=True),
    "ModelDeployment": Place(GROUP, VERSION, "modeldeployments", ours=True),
    "Job": Place("batch", "v1", "jobs"),
    "Deployment": Place("apps", "v1", "deployments"),
    "PodDisruptionBudget": Place("policy", "v1", "poddisruptionbudgets"),
    "HorizontalPodAutoscaler": Place("autoscaling", "v2", "horizontalpodautoscalers"),
    "Pod": Place("", "v1", "pods"),
    "Service": Place("", "v1", "services"),
    "ServiceAccount": Place("", "v1", "serviceaccounts"),
    "ConfigMap": Place("", "v1", "configmaps"),
    "Secret": Place("", "v1", "secrets"),
    "PersistentVolumeClaim": Place("", "v1", "persistentvolumeclaims"),
    "Event": Place("", "v1", "events"),
}

OURS = tuple(kind for kind, place in PLACES.items() if place.ours)

__all__ = ["API_VERSION", "OURS", "PLACES", "Place"]
