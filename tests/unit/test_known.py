"""Who is woken by which event."""

from typing import Any

from tests.unit.objects import ARTIFACT, Object, at, finetune, job, ours, pod

from slmops.cluster.port import Key
from slmops.handlers.known import Known, Note, note_of

TUNE = Key("FineTuneJob", "ns", "tune")
NEXT = Key("FineTuneJob", "ns", "next")


def event(obj: Object, kind: str | None = "MODIFIED") -> Note:
    return note_of({"type": kind, "object": obj})


def next_of(name: str = "tune", **more: Any) -> Object:
    obj = finetune(base={"ref": {"kind": "FineTuneJob", "name": name}}, name="next", **more)
    obj["metadata"]["uid"] = "next-uid"
    return obj


def ready(reason: str = "Running", status: str = "False", **more: Any) -> Object:
    return {
        "phase": reason,
        "conditions": [
            {"type": "Ready", "status": status, "reason": reason, "message": "", "lastTransitionTime": at(0)}
        ],
        **more,
    }


def test_an_object_wakes_itself_and_its_children_wake_it() -> None:
    known = Known()
    assert known.concerned(event(finetune(), None)) == {TUNE}
    assert known.concerned(event(job(finetune()))) == {TUNE}
    assert known.concerned(event(pod(finetune()))) == {TUNE}


def test_a_child_seen_before_its_owner_wakes_it_by_reference() -> None:
    assert Known().concerned(event(job(finetune()), None)) == {TUNE}
    assert Known().concerned(event(pod(finetune()), None)) == set()  # a pod's owner is its Job


def test_dependents_are_woken_by_news_alone() -> None:
    known = Known()
    known.concerned(event(next_of(), None))
    assert known.concerned(event(finetune(ready()))) == {TUNE, NEXT}
    assert known.concerned(event(finetune(ready(progress={"percent": 5})))) == set()
    done = finetune(ready("Succeeded", "True", artifact=ARTIFACT))
    assert known.concerned(event(done)) == {NEXT}
    assert known.concerned(event(done, "DELETED")) == {TUNE, NEXT}


def test_its_own_status_does_not_wake_an_object_but_what_users_change_does() -> None:
    known = Known()
    assert known.concerned(event(finetune(), None)) == {TUNE}
    assert known.concerned(event(finetune(ready()))) == set()
    assert known.concerned(event(finetune(ready(), generation=2))) == {TUNE}
    annotated = finetune(ready(), generation=2)
    annotated["metadata"]["annotations"] = {"slmops.dev/retry": "*"}
    assert known.concerned(event(annotated)) == {TUNE}
    assert known.concerned(event(annotated)) == set()
    deployment = ours("ModelDeployment", {}, name="d")
    key = Key("ModelDeployment", "ns", "d")
    assert known.concerned(event(deployment, None)) == {key}
    assert known.concerned(event({**deployment, "status": ready()})) == set()


def test_a_new_object_of_the_same_name_is_news() -> None:
    known = Known()
    known.concerned(event(next_of(), None))
    known.concerned(event(finetune(ready())))
    again = finetune(ready())
    again["metadata"]["uid"] = "other"
    assert known.concerned(event(again)) == {TUNE, NEXT}


def test_who_no_longer_names_it_is_no_longer_woken() -> None:
    known = Known()
    known.concerned(event(next_of(), None))
    known.concerned(event(next_of(), "DELETED"))
    assert known.concerned(event(finetune(ready()))) == {TUNE}


def test_other_namespaces_are_other_worlds() -> None:
    known = Known()
    other = next_of()
    other["metadata"]["namespace"] = "elsewhere"
    known.concerned(event(other, None))
    assert known.concerned(event(finetune(ready()))) == {TUNE}


def test_phases_are_counted() -> None:
    known = Known()
    known.concerned(event(finetune(ready())))
    known.concerned(event(next_of()))
    assert known.phases() == {("FineTuneJob", "Running"): 1, ("FineTuneJob", "Unknown"): 1}
    known.concerned(event(finetune(), "DELETED"))
    assert known.phases() == {("FineTuneJob", "Unknown"): 1}


def test_what_a_pass_did_not_find_is_forgotten_and_those_who_name_it_are_told() -> None:
    known = Known()
    known.concerned(event(finetune(ready()), None))
    known.concerned(event(next_of(), None))
    assert known.gone(TUNE) == {NEXT}
    assert known.phases() == {("FineTuneJob", "Unknown"): 1}
    assert known.gone(TUNE) == set()
    assert known.concerned(event(finetune(), "DELETED")) == {TUNE, NEXT}  # told late: one look too many


def test_of_annotations_our_verbs_alone_wake() -> None:
    known = Known()
    obj = finetune(ready())
    known.concerned(event(obj, None))
    metadata = obj["metadata"]
    applied = {"kubectl.kubernetes.io/last-applied-configuration": "x" * 200_000}
    note = event({**obj, "metadata": {**metadata, "annotations": applied}})
    assert known.concerned(note) == set()
    assert len(str(note.asked)) < 1000  # it is kept for every object
    assert known.concerned(event({**obj, "metadata": {**metadata, "annotations": {"slmops.dev/retry": "*"}}})) == {TUNE}


def test_names_do_not_pile_up() -> None:
    """A source that nobody names any more leaves nothing behind, however many there were."""
    known = Known()
    for number in range(100):
        for kind in (None, "DELETED"):
            known.concerned(event(next_of(f"source-{number}"), kind))
    assert known._named_by == {}  # memory shows from inside alone


def test_another_source_is_news_to_those_that_name_it() -> None:
    """It may have closed a circle, though its own condition says what it said before."""
    known = Known()
    known.concerned(event(next_of(), None))
    waits = finetune(ready("SourceNotReady"))
    known.concerned(event(waits))
    other = {**waits, "spec": {**waits["spec"], "base": {"ref": {"kind": "FineTuneJob", "name": "next"}}}}
    assert known.concerned(event(other)) == {NEXT}


def test_a_circle_of_names_is_known_with_its_last_note() -> None:
    known = Known()

    def names(name: str, *others: str) -> bool:
        refs = {
            field: {"ref": {"kind": "FineTuneJob", "name": n}}
            for field, n in zip(("base", "source"), others, strict=False)
        }
        obj = ours("FineTuneJob", refs, name=name)
        obj["metadata"]["uid"] = name
        known.concerned(event(obj))
        return known.circular(Key("FineTuneJob", "ns", name))

    assert not known.circular(TUNE)  # nobody has told of it
    assert not names("a", "b")
    assert not names("c", "b", "d")
    assert names("b", "d", "a")
    assert not names("c", "b", "d")  # it waits for a circle, but is in none
    assert not names("b", "d")
    assert names("d", "d")
    assert not names("b", "d")


def test_a_circle_does_not_leave_its_namespace() -> None:
    known = Known()
    for namespace, name, other in (("ns", "a", "b"), ("else", "b", "a")):
        obj = ours("FineTuneJob", {"base": {"ref": {"kind": "FineTuneJob", "name": other}}}, name=name)
        obj["metadata"] |= {"uid": name, "namespace": namespace}
        known.concerned(event(obj))
        assert not known.circular(Key("FineTuneJob", namespace, name))


def test_a_teacher_that_begins_to_answer_is_news_though_it_is_not_ready() -> None:
    """Its next revision waits for approval: the one before answers, and that is what a distillation waits for."""
    known = Known()
    spec = {"teacher": {"deploymentRef": {"name": "t"}}, "student": {"uri": "oci://r/m:1"}}
    student = ours("DistillationJob", spec, name="d")
    student["metadata"]["uid"] = "d"
    known.concerned(event(student, None))
    status = ready("Approval")
    known.concerned(event(ours("ModelDeployment", {}, name="t", status=status), None))
    available = {**status["conditions"][0], "type": "Available", "status": "True", "reason": "Answering"}
    status = {**status, "conditions": [*status["conditions"], available]}
    teacher = ours("ModelDeployment", {}, name="t", status=status)
    assert known.concerned(event(teacher)) == {Key("DistillationJob", "ns", "d")}


def test_a_child_of_a_kind_that_we_do_not_have_concerns_nobody() -> None:
    child = pod(finetune())
    child["metadata"]["ownerReferences"] = [{"apiVersion": "slmops.dev/v9", "kind": "Wonder", "name": "x", "uid": "x"}]
    child["metadata"]["labels"] = {}
    assert Known().concerned(event(child)) == set()
