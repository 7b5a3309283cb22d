"""Learning rates at the iterations where they turn."""

import math

import pytest

from megalite.optim.config import OptimizerConfig
from megalite.optim.schedule import learning_rate, warmup_iterations


def rates(iterations, train_iters: int = 100, **options) -> list[float]:
    config = OptimizerConfig(**{"lr": 1.0, "min_lr": 0.1, **options})
    return [learning_rate(iteration, config, train_iters) for iteration in iterations]


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
    assert warmup_iterations(config, 300) == 15
    assert rates(
        [15, 16], lr_warmup_fraction=0.05, lr_decay_iters=300, lr_decay_style="constant"
    ) == [1.0, 1.0]
    assert rates([14], lr_warmup_fraction=0.05, lr_decay_iters=300)[0] == pytest.approx(14 / 15)


def test_a_warm_up_as_long_as_the_decay():
    assert rates([50, 100, 101], lr_warmup_iters=100) == pytest.approx([0.5, 1.0, 0.1])
