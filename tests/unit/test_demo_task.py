"""The demo's task: repeatable, strict, and no held-out message in training."""

import json
from collections import Counter

import pytest

from demo import phrases, task

SMALL = task.Sizes(train=1500, prompts=300, heldout=100, tune=150, gate=60)


@pytest.fixture(scope="module")
def sets() -> task.Sets:
    return task.make_sets(3, SMALL)


def trained_on(sets: task.Sets) -> set[str]:
    return {task.key(text) for text in [*sets.prompts, *(e.text for e in sets.train + sets.tune)]}


def held_out(sets: task.Sets) -> list[task.Example]:
    return sets.known + sets.new + sets.security_known + sets.security_new + sets.gate


def test_equal_seeds_give_equal_sets_and_other_seeds_others(sets: task.Sets) -> None:
    assert task.make_sets(3, SMALL) == sets
    assert task.make_sets(4, SMALL).train != sets.train


def test_no_held_out_message_occurs_in_training(sets: task.Sets) -> None:
    seen = trained_on(sets)
    assert not [e.text for e in held_out(sets) if task.key(e.text) in seen]


def test_sets_have_the_sizes_asked_for(sets: task.Sets) -> None:
    assert len(sets.train) == 1500
    assert len(sets.prompts) == 300
    assert len(sets.known) == len(sets.new) == 100
    assert len(sets.tune) == 300


def test_a_leak_would_be_found(sets: task.Sets) -> None:
    shouted = task.Example(sets.train[0].text.upper() + "!!", sets.train[0].answer)
    assert task.key(shouted.text) in trained_on(sets)


def frames(half: phrases.Phrases) -> set[str]:
    groups = [half.openers, half.leads, half.tails, half.closers, half.noise, half.causes]
    groups += [half.problems, half.problems_with_room, half.rooms, half.dues]
    groups += [*half.symptoms.values(), *half.severities.values()]
    return {frame for group in groups for frame in group if frame}


def test_new_phrasings_share_no_frame_with_the_known_ones() -> None:
    assert not frames(phrases.KNOWN) & frames(phrases.NEW)
    assert not set(phrases.SECURITY_KNOWN) & set(phrases.SECURITY_NEW)
    assert len(frames(phrases.KNOWN)) > 250


def test_both_halves_speak_of_the_same_teams_and_severities() -> None:
    assert set(phrases.KNOWN.symptoms) == set(phrases.NEW.symptoms)
    assert set(phrases.KNOWN.severities) == set(phrases.NEW.severities)


def test_every_answer_is_a_strict_ticket(sets: task.Sets) -> None:
    for example in [*sets.train, *held_out(sets)]:
        found = task.parse(example.answer)
        assert found is not None
        assert task.ticket(*found.values()) == example.answer  # type: ignore[arg-type]
        assert found["product"] in phrases.PRODUCTS
        assert found["severity"] in phrases.KNOWN.severities
        assert found["team"] in task.TEAMS


def test_the_message_holds_what_the_ticket_says(sets: task.Sets) -> None:
    for example in sets.train[:500]:
        room = json.loads(example.answer)["room"]
        if room is not None:
            assert room.lower() in example.text.lower()
            assert room[0].lower() in example.text.lower()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "not json",
        '["printer"]',
        '{"product":"printer"}',
        '{"severity":"low","product":"printer","team":"network","room":null,"due":null}',
        '{"product":"printer","severity":"low","team":"network","room":214,"due":null}',
        '{"product":"printer","severity":"low","team":"network","room":null,"due":null,"more":1}',
        '{"product":"printer","severity":"low","team":"network","room":null,"due":null} thanks',
    ],
)
def test_anything_but_the_five_fields_in_order_is_no_ticket(answer: str) -> None:
    assert task.parse(answer) is None


def test_the_teacher_never_sees_the_new_label_and_the_tuner_sees_both(sets: task.Sets) -> None:
    def teams(examples: list[task.Example]) -> Counter[str]:
        return Counter(json.loads(e.answer)["team"] for e in examples)

    assert task.NEW_TEAM not in teams(sets.train)
    assert task.NEW_TEAM not in teams(sets.known + sets.new + sets.gate)
    assert teams(sets.tune)[task.NEW_TEAM] == 150
    assert sum(teams(sets.tune).values()) == 300
    assert set(teams(sets.security_known + sets.security_new)) == {task.NEW_TEAM}


def test_labels_are_balanced_enough(sets: task.Sets) -> None:
    for field, choices in (("product", 12), ("severity", 4), ("team", 5)):
        counts = Counter(json.loads(e.answer)[field] for e in sets.train)
        assert len(counts) == choices
        assert min(counts.values()) > len(sets.train) / choices / 2
