"""The scripted teacher of e2e/scenarios/fake_teacher.py as a Service in a scenario's namespace."""

import json
import uuid

from kit import pods
from kit.kubectl import ROOT, Kubectl, wait_for

SCRIPT = ROOT / "e2e/scenarios/fake_teacher.py"


class Teacher:
    """Service `name` on port 8000."""

    def __init__(self, kube: Kubectl, image: str, *mode: str, name: str = "teacher") -> None:
        """Applied, and ready. `image` has Python; `mode`: the script's arguments."""
        self.kube, self.name = kube, name
        # What the same teacher answered an earlier object is not asked again, and the registry outlives a run of tests.
        self._model = f"any-{uuid.uuid4().hex[:8]}"
        files = {"configMap": {"name": name}}
        made = pods.spec(image, ["python3", "/files/fake_teacher.py", *mode], mounts={"/files": files})
        kube.apply(pods.config_map(name, {"fake_teacher.py": SCRIPT.read_text(encoding="utf-8")}))
        kube.apply(*pods.served(name, made, 8000))
        kube.run("rollout", "status", f"deployment/{name}", "--timeout=60s", timeout=70)

    @property
    def endpoint(self) -> dict[str, str]:
        """For spec.teacher.endpoint."""
        return {"url": f"http://{self.name}.{self.kube.namespace}.svc:8000/v1", "model": self._model}

    def asked(self, path: str = "asked") -> dict[str, int]:
        """How often each question was answered."""
        script = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/{path}').read().decode())"
        found: dict[str, int] = json.loads(
            self.kube.run("exec", f"deployment/{self.name}", "--", "python3", "-c", script)
        )
        return found

    def answered(self, count: int, timeout: float) -> None:
        """Wait until so many answers were given. Raises TimedOut."""
        wait_for(f"{count} answers", lambda: sum(self.asked().values()) >= count, timeout)

    def revive(self) -> None:
        """Up again after `down-after`, sane after `garbage`."""
        self.asked("revive")
