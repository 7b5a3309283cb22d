"""Learning-rate schedules, as a pure function of the iteration."""

import math

from megalite.optim.config import OptimizerConfig


def warmup_iterations(config: OptimizerConfig, decay_iterations: int) -> int:
    """Iterations of warm-up, from --lr-warmup-iters or --lr-warmup-fraction."""
    if config.lr_warmup_fraction is not None:
        return round(config.lr_warmup_fraction * decay_iterations)
    return config.lr_warmup_iters


def learning_rate(iteration: int, config: OptimizerConfig, train_iters: int) -> float:
    """The learning rate of the step that ends iteration `iteration`, counted from 1.

    Linear from 0 to lr during the warm-up, which ends at lr; then lr, or a line or half a cosine
    (Loshchilov and Hutter 2016) down to min_lr (unset: lr / 10) at `lr_decay_iters`, and min_lr
    from there on.
    """
    decay = config.lr_decay_iters or train_iters
    warmup = warmup_iterations(config, decay)
    if iteration <= warmup:
        return config.lr * iteration / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if iteration >= decay:
        return config.lowest_lr
    done = (iteration - warmup) / (decay - warmup)
    share = 1 - done if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lowest_lr + share * (config.lr - config.lowest_lr)
