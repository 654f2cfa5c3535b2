"""What a ModelDeployment is made of comes back as soon as somebody takes it away, and not at the next resync."""

from tests.kube.api import Api, wait_for
from tests.kube.conftest import Start
from tests.kube.serving import Nodes
from tests.kube.test_rollout_killed import CHAT, model, phase, stable


def test_a_service_that_is_deleted_comes_back_at_once(api: Api, start: Start) -> None:
    start(SLMOPS_ROUTER_KEY="k" * 32).until_ready()
    api.create("ModelDeployment", "chat", spec={"model": model("a")})
    with Nodes(api):
        wait_for("it to serve", lambda: phase(api) == "Stable" and api.reason(*CHAT) == "Serving", seconds=120)
        for name in ("chat", f"chat-{stable(api)}"):
            old = api.need("Service", name)
            api.delete("Service", name)
            back = wait_for(f"Service {name}", lambda name=name: api.get("Service", name))
            assert back["metadata"]["uid"] != old["metadata"]["uid"]
