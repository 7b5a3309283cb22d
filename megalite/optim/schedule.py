"""Schedules of learning rate and weight decay, as pure functions of the position in a run."""

import math
from dataclasses import dataclass

from megalite.optim.config import OptimizerConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of each step of a run.

    A position is the number of iterations, or of samples where the configuration counts samples, at
    the end of a step. So the first step of a run has position 1, or the size of its batch.
    """

    config: OptimizerConfig
    length: int
    """Position at the end of the training."""

    @classmethod
    def of_run(cls, config: OptimizerConfig, iterations: int, samples: int) -> "Schedule":
        """The schedules of a training of this many iterations, which consume `samples` samples."""
        return cls(config, samples if config.counts_samples else iterations)

    def position(self, iterations: int, samples: int) -> int:
        """The position after this many iterations, which have consumed `samples` samples."""
        return samples if self.config.counts_samples else iterations

    @property
    def decay(self) -> int:
        """Position at which the decay of the learning rate ends."""
        o = self.config
        return o.lr_decay_samples or o.lr_decay_iters or self.length  # a rule allows one of them

    @property
    def warmup(self) -> int:
        """Position at which the warm-up ends."""
        o = self.config
        if o.lr_warmup_fraction is not None:
            return round(o.lr_warmup_fraction * self.decay)
        return o.lr_warmup_samples or o.lr_warmup_iters

    @property
    def wsd_decay(self) -> int | None:
        """Iterations or samples of the decay of WSD."""
        o = self.config
        return o.lr_wsd_decay_samples or o.lr_wsd_decay_iters

    def learning_rate(self, position: int) -> float:
        """The learning rate of the step that ends at a position.

        Linear from lr_warmup_init to lr during the warm-up, which ends at lr. Then, by
        lr_decay_style:

        - constant: lr.
        - linear, cosine: a line, or half a cosine (Loshchilov and Hutter 2016), down to min_lr
          (unset: lr / 10) at the end of the decay, and min_lr from there on.
        - WSD (warm-up, stable, decay; Hu et al. 2024): lr, and over `wsd_decay` before the end of
          the decay down to min_lr.
        - inverse-square-root (Vaswani et al. 2017): lr sqrt(warm-up / position), at least min_lr.
        """
        config = self.config
        style = config.lr_decay_style
        if position <= self.warmup:
            rise = (config.lr - config.lr_warmup_init) * position / self.warmup
            return config.lr_warmup_init + rise
        if style == "constant":
            return config.lr
        if style == "inverse-square-root":
            return max(config.lowest_lr, config.lr * math.sqrt(max(self.warmup, 1) / position))
        if position >= self.decay:
            return config.lowest_lr
        if style == "WSD":
            start = self.decay - self.wsd_decay
            done = max(0, position - start) / self.wsd_decay
            share = _share(config.lr_wsd_decay_style, done)
        else:
            done = (position - self.warmup) / (self.decay - self.warmup)
            share = _share(style, done)
        return config.lowest_lr + share * (config.lr - config.lowest_lr)

    def weight_decay(self, position: int) -> float:
        """The weight decay of the step that ends at a position.

        By weight_decay_incr_style it stays, or goes from start_weight_decay to end_weight_decay at
        the end of the training along a line or half a cosine.
        """
        config = self.config
        if config.weight_decay_incr_style == "constant":
            return config.weight_decay
        left = _share(config.weight_decay_incr_style, min(1.0, position / self.length))
        change = config.start_weight_decay - config.end_weight_decay
        return config.end_weight_decay + left * change


def _share(style: str, done: float) -> float:
    """What is left of the way from lr to min_lr, 1 to 0, when `done` of the decay is done."""
    shares = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "exponential": 2 * 0.5**done - 1,
        "minus_sqrt": 1 - math.sqrt(done),
    }
    return shares[style]
