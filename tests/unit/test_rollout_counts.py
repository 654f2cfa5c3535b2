"""What is told of the number of requests: enough for who reads it, and hardly a write for it."""

from tests.unit.rollout_world import World, analysis, serving, steps

from slmops.api import keys


def canary(**plan: object) -> World:
    """Half of the requests go to bbb."""
    world = serving(**{"steps": steps(50, 50, pause=None, approval=True), **plan})
    world.deploy("bbb")
    assert (world.weight, world.status.rollout.samples) == (50, 0)
    return world


def writes(world: World, answers: int) -> int:
    """How many status writes so many answers cost, with a pass after each of them."""
    count = 0
    for _ in range(answers):
        before = world.status
        world.serve(2)
        world.run()
        count += world.status != before
    return count


def test_a_step_that_waits_for_a_person_tells_its_requests_and_is_not_written_for_each():
    world = canary()
    assert writes(world, 1000) < 70
    assert 900 < (world.status.rollout.samples or 0) <= 1000
    assert (world.run().requeue or 999) <= 10  # no event tells of requests


def test_enough_requests_are_told_at_once():
    world = canary(analysis=analysis(min_samples=1000))
    world.after(11)
    assert writes(world, 999) < 70
    told = world.status.rollout.samples or 0
    assert 900 < told < 1000
    assert world.hold == f"TooFewSamples: Revision bbb: {told} of 1000 requests answered in this step."
    writes(world, 1)
    assert world.status.rollout.samples == 1000
    assert "TooFewSamples" not in world.hold


def test_a_split_that_is_off_is_not_written_for_each_request():
    world = canary()
    count = 0
    for _ in range(1000):
        before = world.status
        world.routers[0].turns += 1
        world.run()
        count += world.status != before
    assert world.hold == "SplitMismatch: The routers gave 0 % of the requests to bbb, not 50 %."
    assert count == 1


def test_a_step_ends_with_its_exact_number():
    world = canary()
    world.serve(200), world.run(), world.serve(10)
    world.annotations[keys.ANNOTATION_PROMOTE] = "bbb"
    world.run()
    assert (world.status.rollout.step, world.status.rollout.samples) == (1, 105)
    world.run()
    assert (world.status.rollout.step, world.status.rollout.samples) == (1, 0)


def test_so_does_a_step_that_is_given_up_though_a_router_is_silent_by_then():
    for silent, samples in ((False, 105), (True, 100)):
        world = canary()
        world.serve(200), world.run(), world.serve(10)
        world.routers[0].silent = silent
        world.annotations[keys.ANNOTATION_ABORT] = "bbb"
        world.run()
        assert (world.phase, world.status.rollout.samples) == ("RollingBack", samples)
