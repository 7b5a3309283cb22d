"""What one rank holds of a model: one stage, or several where the pipeline's schedule asks for
it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megalite.models.batch import Microbatch
from megalite.models.stage import Stage


class Stages(nn.Module):
    """The stages of one rank, as one model with parameters by global name.

    Args:
        stages: by their number in the whole model, ascending. They have the same settings; the last
            one of the model has the first one's word embedding, if the rank holds both and it is
            tied.
    """

    def __init__(self, stages: Mapping[int, Stage]):
        super().__init__()
        self.by_number = dict(stages)
        self.stages = nn.ModuleList(stages.values())
        first = self.stages[0]
        self.context = first.context
        self.settings = first.settings
        self.model_config = first.model_config
        self.is_first = any(stage.is_first for stage in self.stages)
        self.is_last = any(stage.is_last for stage in self.stages)
        self.parameters_by_name: dict[str, nn.Parameter] = {}
        """In the order of the forward."""
        for stage in self.stages:
            self.parameters_by_name |= stage.parameters_by_name

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Terms of the loss, as of a Stage."""
        return self.stages[-1].loss_names

    @property
    def score_names(self) -> tuple[str, ...]:
        """Scores in evaluation mode, as of a Stage."""
        return self.stages[-1].score_names

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states that pass between stages."""
        return self.settings.dtype

    @property
    def inputs(self) -> set[str]:
        """Fields of a microbatch that any of the stages reads."""
        fields: set[str] = set()
        for stage in self.stages:
            fields |= stage.inputs
        return fields

    def hidden_shape(self, microbatch: int) -> tuple[int, int, int]:
        """As `Stage.hidden_shape`."""
        return self.stages[0].hidden_shape(microbatch)

    def loss_counts(self, batch: Microbatch) -> Tensor:
        """As the last stage's `loss_counts`."""
        return self.stages[-1].loss_counts(batch)

    def forward(self, x: Tensor | None, batch: Microbatch) -> Tensor:
        """The forward of the one stage that this is. Raises ValueError when there are several,
        which only an engine can run."""
        if len(self.stages) > 1:
            raise ValueError(f"this rank holds {len(self.stages)} stages: call them one by one")
        return self.stages[0](x, batch)
