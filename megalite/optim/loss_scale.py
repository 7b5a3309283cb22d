"""The factor that the loss is multiplied by before the backward, so that small gradients do not
vanish in fp16 (Micikevicius et al. 2018). Pure arithmetic, no torch."""

from dataclasses import dataclass

from megalite.optim.config import OptimizerConfig

STORED = ("value", "steps_without_overflow", "overflows_left", "overflows")
"""Attributes of an adapting loss scale that a checkpoint stores."""


@dataclass
class LossScale:
    """A constant factor, or one that is halved after overflows and doubled after a time without.

    All ranks update theirs with the same outcome, so it is the same on every rank.
    """

    value: float = 1.0
    """What the loss is multiplied by now."""
    smallest: float = 1.0
    """It is not lowered below this. Equal to `value`, with `window` 0: a constant scale."""
    window: int = 0
    """Steps in a row without overflow after which it is doubled; 0: it is constant."""
    hysteresis: int = 1
    """Overflows, since it was last doubled, from which on each halves it."""
    steps_without_overflow: int = 0
    overflows_left: int = 1
    """Overflows until it is halved."""
    overflows: int = 0
    """Steps that overflowed, in all."""

    @classmethod
    def from_config(cls, config: OptimizerConfig) -> "LossScale":
        """As the flags say: 1 unless the precision is fp16."""
        if config.dtype != "float16":
            return cls()
        if config.loss_scale is not None:
            return cls(value=config.loss_scale, smallest=config.loss_scale)
        return cls(
            value=config.initial_loss_scale,
            smallest=config.min_loss_scale,
            window=config.loss_scale_window,
            hysteresis=config.hysteresis,
            overflows_left=config.hysteresis,
        )

    @property
    def can_fall(self) -> bool:
        """Whether a step that overflows is worth trying again with a smaller factor."""
        return self.window > 0 and self.value > self.smallest

    def update(self, overflowed: bool) -> None:
        """Count a step."""
        if not self.window:
            return
        if overflowed:
            self.overflows += 1
            self.steps_without_overflow = 0
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.value = max(self.value / 2, self.smallest)
            return
        self.steps_without_overflow += 1
        if self.steps_without_overflow == self.window:
            self.steps_without_overflow = 0
            self.overflows_left = self.hysteresis
            self.value *= 2

    def restart_window(self) -> None:
        """Count steps without overflow from 0 again, after a bad step that leaves the scale as it
        is."""
        self.steps_without_overflow = 0

    def state(self) -> dict[str, float]:
        """What a checkpoint stores: nothing of a constant scale."""
        return {key: getattr(self, key) for key in STORED} if self.window else {}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from what `state` gave. A scale that is or was constant starts by its flags."""
        if self.window and state:
            for key in STORED:
                setattr(self, key, state[key])
            self.value = max(self.value, self.smallest)
