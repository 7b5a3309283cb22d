"""A loss of several terms: weights, gradients, counts of nothing, and what the training says of
them."""

from dataclasses import replace

import pytest
import torch

from megalite.data.indexed import DatasetError
from megalite.models.gpt import GPT
from megalite.models.stages import Stages
from megalite.training.batches import build_batches
from megalite.training.build import build_components, build_model
from tests import runs
from tests.layouts import Layout, configuration
from tests.tiny import build


class EvenAndOdd(GPT):
    """A GPT that learns even and odd labels as two tasks: the mean loss over the ones and that over
    the others."""

    loss_names = ("even_loss", "odd_loss")

    @staticmethod
    def _tasks(batch):
        odd = batch.labels % 2
        return [replace(batch, loss_mask=batch.loss_mask * part) for part in (1 - odd, odd)]

    @staticmethod
    def loss_counts(batch):
        return torch.cat([GPT.loss_counts(task) for task in EvenAndOdd._tasks(batch)])

    def forward(self, x, batch):
        if batch.labels is None:
            return super().forward(x, batch)
        return torch.cat([super(EvenAndOdd, self).forward(x, task) for task in self._tasks(batch)])


def even_and_odd(config, context, rng):
    model = build_model(config, context, rng)
    for stage in model.stages:
        stage.__class__ = EvenAndOdd
    return Stages(model.by_number)


class Rows:
    """Samples whose labels are those of a function of sample and place."""

    def __init__(self, token):
        self.token = token

    def __getitem__(self, i):
        return torch.tensor([self.token(i, j) for j in range(17)]).numpy()


def step_of(tiny, data, weights):
    """The terms and the gradient of one step with these weights, or with the data's own."""
    batches, own = data.at(0)
    tiny.components.optimizer.gradients.zero()
    terms = tiny.components.engine.train_step(batches, own if weights is None else weights)
    return terms, tiny.components.optimizer.gradients.flat.clone()


def test_each_term_has_its_weight():
    """In the gradient as in the loss, which is what each term alone, a GPT's loss, gives."""
    tiny = build()
    parts = build_components(tiny.config, tiny.context, even_and_odd)
    tiny = replace(tiny, components=parts)
    data = build_batches(tiny.config, Rows(lambda i, j: (7 * i + 3 * j * j) % 257), parts.model)
    sums, of_even = step_of(tiny, data, [1.0, 0.0])[0], step_of(tiny, data, [1.0, 0.0])[1]
    of_odd = step_of(tiny, data, [0.0, 1.0])[1]
    assert sums[1] == 0 < sums[0] and not torch.allclose(of_even, of_odd)
    terms, gradient = step_of(tiny, data, torch.tensor([0.25, 3.0]))
    torch.testing.assert_close(gradient, 0.25 * of_even + 3 * of_odd, rtol=1e-11, atol=1e-13)
    assert terms[0].item() == pytest.approx(0.25 * sums[0].item(), rel=1e-12)
    counts = data.counts(data.read(0))
    assert counts.sum() == 8 * 16 and 0 < counts[0] < 128
    assert data.at(0)[1].tolist() == [1 / counts[0].item(), 1 / counts[1].item()]


def test_a_term_that_counts_nothing_has_no_weight():
    tiny = build()
    model = even_and_odd(tiny.config, tiny.context, tiny.components.rng)
    assert build_batches(tiny.config, Rows(lambda i, j: 2 * j), model).at(0)[1].tolist() == [
        1 / 128,
        0.0,
    ]
    config = replace(tiny.config, data=replace(tiny.config.data, eod_mask_loss=True))
    with pytest.raises(
        DatasetError, match="the loss counts no token of the global batch at sample 8"
    ):
        build_batches(config, Rows(lambda i, j: 4), model, eod=4).at(8)


def test_a_weight_is_needed_for_each_term():
    tiny = build()
    with pytest.raises(ValueError, match=r"shape \(1,\), the weights \(2,\)"):
        tiny.components.engine.train_step(tiny.data.read(0), [1.0, 1.0])


def test_each_term_is_reported(pool, tmp_path):
    """On the console and in the metrics file, under any layout the same, beside their sum."""
    flags = dict(
        train_iters=3, eval_interval=3, eval_iters=2, log_interval=3, metrics_file="metrics.jsonl"
    )
    found = []
    for name, layout in (("one", Layout("one")), ("eight", Layout("eight", dp=2, tp=2, pp=2))):
        config = configuration(layout, **flags)
        console = pool.run(
            runs.console_of, layout.world_size, config, tmp_path / name, even_and_odd
        )[0]
        found.append(runs.Run(console, tmp_path / name))
    one, eight = found
    for prefix in ("", "validation_"):
        even, odd, total = (
            one.column(f"{prefix}{name}") for name in ("even_loss", "odd_loss", "loss")
        )
        assert total == [e + o for e, o in zip(even, odd)] and len(total) == (1 if prefix else 3)
        assert all(4 < e < 7 and 4 < o < 7 and e != o for e, o in zip(even, odd))
        for name in ("even_loss", "odd_loss", "loss"):
            assert eight.column(f"{prefix}{name}") == pytest.approx(
                one.column(f"{prefix}{name}"), rel=1e-9
            )
    last = {
        name: one.column(name)[-1]
        for name in ("loss", "even_loss", "odd_loss", "validation_odd_loss")
    }
    shown = f"loss {last['loss']:.4f} | even loss {last['even_loss']:.4f} | odd loss {last['odd_loss']:.4f} | lr"  # noqa: E501
    assert (
        shown in one.console
        and f"validation odd loss {last['validation_odd_loss']:.4f}" in one.console
    )
