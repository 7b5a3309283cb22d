"""Which steps are bad, so that their update is skipped. Pure arithmetic, no torch."""

import math
from statistics import median

from megalite.optim.config import OptimizerConfig

WINDOW = 100
"""Good steps whose median gradient norm a step is compared with."""
FEWEST = 10
"""Good steps before which no finite norm is bad."""


class BadSteps:
    """Judges steps by their global gradient norm, and counts the bad ones.

    All ranks judge the same norm, so all skip the same steps.
    """

    def __init__(self, config: OptimizerConfig):
        self.limit = config.skip_grad_norm_above
        self.most = config.max_bad_steps
        self.total = 0
        """Bad steps so far."""
        self.in_a_row = 0
        """Bad steps since the last good one."""
        self.norms: list[float] = []
        """Gradient norms of the last good steps, if they are compared."""

    @property
    def are_too_many(self) -> bool:
        """Whether more steps in a row were bad than --max-bad-steps."""
        return self.in_a_row > self.most

    def judge(self, norm: float) -> str:
        """Count a step with this gradient norm. Returns why it is bad; "" where it is good."""
        reason = self._reason(norm)
        if reason:
            self.total += 1
            self.in_a_row += 1
            return reason
        self.in_a_row = 0
        if self.limit is not None:
            self.norms = [*self.norms[-WINDOW + 1 :], norm]
        return ""

    def _reason(self, norm: float) -> str:
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.limit is None or len(self.norms) < FEWEST:
            return ""
        usual = median(self.norms)
        if norm <= self.limit * usual:
            return ""
        return (
            f"the gradient norm {norm:.4g} is above --skip-grad-norm-above {self.limit:g} times "
            f"the median {usual:.4g}"
        )

    def state(self) -> dict:
        """What a checkpoint stores."""
        return {"total": self.total, "in_a_row": self.in_a_row, "norms": self.norms}

    def restore(self, state: dict) -> None:
        """Continue from what `state` gave; from nothing, start to count."""
        self.total = state.get("total", 0)
        self.in_a_row = state.get("in_a_row", 0)
        self.norms = list(state.get("norms", ())) if self.limit is not None else []
