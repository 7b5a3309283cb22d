"""Learning rates at the iterations where they turn."""

import math

import pytest

from megalite.optim.config import OptimizerConfig
from megalite.optim.schedule import Schedule


def rates(iterations, train_iters: int = 100, **options) -> list[float]:
    config = OptimizerConfig(**{"lr": 1.0, "min_lr": 0.1, **options})
    schedule = Schedule(config, train_iters)
    return [schedule.learning_rate(iteration) for iteration in iterations]


def test_warm_up_is_a_line_from_zero_that_ends_at_lr():
    for style in ("constant", "linear", "cosine"):
        got = rates([1, 5, 10], lr_warmup_iters=10, lr_decay_style=style)
        assert got == pytest.approx([0.1, 0.5, 1.0], rel=1e-15)


@pytest.mark.parametrize(
    ("style", "golden"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.99, 0.775, 0.55, 0.1, 0.1]),
        # (1 + cos(pi x)) / 2 of the way from 0.1 to 1, at x = 1/90, 1/4, 1/2, 1.
        (
            "cosine",
            [
                0.1 + 0.45 * (1 + math.cos(math.pi / 90)),
                0.1 + 0.45 * (1 + 0.5**0.5),
                0.55,
                0.1,
                0.1,
            ],
        ),
    ],
)
def test_decay_reaches_min_lr_and_stays_there(style, golden):
    assert rates(
        [11, 32.5, 55, 100, 150], lr_warmup_iters=10, lr_decay_style=style
    ) == pytest.approx(golden)


def test_decay_may_end_before_training_does():
    got = rates([1, 20, 40, 41, 100], lr_decay_iters=40, lr_decay_style="linear")
    assert got == pytest.approx([1 - 0.9 / 40, 0.55, 0.1, 0.1, 0.1])


def test_no_warm_up():
    assert rates([1], lr_decay_style="cosine")[0] == pytest.approx(
        0.1 + 0.45 * (1 + math.cos(math.pi / 100))
    )
    assert rates([1, 7], lr_decay_style="constant") == [1.0, 1.0]


def test_warm_up_as_a_fraction_of_the_decay():
    config = OptimizerConfig(lr_warmup_fraction=0.05, lr_decay_iters=300)
    assert Schedule(config, 1000).warmup == 15
    assert rates(
        [15, 16], lr_warmup_fraction=0.05, lr_decay_iters=300, lr_decay_style="constant"
    ) == [1.0, 1.0]
    assert rates([14], lr_warmup_fraction=0.05, lr_decay_iters=300)[0] == pytest.approx(14 / 15)


def test_a_warm_up_as_long_as_the_decay():
    assert rates([50, 100, 101], lr_warmup_iters=100) == pytest.approx([0.5, 1.0, 0.1])


@pytest.mark.parametrize(
    ("style", "halfway"),
    [
        ("linear", 0.55),
        ("cosine", 0.55),
        ("exponential", 0.1 + 0.9 * (2**0.5 - 1)),
        ("minus_sqrt", 0.1 + 0.9 * (1 - 0.5**0.5)),
    ],
)
def test_wsd_decays_at_the_end_only(style, halfway):
    got = rates(
        [5, 10, 50, 80, 90, 100, 120],
        lr_warmup_iters=10,
        lr_decay_style="WSD",
        lr_wsd_decay_style=style,
        lr_wsd_decay_iters=20,
    )
    assert got == pytest.approx([0.5, 1.0, 1.0, 1.0, halfway, 0.1, 0.1])


def test_inverse_square_root_follows_the_warm_up():
    style = {"lr_decay_style": "inverse-square-root"}
    assert rates([4, 16, 64, 1600], lr_warmup_iters=4, **style) == pytest.approx(
        [1, 0.5, 0.25, 0.1]
    )
    assert rates([1, 4], **style) == pytest.approx([1, 0.5])


def test_a_warm_up_may_start_above_zero():
    assert rates([1, 5, 10], lr_warmup_iters=10, lr_warmup_init=0.5) == pytest.approx(
        [0.55, 0.75, 1.0]
    )


@pytest.mark.parametrize(
    ("style", "golden"),
    [
        ("constant", [0.01, 0.01, 0.01, 0.01]),
        ("linear", [0.125, 0.2, 0.3, 0.3]),
        ("cosine", [0.1 + 0.1 * (1 - math.cos(math.pi / 8)), 0.2, 0.3, 0.3]),
    ],
)
def test_weight_decay_goes_from_start_to_end(style, golden):
    config = OptimizerConfig(
        weight_decay_incr_style=style, start_weight_decay=0.1, end_weight_decay=0.3
    )
    schedule = Schedule(config, 100)
    got = [schedule.weight_decay(iteration) for iteration in (12.5, 50, 100, 130)]
    assert got == pytest.approx(golden)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "WSD", "inverse-square-root"])
def test_a_schedule_in_samples_is_that_in_iterations_where_batches_have_one_size(style):
    wsd = style == "WSD"
    common = {"lr_decay_style": style, "lr": 1e-3, "min_lr": 1e-5}
    by_iterations = OptimizerConfig(
        **common, lr_decay_iters=90, lr_warmup_iters=10, lr_wsd_decay_iters=20 if wsd else None
    )
    by_samples = OptimizerConfig(
        **common,
        lr_decay_samples=90 * 24,
        lr_warmup_samples=10 * 24,
        lr_wsd_decay_samples=20 * 24 if wsd else None,
    )
    one = Schedule.of_run(by_iterations, iterations=100, samples=2400)
    other = Schedule.of_run(by_samples, iterations=100, samples=2400)
    for iteration in range(1, 101):
        at_one = one.position(iteration, 24 * iteration)
        at_other = other.position(iteration, 24 * iteration)
        assert (at_one, at_other) == (iteration, 24 * iteration)
        rate = one.learning_rate(at_one)
        assert rate == pytest.approx(other.learning_rate(at_other), rel=1e-15)
