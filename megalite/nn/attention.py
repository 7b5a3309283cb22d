"""Self-attention, multi-head or grouped-query (Ainslie et al. 2023), heads split over
tensor-parallel ranks."""

import math
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from megalite.kernels import native
from megalite.kernels.softmax import scaled_causal_softmax, scaled_masked_softmax, scaled_softmax
from megalite.nn.dropout import AttentionDropout
from megalite.nn.linear import ColumnParallelLinear, RowParallelLinear
from megalite.nn.norm import Norm
from megalite.nn.recompute import recompute
from megalite.nn.rope import RotaryTable, rotate
from megalite.nn.settings import LayerSettings
from megalite.parallel.rng import RngTracker


def attention_mask(segments: Tensor, causal: bool) -> Tensor:
    """Which tokens a token sees, bool [b, 1, s, s], query before key: those of its own segment
    (segments [b, s]), and of these, when causal, none that comes after it. It always sees
    itself."""
    # [b, 1, s, 1] of queries beside [b, 1, 1, s] of keys.
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    return mask.tril_() if causal else mask


def _for_each_head(q, k, v) -> tuple[Tensor, Tensor]:
    """Keys and values of groups [b, g, s, d], repeated for each query head of q [b, n, s, d]."""
    repeat = q.shape[1] // k.shape[1]
    if repeat == 1:
        return k, v
    return k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)


def explicit_attention(q, k, v, *, drop, causal: bool, mask: Tensor | None = None) -> Tensor:
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
    # A sum over a row in bf16 would lose its small terms.
    half = scores.dtype in (torch.bfloat16, torch.float16)
    softmax_dtype = torch.float32 if half else scores.dtype
    weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(q.dtype)
    if drop is not None:
        weights = drop(weights)
    return weights @ v


def fused_softmax_attention(q, k, v, dropout, causal: bool, mask: Tensor | None = None) -> Tensor:
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
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], masked: bool, causal: bool
) -> str | None:
    """The fused kernel that scaled_dot_product_attention takes for such tensors; None where it has
    none and would form the scores.

    heads: query heads to one of keys, and the size of a head.
    """
    repeat, head_size = heads
    q = torch.empty(1, repeat, 16, head_size, device=device, dtype=dtype, requires_grad=True)
    k = q[:, :1]
    mask = torch.ones(1, 1, 16, 16, device=device, dtype=torch.bool) if masked else None
    causal = causal and not masked
    choice = torch._fused_sdp_choice(q, k, k, mask, 0.0, causal, enable_gqa=repeat > 1)
    if choice == SDPBackend.MATH.value:
        return None
    return SDPBackend(choice).name.lower().replace("_", " ")


@torch.compiler.assume_constant_result
def _torch_kernel(*arguments) -> str | None:
    """`torch_kernel` for torch.compile, which would trace what a cached function does."""
    return torch_kernel(*arguments)


class Attention(nn.Module):
    """qkv projection, attention core, output projection.

    The qkv weight [g, q + 2, d, h] has a block for each of the g key/value groups: its q query
    heads, then its key, then its value. A rank holds whole groups, so its shard is one box. With
    --qk-layernorm every rank holds the whole weights [d] of `query_norm` and `key_norm`.

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
        # Groups come first: tensor parallelism then splits between groups, and never inside one.
        features = (model.query_groups, self.queries_per_group + 2, model.head_size)
        self.qkv = ColumnParallelLinear(settings, model.hidden_size, features, bias=model.qkv_bias)
        self.query_norm = None
        self.key_norm = None
        if model.qk_layernorm:
            self.query_norm = Norm(settings, of_heads=True)
            self.key_norm = Norm(settings, of_heads=True)
        width = model.num_attention_heads * model.head_size
        self.output = RowParallelLinear(settings, width, model.hidden_size)

    def forward(
        self, x: Tensor, rotary: RotaryTable | None, mask: Tensor | None, samples: Tensor | None
    ) -> Tensor:
        """[s, b, h] -> [s, b, h], both [s/t, b, h] under sequence parallelism. The output bias is
        not added.

        rotary: the table of `nn.rope`, or None.
        mask: bool [b, 1, s, s] of `attention_mask`; None: a row is one segment.
        samples: [b] global numbers of the rows, for counter-based dropout.
        """
        # Project, and take the heads of each group apart: [s, b, heads held here, d].
        qkv = self.qkv(x).unflatten(-1, (-1, self.queries_per_group + 2, self.head_size))
        parts = qkv.split([self.queries_per_group, 1, 1], dim=-2)  # [s, b, groups here, 1 or q, d]
        q, k, v = (part.flatten(2, 3) for part in parts)
        if self.query_norm is not None:
            q = self.query_norm(q)
            k = self.key_norm(k)
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary)

        # Attend: [b, heads, s, d].
        q, k, v = (heads.permute(1, 2, 0, 3) for heads in (q, k, v))
        if self.recompute and torch.is_grad_enabled():
            y = recompute(self._core, self.rng, q, k, v, mask, samples)
        else:
            y = self._core(q, k, v, mask, samples)
        return self.output(y.permute(2, 0, 1, 3).flatten(2))

    def backend(self, x: Tensor, masked: bool) -> tuple[str, str]:
        """(backend, reason) for tensors of x's dtype and device, as training or evaluation has it.

        Raises ValueError where the wanted backend cannot drop weights.
        """
        drops = self.training and self.dropout.p > 0
        streams = isinstance(self.rng, RngTracker)
        # torch's attention draws its own random numbers, our kernel takes those of counters:
        # neither can follow a stream.
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
        # Nothing is dropped: torch's fused attention is the fastest, where it has one.
        heads = (self.queries_per_group, self.head_size)
        kernel = _torch_kernel(x.device, x.dtype, heads, masked, self.causal)
        if kernel is not None:
            return "sdpa", f"nothing is dropped; torch's {kernel}"
        if native.takes(x):
            return "fused-softmax", "nothing is dropped, but torch has no fused attention for this"
        return "sdpa", "nothing is dropped; torch's operations: it has no fused attention for this"

    def _core(self, q, k, v, mask: Tensor | None, samples: Tensor | None) -> Tensor:
        """The attention core: q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d]."""
        backend, _ = self.backend(q, mask is not None)
        drops = self.training and self.dropout.p > 0
        if backend == "sdpa":
            # A mask says itself what is causal; torch takes one or the other.
            causal = self.causal and mask is None
            grouped = q.shape[1] != k.shape[1]
            return nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )
        if backend == "fused-softmax":
            dropout = self.dropout.counter_based(*q.shape[1:3], samples) if drops else None
            return fused_softmax_attention(q, k, v, dropout=dropout, causal=self.causal, mask=mask)
        drop = partial(self.dropout, samples=samples) if drops else None
        return explicit_attention(q, k, v, drop=drop, causal=self.causal, mask=mask)
