"""Which way attention is computed and why, and that a whole block compiles with each."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite.kernels import native
from megalite.nn.attention import torch_kernel
from megalite.nn.block import Block
from megalite.nn.rope import rotary_frequencies, rotary_table
from tests.layouts import GPT2, LLAMA, Layout
from tests.tiny import SINGLE, build

FP32 = {"precision": "fp32"}
DROPPED = {**FP32, "attention_dropout": 0.3, "hidden_dropout": 0.3}


def block_of(layout: Layout = SINGLE, **flags) -> Block:
    return next(
        m for m in build(layout, **flags).components.model.modules() if isinstance(m, Block)
    )


def choice(masked: bool = False, **flags) -> tuple[str, str]:
    attention = block_of(**flags).attention
    return attention.backend(attention.qkv.weight, masked)


@pytest.fixture
def no_fused_attention():
    """torch has none, as for some tensors on some GPUs."""
    torch_kernel.cache_clear()
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch_kernel.cache_clear()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_auto_takes_the_fused_attention_that_torch_has(precision, masked):
    assert choice(masked, precision=precision) == (
        "sdpa",
        "nothing is dropped; torch's flash attention",
    )


def test_auto_forms_scores_for_the_fused_softmax_where_torch_has_none(no_fused_attention):
    backend, why = choice(**FP32)
    assert (
        backend == ("sdpa" if native.MISSING else "fused-softmax") and "no fused attention" in why
    )
    backend, why = choice(precision="fp64")
    assert backend == "sdpa" and why.endswith(
        "torch's operations: it has no fused attention for this"
    )


def test_auto_with_dropout_and_what_is_asked_for():
    assert choice(**DROPPED)[0] == "fused-softmax"
    assert choice(**DROPPED, rng_scheme="megatron")[0] == "eager"
    assert choice(**FP32, attention_backend="eager") == ("eager", "--attention-backend eager")
    block = block_of(**DROPPED).eval()
    assert block.attention.backend(block.attention.qkv.weight, False)[0] == "sdpa"


@pytest.mark.parametrize("flags", [FP32, DROPPED], ids=["", "dropout"])
@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "fused-softmax", "eager"])
def test_a_block_compiles_whole_with_each_backend(backend, shape, flags):
    if backend == "sdpa" and flags is DROPPED:
        pytest.skip("it cannot drop")
    torch._dynamo.reset()
    block = block_of(Layout("single", shape=shape), **flags, attention_backend=backend)
    x, samples = torch.randn(shape.seq, 3, shape.hidden), torch.arange(3)
    rotary = (
        rotary_table(shape.seq, rotary_frequencies(shape.head_size, 1e4), torch.float32)
        if shape is LLAMA
        else None
    )

    def step(x):
        return block(x, rotary, None, samples).square().mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = [
        torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0]
        for f in (step, compiled)
    ]
    torch.testing.assert_close(*results)
