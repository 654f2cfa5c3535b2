"""What has to be in the namespace before a pod starts, against the cluster in memory."""
# ruff: noqa: E501  # tables: one row a line

from pathlib import Path
from typing import Any

import pytest
from tests.unit.objects import Object, finetune

from slmops.api.distillation import DistillationJobSpec
from slmops.api.finetune import FineTuneJobSpec
from slmops.build.inputs import Inputs, inputs
from slmops.cluster.memory import MemoryCluster
from slmops.reconcile import needs
from slmops.reconcile.state import Retry
from slmops_trainer import data
from slmops_trainer.failure import RunFailure


def config_map(name: str, **data: str) -> Object:
    return {"kind": "ConfigMap", "metadata": {"name": name, "namespace": "ns"}, "data": data}


def secret(name: str, **data: str) -> Object:
    return {"kind": "Secret", "metadata": {"name": name, "namespace": "ns"}, "data": data}


def needed(**spec: Any) -> Inputs:
    return inputs(FineTuneJobSpec.model_validate(finetune(**spec)["spec"]))


SPEC: dict[str, Any] = {
    "base": {"uri": "hf://a/b", "secretRef": {"name": "hub"}},
    "dataset": {"configMap": {"name": "data", "key": "train"}},
}
GOOD = '{"prompt": "a", "completion": "b"}\n'

MISSING: dict[str, tuple[list[Object], str, str]] = {
    "no Secret": ([], "SecretNotFound", "Secret hub does not exist"),
    "no ConfigMap": ([secret("hub")], "ConfigMapNotFound", "ConfigMap data does not exist"),
    "no key": ([secret("hub"), config_map("data", other="")], "ConfigMapNotFound", "has no key train; its keys: other"),
    "not JSON": ([secret("hub"), config_map("data", train=GOOD + "\n{oops\n")], "BadDataset", "line 3: not JSON"),
    "not an object": ([secret("hub"), config_map("data", train="[1]")], "BadDataset", "line 1: not a JSON object"),
    "bottomless": ([secret("hub"), config_map("data", train="[" * 99_999)], "BadDataset", "line 1: not JSON"),
    "empty": ([secret("hub"), config_map("data", train="\n\n")], "BadDataset", "no example"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(name: str) -> None:
    there, reason, words = MISSING[name]
    cluster = MemoryCluster()
    for obj in there:
        cluster.put(obj)
    with pytest.raises(Retry, match=words) as caught:
        needs.check(cluster, "ns", needed(**SPEC))
    assert (caught.value.reason, caught.value.after) == (reason, needs.RECHECK_SECONDS)


def test_the_keys_that_a_secret_has_are_not_told() -> None:
    """Who may read the status may not read Secrets, and a key may be a user's name."""
    cluster = MemoryCluster()
    cluster.put(secret("clients", alice="YQ=="))
    with pytest.raises(Retry) as caught:
        needs.check(cluster, "ns", Inputs(secrets={"clients": {"token"}}))
    assert (caught.value.reason, str(caught.value)) == ("SecretNotFound", "Secret clients has no key token.")


def test_the_hash_follows_contents() -> None:
    cluster = MemoryCluster()
    cluster.put(secret("hub", token="x"))
    cluster.put(config_map("data", train=GOOD))
    first = needs.check(cluster, "ns", needed(**SPEC))
    assert needs.check(cluster, "ns", needed(**SPEC)) == first
    cluster.put(config_map("data", train=GOOD, unrelated="x"))
    assert needs.check(cluster, "ns", needed(**SPEC)) == first
    cluster.put(config_map("data", train=GOOD + GOOD))
    second = needs.check(cluster, "ns", needed(**SPEC))
    cluster.put(secret("hub", token="y"))
    third = needs.check(cluster, "ns", needed(**SPEC))
    maps, secrets = zip(*(found.split(".") for found in (first, second, third)), strict=True)
    assert [len(set(maps)), len(set(secrets))] == [2, 2]
    assert maps[1] == maps[2]  # a Secret's change shows in its own part alone
    assert secrets[0] == secrets[1]


def test_what_is_not_needed_has_no_hash() -> None:
    cluster = MemoryCluster()
    cluster.put(secret("hub", token="x"))
    cluster.put(config_map("data", train=GOOD))
    assert needs.check(cluster, "ns", needed()) == ""
    assert needs.check(cluster, "ns", needed(base=SPEC["base"])).startswith(".")
    assert needs.check(cluster, "ns", needed(dataset=SPEC["dataset"])).endswith(".")


def test_lines_end_with_newlines_alone() -> None:
    cluster = MemoryCluster()
    cluster.put(config_map("data", train='{"prompt": "a\u2028b\u0085", "completion": "c"}\r\n' + GOOD))
    assert needs.check(cluster, "ns", needed(dataset=SPEC["dataset"]))


def test_a_file_may_begin_with_a_byte_order_mark() -> None:
    cluster = MemoryCluster()
    cluster.put(config_map("data", train="\ufeff" + GOOD))
    assert needs.check(cluster, "ns", needed(dataset=SPEC["dataset"]))


MAP = {"configMap": {"name": "data", "key": "train"}}
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
ASKED = '{"messages": [{"role": "user", "content": "a"}]}\n'
GERMAN = {"prompt": "frage", "completion": "antwort"}
# text, what more is said of the dataset, and the words of a refusal as training data and as prompts: none, taken
READ: dict[str, tuple[str, Object, str, str]] = {
    "pairs": (GOOD * 2, {}, "", ""),
    "turns": (CHAT * 2, {}, "", ""),
    "turns beside a prompt": ('{"prompt": "a", ' + CHAT[1:], {}, "", ""),
    "a prompt alone": ('{"prompt": "a"}', {}, "line 1 has neither 'messages' nor 'prompt' and 'completion'", ""),
    "prompts with turns that end with the user's": (ASKED, {}, "", ""),
    "neither": ('\n{"q": "a"}', {}, "line 2 has neither 'messages' nor", "line 2 has neither 'messages' nor 'prompt'; "),
    "nothing in a line": ("{}", {}, "it has no column", "it has no column"),
    "an answer is lacking later": (GOOD + '{"prompt": "a"}', {}, "line 2 has no column 'completion'; it has 'pr", ""),
    "a prompt is lacking later": (GOOD + CHAT, {}, "line 2 has no column 'prompt'", "line 2 has no column 'prompt'"),
    "turns are lacking later": (CHAT + GOOD, {}, "line 2 has no column 'messages'", "line 2 has no column 'messages'"),
    "one is lacking beyond the limit": (GOOD + '{"q": "a"}', {"limit": 1}, "", ""),
    "nonsense beyond the limit": (GOOD + "\n" + GOOD + "{oops", {"limit": 2}, "", ""),
    "nonsense within the limit": (GOOD + "\n{oops", {"limit": 2}, "line 3: not JSON", "line 3: not JSON"),
    "fewer than the limit": (GOOD, {"limit": 9}, "", ""),
    "named columns": ('{"frage": "a", "antwort": "b"}', {"columns": GERMAN}, "", ""),
    "a named column that is not there": (GOOD, {"columns": {"prompt": "frage"}}, "'frage' and 'completion'; it", "nor 'frage'; it"),
    "an answer's name that is not there": (GOOD, {"columns": {"completion": "antwort"}}, "nor 'prompt' and 'antwort'", ""),
    "named turns": (CHAT.replace("messages", "chat"), {"columns": {"messages": "chat"}}, "", ""),
    "named turns that are not there": (CHAT, {"columns": {"messages": "chat"}}, "neither 'chat' nor", "neither 'chat' nor"),
    "other turns than the named ones": (GOOD[:-2] + ', "messages": 1}', {"columns": {"messages": "chat"}}, "", ""),
    "pairs are wanted, not turns": (CHAT, {"format": "prompt-completion"}, "no column 'prompt'", "no column 'prompt'"),
    "turns are wanted, not pairs": (GOOD, {"format": "messages"}, "no column 'messages'", "no column 'messages'"),
    "pairs are wanted where both are": (GOOD[:-2] + ', "messages": 1}', {"format": "prompt-completion"}, "", ""),
}  # fmt: skip


@pytest.mark.parametrize("role", ["training", "prompts"])
@pytest.mark.parametrize("name", READ)
def test_a_config_maps_lines_and_columns_are_judged_as_the_worker_does(
    name: str, role: data.Role, tmp_path: Path
) -> None:
    text, more, *refusals = READ[name]
    words = refusals[role == "prompts"]
    dataset = {**MAP, **more}
    if role == "training":
        found = needed(dataset=dataset)
    else:
        endpoint = {"endpoint": {"url": "http://t/v1", "model": "m"}}
        spec = {"teacher": endpoint, "student": {"uri": "hf://a/b"}, "data": {"prompts": dataset}}
        found = inputs(DistillationJobSpec.model_validate(spec))
    cluster = MemoryCluster()
    cluster.put(config_map("data", train=text))
    (tmp_path / "train").write_text(text)
    source = "ConfigMap data, key train"

    def read() -> None:
        data.read(tmp_path / "train", found.datasets[0], role, source)

    if not words:
        needs.check(cluster, "ns", found)
        if (
            name != "prompts with turns that end with the user's" or role == "prompts"
        ):  # those are the worker's to judge
            read()
        return
    with pytest.raises(Retry, match=words) as caught:
        needs.check(cluster, "ns", found)
    assert caught.value.reason == "BadDataset"
    with pytest.raises(RunFailure) as workers:
        read()
    assert workers.value.reason == "BadDataset"
    if "not JSON" not in words:
        assert str(caught.value).partition(". ")[0] == workers.value.message.partition(". ")[0]


SCHEMAS = {"{oops": "is not JSON: ", "[1]": "is no JSON Schema: it has to be an object", '{"type": "object"}': ""}


@pytest.mark.parametrize("text", SCHEMAS)
def test_a_schema_is_no_dataset(text: str) -> None:
    endpoint = {"endpoint": {"url": "http://t/v1", "model": "m"}}
    rules = {"jsonSchema": {"name": "rules", "key": "s"}}
    spec = {"teacher": endpoint, "student": {"uri": "hf://a/b"}, "data": {"prompts": MAP, "filters": rules}}
    found = inputs(DistillationJobSpec.model_validate(spec))
    assert found.config_maps == {"data": {"train"}, "rules": {"s"}}
    cluster = MemoryCluster()
    cluster.put(config_map("data", train=GOOD))
    cluster.put(config_map("rules", s=text))
    if not SCHEMAS[text]:
        assert needs.check(cluster, "ns", found)
        return
    with pytest.raises(Retry, match=rf"ConfigMap rules, key s \(data.filters.jsonSchema\) {SCHEMAS[text]}") as caught:
        needs.check(cluster, "ns", found)
    assert (caught.value.reason, caught.value.after) == ("BadSpec", needs.RECHECK_SECONDS)


def test_what_is_binary_is_the_workers_to_read() -> None:
    cluster = MemoryCluster()
    cluster.put({**config_map("data"), "binaryData": {"train": "e30K"}})
    assert needs.check(cluster, "ns", needed(dataset=MAP))


def test_a_secret_that_is_touched_but_not_changed_is_the_same() -> None:
    """External stores write their Secrets anew every hour: that must not start a failed run again."""
    cluster, wanted = MemoryCluster(), Inputs(secrets={"s": set()})
    made = secret("s", token="YQ==")
    cluster.put(made)
    before = needs.check(cluster, "ns", wanted)
    cluster.put({**made, "metadata": {**made["metadata"], "annotations": {"refreshed": "now"}}})
    assert needs.check(cluster, "ns", wanted) == before
    cluster.put(secret("s", token="Yg=="))
    assert needs.check(cluster, "ns", wanted) != before
