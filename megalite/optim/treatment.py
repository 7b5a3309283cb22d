"""How each parameter is updated, as the flags say. Imports no torch."""

from dataclasses import dataclass

from megalite.optim.config import OptimizerConfig


@dataclass(frozen=True)
class Treatment:
    """How a parameter is updated. Parameters of equal treatment are one parameter group of
    torch's."""

    rule: str
    """Its update rule: a key of UPDATE_RULES."""
    decays: bool
    """Whether it has weight decay."""


def treatment_of(name: str, dims: int, decays: bool, config: OptimizerConfig) -> Treatment:
    """The treatment of one parameter.

    Args:
        name: global name.
        dims: number of dims of its global shape.
        decays: False for biases and norms.
        config: the flags.
    """
    rule = config.optimizer
    if rule == "muon" and not (dims > 1 and name.startswith("layers.")):
        rule = "adam"
    return Treatment(rule=rule, decays=decays)
