"""The engine on real ranks: what it runs, what it keeps, and what it frees."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megalite.models.batch import Microbatch
from megalite.pipeline.schedules import forward_only, peak_in_flight, pipeline_of, training_orders
from tests.layouts import GPT2, Layout, configuration
from tests.tiny import build

each_schedule = pytest.mark.parametrize(
    "schedule",
    [
        {"pipeline_schedule": "1f1b"},
        {"pipeline_schedule": "gpipe"},
        {"pipeline_schedule": "zb-h1"},
        {"pipeline_schedule": "zb-v"},
        {"num_virtual_stages_per_pipeline_rank": 2},
    ],
    ids=lambda flags: str(*flags.values()),
)


def events_of_a_step(launch, ranks: int, flags: dict) -> tuple[list, list]:
    """The forwards, backwards and weight gradients that the stages of a rank go through in a
    training step and in an evaluation, as they happen."""
    tiny = build(Layout("pipeline", pp=ranks), launch, **flags)
    engine = tiny.components.engine
    events = []

    def forward_seen(number, module, inputs, output):
        events.append(("F", number))
        if output.requires_grad:
            output.register_hook(lambda gradient: events.append(("B", number)))

    for number, stage in engine.stages.items():
        stage.register_forward_hook(partial(forward_seen, number))
    run_deferred = engine.weight_gradients.run_deferred

    def deferred_seen(products):
        layer = next(p.spec.name for p in products if p.spec.name.startswith("layers"))
        owners = [n for n, s in engine.stages.items() if layer in s.parameters_by_name]
        events.append(("W", *owners))
        run_deferred(products)

    engine.weight_gradients.run_deferred = deferred_seen
    tiny.gradient()
    trained = events.copy()
    events.clear()
    engine.evaluate(*tiny.data.at(0))
    return trained, events


@each_schedule
@pytest.mark.parametrize(("ranks", "rows"), [(2, 1), (2, 4), (2, 8), (4, 1), (4, 4)])
def test_the_schedule_is_what_runs(pool, ranks, rows, schedule):
    """With 8, 2 and 1 microbatches: fewer than stages, too. An evaluation runs forwards only."""
    shape = replace(GPT2, layers=8)
    flags = {"micro_batch_size": rows, "num_layers": shape.layers, **schedule}
    config = configuration(Layout("pipeline", pp=ranks, flags=flags)).parallel
    orders = training_orders(config, 8 // rows)
    evaluations = forward_only(pipeline_of(config), 8 // rows)
    for rank, (trained, evaluated) in enumerate(pool.run(events_of_a_step, ranks, ranks, flags)):
        wanted = [("B" if a.kind == "I" else a.kind, a.stage) for a in orders[rank]]
        assert trained == wanted
        assert evaluated == [(action.kind, action.stage) for action in evaluations[rank]]


def activations_alive(launch, ranks: int, flags: dict) -> tuple[int, int]:
    """The most microbatches of which a rank holds the activations at one time, as tensors that are
    alive and as the schedule has it."""
    tiny = build(Layout("pipeline", pp=ranks), launch, **flags)
    engine = tiny.components.engine
    kept = []
    most = 0

    def before(module, inputs):
        # The input of a layer's second linear product is kept until its weight gradient.
        kept.append(StorageWeakRef(inputs[0].untyped_storage()))
        nonlocal most
        most = max(most, sum(not one.expired() for one in kept))

    for stage in engine.stages.values():
        first = next(iter(stage.layers.values()))
        first.mlp.down.register_forward_pre_hook(before)
    tiny.gradient()
    order = training_orders(engine.config, 8)[launch.rank]
    return most, sum(peak_in_flight(order).values())


@each_schedule
def test_as_many_activations_are_alive_as_the_schedule_says(pool, schedule):
    for alive, counted in pool.run(activations_alive, 2, 2, schedule):
        assert alive == counted


def outputs_alive(launch) -> list[int]:
    """On each forward of a stage under GPipe: how many of its earlier outputs are still in
    memory."""
    tiny = build(Layout("pipeline", pp=3), launch, pipeline_schedule="gpipe")
    outputs, alive = [], []

    def before(module, inputs):
        alive.append(sum(not output.expired() for output in outputs))

    def after(module, inputs, output):
        outputs.append(StorageWeakRef(output.untyped_storage()))

    stage = tiny.components.model.stages[0]
    stage.register_forward_pre_hook(before)
    stage.register_forward_hook(after)
    tiny.gradient()
    return alive


def test_a_sent_output_is_freed_before_its_backward(pool):
    """All 8 microbatches are in flight; of their outputs, only the one on its way is held."""
    first, middle, _ = pool.run(outputs_alive, 3)
    assert first == middle == [0] + [1] * 7


def losses(launch, stages: int, rows: int):
    tiny = build(Layout("pipeline", pp=stages), launch, micro_batch_size=rows)
    engine, gradients = tiny.components.engine, tiny.components.optimizer.gradients
    trained = tiny.gradient()
    gradients.zero()
    evaluated = engine.evaluate(*tiny.data.at(0))
    untouched = not gradients.flat.any() and all(
        p.grad is None for p in tiny.components.model.parameters()
    )
    return trained.item(), evaluated.item(), evaluated.requires_grad, untouched


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_evaluation_gives_the_loss_without_gradients(pool, stages):
    rows = [1, 4, 8]
    results = {b: pool.run(losses, stages, stages, b) for b in rows}
    for result in (rank for b in rows for rank in results[b]):
        assert result[1] == pytest.approx(result[0], rel=1e-14)
        assert result[2:] == (False, True)
    # Any number of microbatches gives the same loss; stages before the last have none.
    last = [results[b][-1][0] for b in rows]
    assert last == pytest.approx([last[0]] * 3, rel=1e-12) and last[0] > 1
    assert all(result[0] == 0 for b in rows for result in results[b][:-1])


def microbatches_of_a_wrong_shape(launch) -> list[str]:
    """What the first stage says; the second is never asked to receive."""
    tiny = build(Layout("pipeline", pp=2), launch, micro_batch_size=2)
    said = []
    for shape in ((1, 16), (2, 8)) if tiny.components.model.is_first else ():
        with pytest.raises(ValueError, match="hidden states") as error:
            tiny.components.engine.train_step(
                [Microbatch(tokens=torch.zeros(shape, dtype=torch.long))], [1.0]
            )
        said.append(str(error.value))
    return said


def test_a_microbatch_of_a_wrong_shape_is_not_sent(pool):
    """gloo would take the smaller message, and leave the rest of the receiver's tensor as it
    was."""
    rows, tokens = pool.run(microbatches_of_a_wrong_shape, 2)[0]
    assert "(16, 1, 32), the next expects (16, 2, 32)" in rows
    assert "(8, 2, 32), the next expects (16, 2, 32)" in tokens


def test_microbatches_accumulate_to_the_gradient_of_their_batch():
    tiny = build(micro_batch_size=1), build(micro_batch_size=8)
    whole, parts = (one.gradient() for one in tiny)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    flat = [one.components.optimizer.gradients.flat for one in tiny]
    torch.testing.assert_close(flat[0], flat[1], rtol=1e-10, atol=1e-14)


def test_no_microbatches_have_no_loss():
    assert build().components.engine.train_step([], [1.0]).tolist() == [0]
