"""BERT (Devlin et al. 2018) as a chain of stages."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from megalite.models.batch import Microbatch
from megalite.models.stage import Stage
from megalite.nn.attention import attention_mask
from megalite.nn.embedding import vocab_parallel_parameter
from megalite.nn.linear import ReplicatedLinear, column_parallel_linear
from megalite.nn.loss import vocab_parallel_argmax, vocab_parallel_cross_entropy
from megalite.nn.mlp import gelu
from megalite.nn.norm import Norm
from megalite.nn.settings import LayerSettings
from megalite.parallel.collectives import gather_sequence


class MaskedLanguageHead(nn.Module):
    """norm(gelu(dense(x))), and the bias of the output layer, which is the word embedding's
    transpose if tied."""

    def __init__(self, settings: LayerSettings):
        super().__init__()
        hidden = settings.model.hidden_size
        self.gelu = settings.model.gelu
        self.dense = ReplicatedLinear(settings, hidden, hidden)
        self.norm = Norm(settings, on_part=False)
        self.bias = vocab_parallel_parameter(settings, "zeros") if settings.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]: what the output layer takes."""
        return self.norm(gelu(self.dense(x), self.gelu))


class BertEncoder(Stage):
    """One pipeline stage of a BERT without its heads. A last stage that pools has a layer
    `pooler`."""

    causal: ClassVar[bool] = False
    token_types: ClassVar[int] = 2

    def encode(self, x: Tensor | None, batch: Microbatch) -> Tensor:
        """This stage's share of the encoder: hidden states, of the last stage [s, b, h] of whole
        sequences after the final norm. Tokens see those of their own segment: padding is a segment
        of its own."""
        mask = None if batch.segments is None else attention_mask(batch.segments, causal=False)
        x = self.hidden(x, batch, mask)
        # The heads choose tokens anywhere in a sequence, and every rank computes them alike.
        if self.is_last and self.settings.sequence_parallel:
            x = gather_sequence(x, self.settings.tensor, partial_gradients=False)
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """tanh(linear(first token)) of what `encode` gives on the last stage: [s, b, h] -> [b,
        h]."""
        return self.pooler(x[0]).tanh()


class Bert(BertEncoder):
    """One pipeline stage of a BERT: embedding on the first, layers, final norm and heads on the
    last.

    The output layer is computed for the tokens to be predicted only, of whole sequences: under
    sequence parallelism they are gathered first, so that the heads' work and gradients are the same
    on every tensor-parallel rank.

    Args:
        settings, layers, seed, first: as of a Stage.
        pair: give the last stage a pooler and a head that classifies pairs of segments
            (next-sentence or sentence-order prediction).
    """

    def __init__(
        self,
        settings: LayerSettings,
        layers: range | None = None,
        seed: int = 1234,
        first: Stage | None = None,
        *,
        pair: bool = True,
    ):
        self.has_pair = pair  # before nn.Module's own: build_heads needs it
        super().__init__(settings, layers, seed, first)
        self.loss_names = ("mlm_loss", "pair_loss") if pair else ("loss",)
        self.score_names = ("mlm_accuracy", "pair_accuracy") if pair else ("mlm_accuracy",)

    def build_heads(self) -> None:
        """The masked-language-model head, and for pairs the pooler and their head."""
        hidden = self.model_config.hidden_size
        self.mlm_head = MaskedLanguageHead(self.settings)
        if self.has_pair:
            self.pooler = ReplicatedLinear(self.settings, hidden, hidden)
            self.pair_head = ReplicatedLinear(self.settings, hidden, 2)

    @property
    def inputs(self) -> set[str]:
        """Fields of a microbatch that this stage reads: the padding mask everywhere, token types on
        the first, what is to be predicted on the last."""
        fields = super().inputs
        if self.is_first:
            fields |= {"token_types"}
        if self.is_last and self.has_pair:
            fields |= {"pair_label", "pair_mask"}
        return fields

    def loss_counts(self, batch: Microbatch) -> Tensor:
        """The number of tokens to be predicted, and of pairs, fp64 [2]; or of the tokens alone,
        fp64 [1]."""
        counts = [batch.loss_mask.sum(dtype=torch.float64)]
        if self.has_pair:
            counts.append(batch.pair_mask.sum(dtype=torch.float64))
        return torch.stack(counts)

    def forward(self, x: Tensor | None, batch: Microbatch) -> Tensor:
        """One stage's share of the forward pass.

        x: hidden states from the previous stage; None on the first stage, which starts from the
        batch's tokens. Gives hidden states, except on the last stage: there the sums over tokens to
        be predicted and over pairs of their cross-entropy, [2] ([1] without pairs), in evaluation
        mode followed by the numbers of right guesses; or without labels the logits of every token,
        [s, b, v/t].
        """
        x = self.encode(x, batch)
        if not self.is_last:
            return x
        if batch.labels is None:
            return self._logits(x)
        sums = [self._masked_tokens(x, batch)]
        if self.has_pair:
            sums.append(self._pairs(x, batch))
        return torch.stack(sums, dim=1).flatten()  # the losses, then the numbers of right guesses

    def _logits(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., v/t]."""
        head = self.mlm_head
        return column_parallel_linear(head(x), self.output_weight, head.bias, self.settings.tensor)

    def _masked_tokens(self, x: Tensor, batch: Microbatch) -> Tensor:
        """Over the tokens to be predicted, the sum of their losses, [1]; in evaluation mode also
        the number that is guessed right, [2]."""
        chosen = batch.loss_mask.t() > 0  # [s, b]
        logits = self._logits(x[chosen])  # [chosen tokens, v/t]
        labels = batch.labels.t()[chosen]
        spec = self.output_weight.spec
        group = self.settings.tensor
        sums = [vocab_parallel_cross_entropy(logits, labels, spec, group).sum()]
        if not self.training:
            guesses = vocab_parallel_argmax(logits, spec, group)
            sums.append((guesses == labels).sum().to(sums[0].dtype))
        return torch.stack(sums)

    def _pairs(self, x: Tensor, batch: Microbatch) -> Tensor:
        """Over the pairs of segments, the sum of their losses, [1]; in evaluation mode also the
        number that is guessed right, [2]."""
        logits = self.pair_head(self.pooled(x))  # [b, 2]
        # As the vocabulary's cross-entropy does: losses in fp32 for half precisions.
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        losses = nn.functional.cross_entropy(logits, batch.pair_label, reduction="none")
        sums = [(losses * batch.pair_mask).sum()]
        if not self.training:
            right = (logits.argmax(dim=-1) == batch.pair_label) * batch.pair_mask
            sums.append(right.sum().to(sums[0].dtype))
        return torch.stack(sums)
