"""The messages of a schedule: one order for all ranks, and a validator that finds what is wrong."""

import random
from graphlib import TopologicalSorter

import pytest

from megalite.pipeline.messages import (
    Message,
    Step,
    is_sent,
    made,
    needed,
    program,
    validate,
    validate_messages,
)
from megalite.pipeline.schedules import (
    SCHEDULES,
    Action,
    Orders,
    Pipeline,
    ScheduleError,
    forward_only,
    interleaved,
    one_forward_one_backward,
    zb_v,
)
from megalite.pipeline.simulate import simulate


def programs_of(orders: Orders, pipeline: Pipeline) -> list[list[Step]]:
    timeline = simulate(orders, pipeline)
    return [program(timeline, pipeline, rank) for rank in range(pipeline.ranks)]


def random_cases(count: int) -> list[tuple[str, Orders, Pipeline, int]]:
    """Pipelines of every schedule, with any number of ranks, stages and microbatches."""
    generator = random.Random(0)
    cases = []
    for name, schedule in SCHEDULES.items():
        for _ in range(count):
            p = generator.randint(1, 8)
            v = generator.choice([v for v in (1, 2, 3, 4) if v in schedule.chunks])
            m = generator.randint(1, 3 * p)
            pipeline = Pipeline(p, v, schedule.v_shaped)
            orders = schedule.orders(pipeline, m)
            if name == "interleaved":
                group = generator.choice([None, p, p + 1, 2 * p])
                orders = interleaved(pipeline, m, group)
            cases.append((f"{name} p={p} v={v} m={m}", orders, pipeline, m))
    return cases


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_small_size_is_sound(name):
    schedule = SCHEDULES[name]
    for p in range(1, 6):
        for v in (v for v in (1, 2, 3) if v in schedule.chunks):
            for m in range(1, 2 * p + 2):
                pipeline = Pipeline(p, v, schedule.v_shaped)
                validate(schedule.orders(pipeline, m), pipeline, m)
                validate(forward_only(pipeline, m), pipeline, m, backward=False)


def test_random_sizes_are_sound():
    for name, orders, pipeline, m in random_cases(12):
        try:
            validate(orders, pipeline, m)
        except ScheduleError as error:
            raise AssertionError(name) from error


def test_all_ranks_post_in_one_order():
    """Sends and receives of all ranks, followed in the order in which each rank posts them, make no
    circle. So no two ranks can wait for each other, whatever their computations take."""
    for name, orders, pipeline, _ in random_cases(4):
        after: dict[Message, set[Message]] = {}
        posts = 0
        for steps in programs_of(orders, pipeline):
            before = None
            for message in posted(steps, pipeline):
                posts += 1
                after.setdefault(message, set())
                if before is not None:
                    after[message].add(before)
                before = message
        TopologicalSorter(after).prepare()  # raises CycleError
        assert posts == 2 * len(after), name


def posted(steps: list[Step], pipeline: Pipeline) -> list[Message]:
    """The messages of a rank in the order in which they are posted."""
    found = []
    for step in steps:
        found += step.receives
        sent = made(step.action, pipeline)
        if is_sent(sent, pipeline):
            found.append(sent)
    return found


def test_receives_are_posted_before_they_are_needed():
    for name, orders, pipeline, _ in random_cases(4):
        for rank, steps in enumerate(programs_of(orders, pipeline)):
            assert [step.action for step in steps] == orders[rank]
            coming: set[Message] = set()
            for step in steps:
                coming |= set(step.receives)
                wanted = needed(step.action, pipeline)
                if is_sent(wanted, pipeline):
                    coming.remove(wanted)
            assert not coming, name


def test_the_program_of_a_middle_rank():
    pipeline = Pipeline(3)
    steps = programs_of(one_forward_one_backward(pipeline, 2), pipeline)[1]
    forwards = [Message("F", microbatch, 0, 1) for microbatch in range(2)]
    gradients = [Message("B", microbatch, 2, 1) for microbatch in range(2)]
    assert steps == [
        # The second forward may arrive while the first is computed.
        Step(tuple(forwards), Action("F", 0, 1)),
        Step((), Action("F", 1, 1)),
        Step((gradients[0],), Action("B", 0, 1)),
        Step((gradients[1],), Action("B", 1, 1)),
    ]


def test_one_rank_sends_itself_nothing():
    for pipeline in (Pipeline(1), Pipeline(1, 2)):
        (steps,) = programs_of(forward_only(pipeline, 2), pipeline)
        assert all(step.receives == () for step in steps)
    # In the V shape the last rank holds two stages that follow each other.
    pipeline = Pipeline(2, 2, v_shaped=True)
    steps = programs_of(zb_v(pipeline, 4), pipeline)[1]
    assert all({message.source, message.target} != {1, 2} for s in steps for message in s.receives)


@pytest.mark.parametrize(
    ("ranks", "complaint"),
    [
        (["F0 F1 B0", "F0 B0 F1 B1"], "rank 0 runs F of microbatch 1 on stage 0"),
        (["F0 F1 B0 B1", "F0 B0"], "rank 1 runs nothing of microbatch 1 on stage 1"),
        (["F0 F1 B0 B1", "F0 B0 F1 B1 B1"], "rank 1 runs B1 of stage 1 twice"),
        (["F0 F1 B0 B1 F2", "F0 B0 F1 B1"], "rank 0 runs F2 of stage 0, which it does not have"),
        (["F0 F1 B0 B1", "F0 B1 F1 B0"], "rank 1 runs B1 of stage 1 before F1"),
        (["F0 F1 B0 B1", "F0 W0 I0 F1 B1"], "rank 1 runs W0 of stage 1 before I0"),
        (["F0 F1 B0 B1", "F0 I0 F1 B1"], "rank 1 runs F and I of microbatch 0 on stage 1"),
        (["F0 F1 B0 B1", "F0 B0 I0 W0 F1 B1"], "rank 1 runs B and F and I and W of microbatch 0"),
        (["F0 F1 B0 B1"], "orders of 1 ranks for a pipeline of 2"),
        # Rank 0 waits for the first gradient; rank 1 wants another forward before it makes that.
        (
            ["F0 B0 F1 B1", "F0 F1 B0 B1"],
            "deadlock: rank 0 waits with B0 of stage 0 for I0 of stag",
        ),
        (["F0 F1 B1 B0", "F0 B0 F1 B1"], None),
    ],
)
def test_the_validator_finds(ranks, complaint):
    orders = []
    for rank, words in enumerate(ranks):
        orders.append([Action(word[0], int(word[1:]), rank) for word in words.split()])
    if complaint is None:  # an unusual order, but a sound one
        validate(orders, Pipeline(2), 2)
        return
    with pytest.raises(ScheduleError, match=complaint):
        validate(orders, Pipeline(2), 2)


def test_a_rank_runs_its_own_stages_only():
    orders = one_forward_one_backward(Pipeline(2), 2)
    orders.reverse()
    with pytest.raises(ScheduleError, match="rank 0 runs F0 of stage 1, which it does not have"):
        validate(orders, Pipeline(2), 2)


def test_an_evaluation_has_no_backwards():
    with pytest.raises(ScheduleError, match="rank 0 runs B and F of microbatch 0 on stage 0"):
        validate(one_forward_one_backward(Pipeline(1), 2), Pipeline(1), 2, backward=False)


def test_receives_in_another_order_than_the_sends_deadlock():
    pipeline = Pipeline(2)
    programs = programs_of(forward_only(pipeline, 2), pipeline)
    receives = programs[1][0].receives
    assert len(receives) == 2
    validate_messages(programs, pipeline)
    programs[1][0] = programs[1][0]._replace(receives=receives[::-1])
    with pytest.raises(
        ScheduleError, match="deadlock: rank 1 waits for the hidden states of micro"
    ):
        validate_messages(programs, pipeline)


def test_a_receive_that_is_never_posted_deadlocks():
    pipeline = Pipeline(2)
    programs = programs_of(one_forward_one_backward(pipeline, 2), pipeline)
    programs[0] = [step._replace(receives=()) for step in programs[0]]
    with pytest.raises(ScheduleError, match="rank 0 waits for the gradient of microbatch 0 from"):
        validate_messages(programs, pipeline)


def test_a_message_that_nobody_receives_is_found():
    pipeline = Pipeline(2)
    programs = programs_of(forward_only(pipeline, 1), pipeline)
    programs[1] = []
    with pytest.raises(ScheduleError, match="deadlock: hidden states of microbatch 0 from stage 0"):
        validate_messages(programs, pipeline)
