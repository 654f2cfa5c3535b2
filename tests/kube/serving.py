"""What is not there for a ModelDeployment: the Deployment controller, the kubelet, and the agents of router pods."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.kube.api import Api, ApiError, Object
from tests.kube.looking import Looking

from slmops.api import keys
from slmops.remote.router import AGENT_PORT

_ADDRESSES = itertools.count(1)


class Agent(ThreadingHTTPServer):
    """An agent that obeys: on an address of its own, with the routes of the ConfigMap until it is told others."""

    daemon_threads = True

    def __init__(self, address: str, routes: Object, ready: dict[str, int]) -> None:
        self.routes, self.ready = routes, ready
        super().__init__((address, AGENT_PORT), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def observed(self) -> Object:
        revisions = {
            r["revision"]: {"weight": r["weight"], "ready": self.ready.get(r["revision"], 0)}
            for r in self.routes["revisions"]
        }
        return {"routes": self.routes, "epoch": self.routes["epoch"], "turns": 0, "revisions": revisions}


class _Handler(BaseHTTPRequestHandler):
    server: Agent

    def do_GET(self) -> None:
        self._say()

    def do_PUT(self) -> None:
        self.server.routes = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._say()

    def _say(self) -> None:
        payload = json.dumps(self.server.observed()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        pass


class Nodes(Looking):
    """A thread that keeps as many ready pods of every Deployment as it wants; `with` starts and stops it."""

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self.agents: dict[str, Agent] = {}  # by pod
        self.ready: dict[str, int] = {}  # pods by revision

    def end(self) -> None:
        """Stop the agents."""
        for agent in self.agents.values():
            agent.shutdown()
            agent.server_close()

    def weights(self) -> list[dict[str, int]]:
        """What every router does."""
        return [{r["revision"]: r["weight"] for r in a.routes["revisions"]} for a in list(self.agents.values())]

    def look(self) -> None:
        """Give every Deployment the pods that it lacks, and every router's pod its agent."""
        pods = {pod["metadata"]["name"] for pod in self.api.list("Pod")}
        wanted: dict[str, Object] = {}
        for found in self.api.list("Deployment"):
            for number in range(found["spec"]["replicas"]):
                wanted[f"{found['metadata']['name']}-{number}"] = found
        for name in pods - wanted.keys():
            self.api.delete("Pod", name)
            if name in self.agents:
                agent = self.agents.pop(name)
                agent.shutdown()
                agent.server_close()
        self.ready.clear()
        for found in wanted.values():
            revision = found["metadata"]["labels"].get(keys.LABEL_REVISION, "")
            self.ready[revision] = self.ready.get(revision, 0) + 1
        for name, found in wanted.items():
            if name not in pods:
                self._start(name, found)

    def _start(self, name: str, deployment: Object) -> None:
        number = next(_ADDRESSES)
        address = f"127.9.{number // 250}.{number % 250 + 1}"
        template = deployment["spec"]["template"]
        if template["metadata"]["labels"][keys.LABEL_ROLE] == keys.ROLE_ROUTER:
            stored = self.api.need("ConfigMap", deployment["metadata"]["name"])
            self.agents[name] = Agent(address, json.loads(stored["data"]["routes.json"]), self.ready)
        try:
            self.api.create("Pod", name, metadata={"labels": template["metadata"]["labels"]}, spec=template["spec"])
        except ApiError as error:
            if error.status != 409:  # it is still being deleted
                raise
            return
        ready = [{"type": "Ready", "status": "True"}]
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": ready}
        self.api.patch("Pod", name, {"status": status}, "status")
