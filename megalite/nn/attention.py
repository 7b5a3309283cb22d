"""Self-attention, multi-head or grouped-query (Ainslie et al. 2023), heads split over
tensor-parallel ranks."""

import math
from functools import cache, partial

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
    """Which tokens a token sees, bool [b, 1, s, s], query before key: those of its own segment
    (segments [b, s]), and of these, when causal, none that comes after it. It always sees
    itself."""
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    return mask.tril_() if causal else mask


def _for_each_head(q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of groups [b, g, s, d], repeated for each query head of q [b, n, s, d]."""
    repeat = q.shape[1] // k.shape[1]
    if repeat == 1:
        return k, v
    return k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)


def explicit_attention(
    q, k, v, *, drop, causal: bool, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention with the scores formed: q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d].

    A token sees what `mask` says, or without one every token, when causal only those up to itself.
    The softmax is taken in fp32 for half precisions. `drop` is applied to the attention weights;
    None: nothing is dropped.
    """
    k, v = _for_each_head(q, k, v)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    half = scores.dtype in (torch.bfloat16, torch.float16)
    softmax_dtype = torch.float32 if half else scores.dtype
    weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(q.dtype)
    if drop is not None:
        weights = drop(weights)
    return weights @ v


def fused_softmax_attention(
    q, k, v, *, dropout, causal: bool, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """What `explicit_attention` computes, with scale, mask, softmax and counter-based dropout (or
    None) in one kernel: q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d]."""
    k, v = _for_each_head(q, k, v)
    scores = q @ k.transpose(-1, -2)
    scale = 1 / math.sqrt(q.shape[-1])
    if mask is not None:
        return scaled_masked_softmax(scores, scale, mask, dropout=dropout) @ v
    softmax = scaled_causal_softmax if causal else scaled_softmax
    return softmax(scores, scale, dropout) @ v


@cache
def torch_kernel(
    device: torch.device,
    dtype: torch.dtype,
    repeat: int,
    head_size: int,
    masked: bool,
    causal: bool,
) -> str | None:
    """The fused kernel that scaled_dot_product_attention takes for such tensors, `repeat` query
    heads to one of keys; None where it has none and would form the scores."""
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
def _torch_kernel(**arguments) -> str | None:
    """`torch_kernel` for torch.compile, which would trace what a cached function does."""
    return torch_kernel(**arguments)


class Attention(nn.Module):
    """qkv projection, attention core, output projection.

    The weight of a key/value group is one row block [q + 2, d, h] of qkv: its q query heads, then
    its key, then its value; so a rank's shard is one box.

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
        """[s, b, h] -> [s, b, h] without the output bias.

        rotary: the table of `nn.rope`, or None. mask: of `attention_mask`, or None where a row is
        one segment.
        samples: [b] global numbers of the rows, for dropout.
        """
        # Project, and take the heads of each group apart: [s, b, heads held here, d].
        qkv = self.qkv(x).unflatten(-1, (-1, self.queries_per_group + 2, self.head_size))
        q, k, v = qkv.split([self.queries_per_group, 1, 1], dim=-2)
        q = q.flatten(2, 3)
        k = k.flatten(2, 3)
        v = v.flatten(2, 3)
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary)

        # Attend: [b, heads, s, d].
        q, k, v = (projected.permute(1, 2, 0, 3) for projected in (q, k, v))
        if self.recompute and torch.is_grad_enabled():
            y = recompute(self._core, self.rng, q, k, v, mask, samples)
        else:
            y = self._core(q, k, v, mask, samples)
        return self.output(y.permute(2, 0, 1, 3).flatten(2))

    def backend(self, x: torch.Tensor, masked: bool) -> tuple[str, str]:
        """(backend, reason) for tensors of x's dtype and device, as training or evaluation has it.

        Raises ValueError where the wanted backend cannot drop weights.
        """
        drops = self.training and self.dropout.p > 0
        streams = isinstance(self.rng, RngTracker)
        impossible = self.wanted == "sdpa" or (self.wanted == "fused-softmax" and streams)
        if drops and impossible:
            raise ValueError(
                f"attention by {self.wanted} cannot drop weights as this random-number scheme says"
            )
        if self.wanted != "auto":
            return self.wanted, f"--attention-backend {self.wanted}"
        if drops and streams:
            return "eager", "dropout draws from --rng-scheme megatron's streams"
        if drops:
            reason = "its dropout is counter-based, which torch's fused attention does not offer"
            return "fused-softmax", reason
        kernel = _torch_kernel(
            device=x.device,
            dtype=x.dtype,
            repeat=self.queries_per_group,
            head_size=self.head_size,
            masked=masked,
            causal=self.causal,
        )
        if kernel is not None:
            return "sdpa", f"nothing is dropped; torch's {kernel}"
        if native.takes(x):
            return "fused-softmax", "nothing is dropped, but torch has no fused attention for this"
        return "sdpa", "nothing is dropped; torch's operations: it has no fused attention for this"

    def _core(
        self, q, k, v, mask: torch.Tensor | None, samples: torch.Tensor | None
    ) -> torch.Tensor:
        """The attention core: q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d]."""
        backend, _ = self.backend(q, mask is not None)
        drops = self.training and self.dropout.p > 0
        if backend == "sdpa":
            return nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=self.causal and mask is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        if backend == "fused-softmax":
            dropout = self.dropout.counter_based(*q.shape[1:3], samples) if drops else None
            return fused_softmax_attention(q, k, v, dropout=dropout, causal=self.causal, mask=mask)
        drop = partial(self.dropout, samples=samples) if drops else None
        return explicit_attention(q, k, v, drop=drop, causal=self.causal, mask=mask)
