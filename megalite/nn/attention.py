"""Self-attention, multi-head or grouped-query (Ainslie et al. 2023), heads split over tensor-parallel ranks."""

import math
from functools import cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from megalite.kernels import native
from megalite.kernels.softmax import scaled_causal_softmax, scaled_masked_softmax, scaled_softmax
from megalite.nn.dropout import AttentionDropout
from megalite.nn.linear import ColumnParallelLinear, RowParallelLinear
from megalite.nn.recompute import recompute
from megalite.nn.rope import rotate
from megalite.nn.settings import LayerSettings
from megalite.parallel.rng import RngTracker


def attention_mask(segments: torch.Tensor, causal: bool) -> torch.Tensor:
    """Which tokens a token sees, bool [b, 1, s, s], query before key: those of its own segment (segments [b, s]), and
    of these, when causal, none that comes after it. It always sees itself."""
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    return mask.tril_() if causal else mask


def _for_each_head(q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of groups [b, g, s, d], repeated for each query head of q [b, n, s, d]."""
    repeat = q.shape[1] // k.shape[1]
    return (
        (k, v)
        if repeat == 1
        else (k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1))
    )


def explicit_attention(
    q, k, v, drop, causal: bool, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention with the scores formed: q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d].

    A token sees what `mask` says, or without one every token, when causal only those up to itself. The softmax is taken
    in fp32 for half precisions. `drop` is applied to the attention weights.
    """
    k, v = _for_each_head(q, k, v)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    softmax_dtype = (
        torch.float32 if scores.dtype in (torch.bfloat16, torch.float16) else scores.dtype
    )
    return drop(scores.softmax(dim=-1, dtype=softmax_dtype).to(q.dtype)) @ v


def fused_softmax_attention(
    q, k, v, dropout, causal: bool, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The same as `explicit_attention` with scale, mask, softmax and counted dropout (or None) in one kernel."""
    k, v = _for_each_head(q, k, v)
    scores, scale = q @ k.transpose(-1, -2), 1 / math.sqrt(q.shape[-1])
    if mask is not None:
        return scaled_masked_softmax(scores, scale, mask, dropout=dropout) @ v
    return (scaled_causal_softmax if causal else scaled_softmax)(scores, scale, dropout) @ v


@cache
def torch_kernel(
    device: torch.device,
    dtype: torch.dtype,
    repeat: int,
    head_size: int,
    masked: bool,
    causal: bool,
) -> str | None:
    """The fused kernel that scaled_dot_product_attention takes for such tensors, `repeat` query heads to one of keys;
    None where it has none and would form the scores."""
    q = torch.empty(1, repeat, 16, head_size, device=device, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, 16, 16, device=device, dtype=torch.bool) if masked else None
    causal = causal and not masked
    choice = torch._fused_sdp_choice(
        q, q[:, :1], q[:, :1], mask, 0.0, causal, enable_gqa=repeat > 1
    )
    return (
        None
        if choice == SDPBackend.MATH.value
        else SDPBackend(choice).name.lower().replace("_", " ")
    )


@torch.compiler.assume_constant_result
def _torch_kernel(*arguments) -> str | None:
    """The same for torch.compile, which would trace what a cached function does."""
    return torch_kernel(*arguments)


class Attention(nn.Module):
    """qkv projection, attention core, output projection.

    The weight of a key/value group is one row block [q + 2, d, h] of qkv: its q query heads, then its key, then its
    value; so a rank's shard is one box.

    Args:
        settings: what all layers share.
        layer: number of the layer in the whole model.
        causal: whether a token sees only those before it and itself.
    """

    def __init__(self, settings: LayerSettings, layer: int, causal: bool):
        super().__init__()
        model = settings.model
        self.causal = causal
        self.queries_per_group = model.num_attention_heads // model.query_groups
        self.head_size = model.head_size
        self.dropout = AttentionDropout(settings, layer)
        self.rng = settings.rng
        self.wanted = model.attention_backend
        self.recompute = settings.recompute.granularity == "selective"
        features = (model.query_groups, self.queries_per_group + 2, model.head_size)
        self.qkv = ColumnParallelLinear(settings, model.hidden_size, features)
        self.output = RowParallelLinear(
            settings, model.num_attention_heads * model.head_size, model.hidden_size
        )

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[s, b, h] -> [s, b, h] without the output bias; `rotary` is the table of `nn.rope`, or None; `mask` that of
        `attention_mask`, or None where a row is one segment."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.queries_per_group + 2, self.head_size))
        q, k, v = qkv.split([self.queries_per_group, 1, 1], dim=-2)
        q, k, v = (part.flatten(2, 3) for part in (q, k, v))  # [s, b, heads held here, d]
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))  # [b, heads, s, d]
        if self.recompute and torch.is_grad_enabled():
            y = recompute(self._core, self.rng, q, k, v, mask, samples)
        else:
            y = self._core(q, k, v, mask, samples)
        return self.output(y.permute(2, 0, 1, 3).flatten(2))

    def backend(self, x: torch.Tensor, masked: bool) -> tuple[str, str]:
        """(backend, reason) for tensors of x's dtype and device, as training or evaluation has it. Raises ValueError
        where the wanted one cannot drop weights."""
        p, streams = self.dropout.p if self.training else 0.0, isinstance(self.rng, RngTracker)
        if p > 0 and (self.wanted == "sdpa" or (self.wanted == "fused-softmax" and streams)):
            raise ValueError(
                f"attention by {self.wanted} cannot drop weights as this random-number scheme says"
            )
        if self.wanted != "auto":
            return self.wanted, f"--attention-backend {self.wanted}"
        if p > 0 and streams:
            return "eager", "dropout draws from --rng-scheme megatron's streams"
        if p > 0:
            return (
                "fused-softmax",
                "it drops weights by counting, as torch's fused attention cannot",
            )
        kernel = _torch_kernel(
            x.device, x.dtype, self.queries_per_group, self.head_size, masked, self.causal
        )
        if kernel is None and native.takes(x):
            return "fused-softmax", "nothing is dropped, but torch has no fused attention for this"
        return (
            "sdpa",
            f"nothing is dropped; torch's {kernel or 'operations: it has no fused attention for this'}",
        )

    def _core(
        self, q, k, v, mask: torch.Tensor | None, samples: torch.Tensor | None
    ) -> torch.Tensor:
        """The attention core: q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d]."""
        p = self.dropout.p if self.training else 0.0
        backend, _ = self.backend(q, mask is not None)
        if backend == "sdpa":
            return nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                mask,
                is_causal=self.causal and mask is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        if backend == "fused-softmax":
            counted = self.dropout.counter_based(*q.shape[1:3], samples) if p else None
            return fused_softmax_attention(q, k, v, counted, self.causal, mask)
        drop = (lambda weights: self.dropout(weights, samples)) if p else (lambda weights: weights)
        return explicit_attention(q, k, v, drop, self.causal, mask)
