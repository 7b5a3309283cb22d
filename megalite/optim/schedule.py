"""Schedules of learning rate and weight decay, as pure functions of the iteration."""

import math

from megalite.optim.config import OptimizerConfig


def warmup_iterations(config: OptimizerConfig, decay_iterations: int) -> int:
    """Iterations of warm-up, from --lr-warmup-iters or --lr-warmup-fraction."""
    if config.lr_warmup_fraction is not None:
        return round(config.lr_warmup_fraction * decay_iterations)
    return config.lr_warmup_iters


def learning_rate(iteration: int, config: OptimizerConfig, train_iters: int) -> float:
    """The learning rate of the step that ends iteration `iteration`, counted from 1.

    Linear from lr_warmup_init to lr during the warm-up, which ends at lr. Then, by lr_decay_style:

    - constant: lr.
    - linear, cosine: a line, or half a cosine (Loshchilov and Hutter 2016), down to min_lr (unset:
      lr / 10) at `lr_decay_iters`, and min_lr from there on.
    - WSD (warm-up, stable, decay; Hu et al. 2024): lr, and within the last `lr_wsd_decay_iters`
      before `lr_decay_iters` down to min_lr.
    - inverse-square-root (Vaswani et al. 2017): lr sqrt(warm-up / iteration), at least min_lr.
    """
    decay = config.lr_decay_iters or train_iters
    warmup = warmup_iterations(config, decay)
    style = config.lr_decay_style
    if iteration <= warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * iteration / warmup
    if style == "constant":
        return config.lr
    if style == "inverse-square-root":
        return max(config.lowest_lr, config.lr * math.sqrt(max(warmup, 1) / iteration))
    if iteration >= decay:
        return config.lowest_lr
    if style == "WSD":
        start = decay - config.lr_wsd_decay_iters
        done = max(0, iteration - start) / config.lr_wsd_decay_iters
        share = _share(config.lr_wsd_decay_style, done)
    else:
        done = (iteration - warmup) / (decay - warmup)
        share = _share(style, done)
    return config.lowest_lr + share * (config.lr - config.lowest_lr)


def _share(style: str, done: float) -> float:
    """What is left of the way from lr to min_lr, 1 to 0, when `done` of the decay is done."""
    shares = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "exponential": 2 * 0.5**done - 1,
        "minus_sqrt": 1 - math.sqrt(done),
    }
    return shares[style]


def weight_decay(iteration: int, config: OptimizerConfig, train_iters: int) -> float:
    """The weight decay of the step that ends iteration `iteration`, counted from 1.

    By weight_decay_incr_style it stays, or goes from start_weight_decay to end_weight_decay at the
    last iteration along a line or half a cosine.
    """
    if config.weight_decay_incr_style == "constant":
        return config.weight_decay
    done = min(1.0, iteration / train_iters)
    left = _share(config.weight_decay_incr_style, done)
    return config.end_weight_decay + left * (config.start_weight_decay - config.end_weight_decay)
