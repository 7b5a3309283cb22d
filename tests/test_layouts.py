"""Every layout against the oracle, without dropout and with it: the loss, every gradient, and five
steps."""

from dataclasses import replace
from functools import cache
from math import sqrt

import numpy as np
import pytest
import torch

from megalite.data.build import blended, build_sources
from megalite.optim.schedule import Schedule
from megalite.training.batches import build_batches
from megalite.training.build import build_components, build_context
from megalite.verify.compare import Rounding
from tests import oracle
from tests.layouts import (
    GLOBAL_BATCH,
    GPT2,
    LAYOUTS,
    LLAMA,
    Layout,
    as_bert,
    configuration,
    product,
)

STEPS = 5
SEED = 11
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1, "seed": SEED}
DROPPED = oracle.Dropout(SEED, attention=0.1, hidden=0.1)
"""The same for the oracle."""
BERT_FIELDS = oracle.BertBatch._fields
WEIGHTS_WITHIN = STEPS * 1e-8
"""Adam divides by the root of a mean of squares: where the gradient is mathematically zero (the key
bias), rounding noise of 1e-15 times the largest gradient (about 10) moves a weight by up to noise /
epsilon * lr = 1e-8 a step."""
MASKED = 3
"""The token whose positions are left out of the loss: microbatches then differ in their number of
tokens. It ends documents where they are kept apart: of many rows, several."""


class Samples:
    """A dataset of fixed random samples; some have many masked tokens, so that a mean of means
    would be wrong."""

    def __init__(self, shape: oracle.Shape, count: int):
        generator = torch.Generator().manual_seed(7)
        self.rows = torch.randint(shape.vocab, (count, shape.seq + 1), generator=generator)
        masked = (
            torch.rand(count, shape.seq + 1, generator=generator)
            < torch.rand(count, 1, generator=generator) * 0.8
        )
        self.rows[masked] = MASKED

    def __getitem__(self, i: int):
        return self.rows[i % len(self.rows)].numpy()


class BertSamples:
    """Samples of made-up sentences; every fourth is no pair."""

    def __init__(self, shape: oracle.Shape):
        config = configuration(Layout("any", shape=shape))
        sources = build_sources(
            config.data, config.model, 7, {"train": STEPS * GLOBAL_BATCH}, config.bert
        )
        self.dataset = blended(sources["train"])

    def __getitem__(self, i: int):
        return self.dataset[i] | ({"pair_mask": np.float32(0)} if i % 4 == 2 else {})


@cache
def samples_of(shape: oracle.Shape) -> Samples | BertSamples:
    """What a step takes GLOBAL_BATCH samples of."""
    return (
        BertSamples(shape) if shape.architecture == "bert" else Samples(shape, STEPS * GLOBAL_BATCH)
    )


def batch_for_oracle(shape: oracle.Shape, step: int, packing: tuple[str, ...] = ()) -> oracle.Batch:
    numbers = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    samples = [samples_of(shape)[i] for i in numbers]
    if shape.architecture == "bert":
        return oracle.BertBatch(
            *(torch.from_numpy(np.stack([s[key] for s in samples])) for key in BERT_FIELDS)
        )
    rows = torch.from_numpy(np.stack(samples))
    tokens = rows[:, :-1]
    positions, segments = oracle.documents(tokens, MASKED)
    positions = positions if "reset_position_ids" in packing else None
    segments = segments if "reset_attention_mask" in packing else None
    return tokens, rows[:, 1:], (tokens != MASKED).double(), positions, segments


def set_parameters(parts, params) -> None:
    """Give every rank its box of the same global weights, and the optimizer its master weights."""
    parameters = parts.model.parameters_by_name
    with torch.no_grad():
        for name, parameter in parameters.items():
            spec = parameter.spec
            spec.real(parameter).copy_(
                params[name][spec.box.slices_in(spec.box.whole(spec.global_shape))]
            )
        for name, master in parts.optimizer.master.items():
            master.copy_(parts.optimizer.gradients.updated_part(name, parameters[name]))


def boxes(parts, tensor_of) -> list:
    """(name, box, values) of this rank's part of each tensor, replicas included, so that they are
    compared as well."""
    return [
        (name, p.spec.box, p.spec.real(tensor_of(p)).detach().clone())
        for name, p in parts.model.parameters_by_name.items()
    ]


def train_on_rank(launch, layout: Layout, params, flags: dict, steps: int):
    """Run `steps` steps on one rank; terms of the losses, norms, boxes of the first gradient
    (before clipping) and of the final weights."""
    config = configuration(layout, **flags, eod_mask_loss=True)
    context, _ = build_context(config, launch)
    parts = build_components(config, context)
    if params is not None:
        set_parameters(parts, params)
    data = build_batches(config, samples_of(layout.shape), parts.model, eod=MASKED)
    losses, norms, gradients = [], [], []
    buffer = parts.optimizer.gradients
    norm_of_sums = buffer.norm

    def norm():  # called by the optimizer's step, between the reduction and the clipping
        if not gradients:
            gradients.extend((name, box, values.clone()) for name, box, values in buffer.held())
        return norm_of_sums()

    buffer.norm = norm
    for step in range(steps):
        buffer.zero()
        loss = parts.engine.train_step(*data.at(step * GLOBAL_BATCH))
        losses.append(loss.tolist())
        norms.append(parts.optimizer.step(step + 1).gradient_norm)
    parts.optimizer.wait_for_parameters()
    return losses, norms, gradients, boxes(parts, lambda p: p)


@cache
def expected(
    shape: oracle.Shape, packing: tuple[str, ...] = (), dropout: oracle.Dropout | None = None
):
    """Parameters, first loss, first gradients and five steps of the oracle, in float64."""
    params = oracle.random_parameters(shape, seed=1)
    loss, gradients = oracle.loss_and_gradients(
        params, shape, *batch_for_oracle(shape, 0, packing), dropout=dropout
    )
    config = configuration(Layout("any", shape=shape))
    schedule = Schedule(config.optimizer, STEPS)
    rates = [schedule.learning_rate(i + 1) for i in range(STEPS)]
    batches = [batch_for_oracle(shape, step, packing) for step in range(STEPS)]
    trained = oracle.train(
        params, shape, batches, rates, weight_decay=0.1, max_norm=0.5, dropout=dropout
    )
    return params, loss, gradients, trained


def largest_difference(parts: list, wanted: dict, shapes: dict) -> float:
    """Largest difference of any box from the global tensors, relative to max(largest entry of this
    tensor, of any).

    Also checks that the boxes of all ranks together cover every tensor.
    """
    overall = max(value.abs().max().item() for value in wanted.values())
    worst, seen = (
        0.0,
        {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()},
    )
    for name, box, values in parts:
        index = box.slices_in(box.whole(shapes[name]))
        seen[name][index] = True
        if box.numel:
            scale = max(wanted[name].abs().max().item(), overall)
            worst = max(
                worst, (values.double() - wanted[name][index].double()).abs().max().item() / scale
            )
    missing = [name for name, mask in seen.items() if not mask.all()]
    assert not missing, f"no rank holds all of {missing}"
    return worst


def terms_of(results: list, layout: Layout) -> list[list[float]]:
    """The global terms of each step's loss: sums over data ranks of the last stage's (tensor rank
    0's); ranks without it have zeros."""
    return [
        [sum(terms) for terms in zip(*(r[0][i] for r in results[:: layout.tp]))]
        for i in range(len(results[0][0]))
    ]


def losses_of(results: list, layout: Layout) -> list[float]:
    """The global loss of each step."""
    return [sum(terms) for terms in terms_of(results, layout)]


def assert_equal_the_oracle(
    results: list, layout: Layout, dropout: oracle.Dropout | None, record_property
) -> None:
    """Loss and every gradient to 1e-9 in float64, then the losses, norms and weights of five steps
    of AdamW."""
    params, loss, gradients, trained = expected(layout.shape, layout.packing, dropout)
    shapes = oracle.parameter_shapes(layout.shape)
    losses = losses_of(results, layout)
    difference = largest_difference([box for r in results for box in r[2]], gradients, shapes)
    record_property("layout", layout.name)
    record_property("loss_difference", abs(losses[0] - loss) / loss)
    record_property("gradient_difference", difference)
    assert losses[0] == pytest.approx(loss, rel=1e-9)
    assert difference < 1e-9
    assert losses == pytest.approx(trained.losses, rel=1e-9)
    for result in results:
        assert result[1] == pytest.approx(trained.grad_norms, rel=1e-9)
    assert (
        largest_difference([box for r in results for box in r[3]], trained.params, shapes)
        < WEIGHTS_WITHIN
    )
    if layout.shape.pair:
        batch = batch_for_oracle(layout.shape, 0)
        terms = [
            term.item() for term in oracle.bert_terms(params, layout.shape, *batch, dropout=dropout)
        ]
        assert terms_of(results, layout)[0] == pytest.approx(terms, rel=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_equal_the_oracle(pool, layout, record_property):
    params = expected(layout.shape, layout.packing)[0]
    results = pool.run(train_on_rank, layout.world_size, layout, params, {}, STEPS)
    assert_equal_the_oracle(results, layout, None, record_property)


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in product())],
    ids=lambda layout: layout.name,
)
def test_layouts_equal_the_oracle_with_dropout(pool, layout, record_property):
    """As above, with dropout at every place: what is dropped must not depend on how the model and
    the samples lie."""
    params, loss_without, _, _ = expected(layout.shape, layout.packing)
    results = pool.run(train_on_rank, layout.world_size, layout, params, DROPOUT, STEPS)
    assert losses_of(results, layout)[0] != pytest.approx(loss_without, rel=1e-6), (
        "nothing was dropped"
    )
    assert_equal_the_oracle(results, layout, DROPPED, record_property)


def test_the_samples_of_a_bert_leave_nothing_untried():
    """Padding, pairs of both kinds and rows without one, rows that differ in what is to be
    predicted."""
    batch = batch_for_oracle(as_bert(GPT2), 0)
    assert 0 < batch.segments.sum() < batch.segments.numel() and batch.token_types.sum() > 0
    assert (
        set(batch.pair_label[batch.pair_mask > 0].tolist()) == {0, 1}
        and 0 in batch.pair_mask.tolist()
    )
    assert len(set(batch.loss_mask.sum(dim=1).tolist())) > 1


@cache
def one_process(pool, shape: oracle.Shape, packing: tuple[str, ...], steps: int, **flags):
    """Terms of the losses, norms, first gradients by name and final weights by name of a single
    process, a sample at a time."""
    layout = Layout("single", shape=shape, flags=dict.fromkeys(packing, True))
    losses, norms, *tensors = pool.run(train_on_rank, 1, layout, expected(shape)[0], flags, steps)[
        0
    ]
    return losses, norms, *({name: values for name, _, values in boxes} for boxes in tensors)


IN_SHORT = [
    "single",
    "dp2 x tp2 x pp2 +sp",
    "llama dp2 x tp2 x pp2 +sp",
    "selective",
    "packed documents tp2+sp",
    "bert dp2 x tp2 x pp2 +sp",
    "bert llama tp4+sp",
]
"""Layouts that are tried with each backend of attention; `make test-all` tries all."""


@pytest.mark.parametrize(
    ("backend", "dropout"),
    [("fused-softmax", None), ("eager", None), ("eager", DROPPED)],
    ids=["fused-softmax", "eager", "eager, dropout"],
)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=() if x.name in IN_SHORT else pytest.mark.slow) for x in LAYOUTS],
    ids=lambda layout: layout.name,
)
def test_layouts_equal_the_oracle_under_each_backend(
    pool, layout, backend, dropout, record_property
):
    """The tests above take what `auto` takes: sdpa, or with dropout fused-softmax."""
    params = expected(layout.shape, layout.packing)[0]
    flags = (DROPOUT if dropout else {}) | {"attention_backend": backend}
    results = pool.run(train_on_rank, layout.world_size, layout, params, flags, STEPS)
    assert_equal_the_oracle(results, layout, dropout, record_property)


LOW_PRECISION = [
    "tp4",
    "pp4",
    "dp2 x tp2 x pp2 +sp",
    "llama dp2 x tp2 x pp2 +sp",
    "full uniform",
    "packed documents tp2+sp",
    "packed llama dp2 x tp2 x pp2 +sp",
    "qwen3 dp2 x tp2 x pp2 +sp",
    "norms of heads tp2+sp",
    "llama dp2 x tp2 x pp2 +sp, zero, overlapped",
    "bert dp2 x tp2 x pp2 +sp",
    "bert llama dp2 x tp2 x pp2 +sp",
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "layout", [x for x in LAYOUTS if x.name in LOW_PRECISION], ids=lambda layout: layout.name
)
def test_layouts_equal_one_process_in_low_precision(pool, layout, precision, record_property):
    """Loss and every gradient within what rounding alone explains."""
    flags = {"precision": precision}
    if precision == "fp16":
        flags["loss_scale"] = 1024.0
    params = expected(layout.shape)[0]
    (terms,), _, gradients, _ = one_process(pool, layout.shape, layout.packing, 1, **flags)
    results = pool.run(train_on_rank, layout.world_size, layout, params, flags, 1)
    difference = largest_difference(
        [box for r in results for box in r[2]], gradients, oracle.parameter_shapes(layout.shape)
    )
    rounding = Rounding(configuration(layout).model, precision, GLOBAL_BATCH * layout.shape.seq)
    bound = rounding.gradient("embedding")  # the longest way
    record_property("gradient_difference", difference)
    print(precision, layout.name, difference, bound)
    assert losses_of(results, layout)[0] == pytest.approx(sum(terms), rel=bound)
    assert difference < bound


LONG = {
    "gpt2": replace(GPT2, seq=256, positions=256),
    "llama": replace(LLAMA, seq=256, positions=256),
}


@pytest.mark.parametrize("shape", LONG.values(), ids=LONG)
def test_bf16_gradients_of_many_tokens_equal_the_oracle(pool, shape):
    """Each tensor against the fp64 oracle on its own scale, over 2048 tokens of which many are the
    same: sums that are kept in bf16 would have stopped growing. The oracle starts from the same
    bf16 weights."""
    params = {name: value.bfloat16().double() for name, value in expected(shape)[0].items()}
    _, gradients = oracle.loss_and_gradients(params, shape, *batch_for_oracle(shape, 0))
    layout = Layout("single", shape=shape, flags={"micro_batch_size": 8})
    results = pool.run(train_on_rank, 1, layout, params, {"precision": "bf16"}, 1)
    largest = max(gradient.norm().item() for gradient in gradients.values())
    for name, _, values in results[0][2]:
        # Where a gradient is mathematically zero (the key bias), all of it is rounding: relative to
        # the largest.
        error = (values.double() - gradients[name]).norm().item() / max(
            gradients[name].norm().item(), 0.05 * largest
        )
        # As Rounding has it, but for the norm of a tensor's error, which grows with the root mean
        # square of a rounding, u / sqrt(3); twice, for what the layers amplify.
        roundings = 2 * (4 * shape.layers + 1) + 2 * 6 * shape.layers
        assert error < 2 * sqrt(roundings / 3) * 2.0**-8, (name, error)
