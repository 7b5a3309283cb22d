"""GPT (Radford et al. 2019) as a chain of stages."""

from typing import ClassVar

import torch

from megalite.models.batch import Microbatch
from megalite.models.stage import Stage
from megalite.nn.attention import attention_mask
from megalite.nn.linear import column_parallel_linear
from megalite.nn.loss import vocab_parallel_cross_entropy


class GPT(Stage):
    """One pipeline stage of a GPT: embedding on the first, layers, final norm and output layer on
    the last."""

    causal: ClassVar[bool] = True
    loss_names = ("loss",)

    @staticmethod
    def loss_counts(batch: Microbatch) -> torch.Tensor:
        """The number of unmasked tokens, fp64 [1]."""
        return batch.loss_mask.sum(dtype=torch.float64).unsqueeze(0)

    def forward(self, x: torch.Tensor | None, batch: Microbatch) -> torch.Tensor:
        """One stage's share of the forward pass.

        x: hidden states from the previous stage; None on the first stage, which starts from the
        batch's tokens. Gives hidden states, except on the last stage: there the sum over unmasked
        tokens of the labels' cross-entropy, [1], or without labels the logits of the vocabulary
        this rank holds, [s, b, v/t].
        """
        # Without segments the causal flag is enough, and attention may take a faster kernel.
        mask = None if batch.segments is None else attention_mask(batch.segments, causal=True)
        x = self.hidden(x, batch, mask)
        if not self.is_last:
            return x
        weight = self.output_weight  # [v/t, h]
        group = self.settings.tensor
        logits = column_parallel_linear(x, weight, None, group, self.settings.sequence_parallel)
        if batch.labels is None:
            return logits  # [s, b, v/t]
        losses = vocab_parallel_cross_entropy(logits, batch.labels.t(), weight.spec, group)
        return (losses * batch.loss_mask.t()).sum().unsqueeze(0)  # [s, b] -> [1]
