"""The attention core with its scores formed, and rotary positions."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megalite.nn.attention import attention_mask, explicit_attention
from megalite.nn.config import ModelConfig
from megalite.nn.rope import model_frequencies, rotary_frequencies, rotary_table, rotate, table_at


def heads(count: int, seed: int, dtype=torch.float64, s: int = 7, d: int = 4) -> torch.Tensor:
    return torch.randn(
        2, count, s, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def keep(weights):
    return weights


SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 3], [5, 5, 5, 5, 5, 4, 4]])
KINDS = {
    # (causal, segments): what torch's function is told
    "causal": (True, None, {"is_causal": True}),
    "causal segments": (True, SEGMENTS, {"attn_mask": attention_mask(SEGMENTS, True)}),
    "segments": (False, SEGMENTS, {"attn_mask": attention_mask(SEGMENTS, False)}),
    "everything": (False, None, {}),
}


def test_a_token_sees_its_own_segment():
    both, causal = attention_mask(SEGMENTS, False), attention_mask(SEGMENTS, True)
    assert both.shape == causal.shape == (2, 1, 7, 7)
    for row in range(2):
        for i in range(7):
            for j in range(7):
                together = bool(SEGMENTS[row, i] == SEGMENTS[row, j])
                assert both[row, 0, i, j] == together and causal[row, 0, i, j] == (
                    together and j <= i
                )


@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_explicit_scores_are_torchs_fused_attention(kind, groups):
    """Values and gradients, multi-head and grouped-query."""
    causal, segments, told = KINDS[kind]
    mask = None if segments is None else attention_mask(segments, causal)
    inputs = [heads(6, 1), heads(groups, 2), heads(groups, 3)]
    results = []
    for core in (
        lambda q, k, v: explicit_attention(q, k, v, drop=keep, causal=causal, mask=mask),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True, **told),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = core(*leaves)
        y.backward(heads(6, 4))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_a_token_does_not_see_what_comes_after_it():
    q, k, v = heads(4, 1), heads(2, 2), heads(2, 3)
    before = explicit_attention(q, k, v, drop=keep, causal=True)
    for x in (q, k, v):
        x[:, :, 4:] = 100.0
    assert torch.equal(
        explicit_attention(q, k, v, drop=keep, causal=True)[:, :, :4], before[:, :, :4]
    )
    assert torch.equal(before[:, :, 0], heads(2, 3)[:, :, 0].repeat_interleave(2, dim=1))


def test_dropout_is_applied_to_weights_that_sum_to_one():
    seen = []

    def drop(weights):
        seen.append(weights)
        return weights * torch.tensor([0.0, 2.0]).repeat(4)[:7]

    q, k, v = heads(2, 1), heads(2, 2), heads(2, 3)
    dropped = explicit_attention(q, k, v, drop=drop, causal=True)
    (weights,) = seen
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))
    assert not weights.triu(1).any()
    torch.testing.assert_close(dropped, 2 * weights[..., 1::2] @ v[..., 1::2, :])


def test_softmax_of_bf16_is_taken_in_fp32():
    """The weights are those of the bf16 scores, rounded once."""
    q, k = heads(1, 1, torch.bfloat16), heads(1, 2, torch.bfloat16)
    identity = torch.eye(7, dtype=torch.bfloat16).expand(2, 1, 7, 7)
    scores = (q @ k.transpose(-1, -2)) / 2
    scores = scores.float().masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    assert torch.equal(
        explicit_attention(q, k, identity, drop=keep, causal=True), scores.softmax(-1).bfloat16()
    )


def test_rotation_is_multiplication_by_a_complex_phase():
    """Components i and i + d/2 are one complex number that turns by position * base^(-2i/d)."""
    s, d, base = 9, 6, 100.0
    x = torch.randn(s, 2, 3, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turns = torch.arange(s).double()[:, None] * base ** (-2 * torch.arange(d // 2).double() / d)
    phase = torch.polar(torch.ones_like(turns), turns)[:, None, None]
    expected = torch.view_as_complex(torch.stack(x.chunk(2, dim=-1), dim=-1)) * phase
    got = rotate(x, rotary_table(s, rotary_frequencies(d, base), torch.float64))
    torch.testing.assert_close(got, torch.cat([expected.real, expected.imag], dim=-1))


def test_scores_of_rotated_vectors_depend_on_the_distance_only():
    q, k = (
        torch.randn(8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i in (1, 2)
    )
    table = rotary_table(50, rotary_frequencies(8, 10000.0), torch.float64)
    q, k = (rotate(x.expand(50, 1, 1, 8), table).squeeze() for x in (q, k))
    scores = q @ k.t()
    for distance in (0, 1, 20):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))


def test_a_table_is_looked_up_for_each_row():
    table = rotary_table(5, rotary_frequencies(4, 100.0), torch.float64)
    positions = torch.tensor([[0, 1, 2, 0], [4, 0, 0, 1], [0, 1, 2, 3]])
    for whole, rows in zip(table, table_at(table, positions)):
        assert rows.shape == (4, 3, 1, 4)
        assert all(
            torch.equal(rows[i, b, 0], whole[positions[b, i], 0, 0])
            for b in range(3)
            for i in range(4)
        )


def test_angles_are_exact_at_far_positions():
    """Angles in fp32 would be off by up to 2^-24 * 10^5 = 6e-3 there."""
    cos, _ = rotary_table(100_001, rotary_frequencies(4, 10000.0), torch.float32)
    expected = torch.tensor([100_000.0, 1000.0], dtype=torch.float64).cos().float().repeat(2)
    torch.testing.assert_close(cos[100_000, 0, 0], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("factor", "high", "length", "base", "d"),
    [(8.0, 4.0, 8192, 500000.0, 128), (32.0, 4.0, 8192, 500000.0, 64), (4.0, 2.0, 64, 1e4, 16)],
    ids=["llama-3.1-8b", "llama-3.2-1b", "short"],
)
def test_scaled_frequencies_are_those_of_transformers(factor, high, length, base, d):
    """Theirs are fp32, with a rounding for each of about 6 operations."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=4 * d, num_attention_heads=4, rope_parameters=scaling), "cpu"
    )
    model = ModelConfig(
        kv_channels=d,
        rotary_base=base,
        rope_scaling="llama3",
        rope_scaling_factor=factor,
        rope_high_freq_factor=high,
        rope_original_max_position_embeddings=length,
    )
    ours = model_frequencies(model, "cpu")
    plain = rotary_frequencies(d, base)
    assert attention_factor == 1.0
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)
    # Some are kept, some divided by the factor, and some lie between.
    assert ours[0] == plain[0] and ours[-1] == plain[-1] / factor
    assert ((ours < 0.99 * plain) & (ours > 1.01 * plain / factor)).any()
