"""The model against transformers' classes of published architectures, in fp32: the same weights
give the same logits."""

from dataclasses import replace

import pytest
import torch

from megalite.models.batch import Microbatch
from tests import oracle
from tests.layouts import Layout
from tests.test_oracle import llama_from_oracle, llama_model
from tests.tiny import build

LLAMA = oracle.Shape(
    layers=3,
    hidden=48,
    heads=6,
    groups=2,
    head_size=16,  # not hidden / heads
    ffn=80,
    vocab=96,
    seq=64,
    positions=64,
    position_embedding_type="rope",
    rotary_base=500.0,
    normalization="RMSNorm",
    norm_epsilon=1e-6,
    swiglu=True,
    bias=False,
    tied=False,
)
SHAPES = {
    "llama": replace(LLAMA, rope_scaling=oracle.RopeScaling(8.0, 1.0, 4.0, 48)),
    "mistral": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True, tied=True),
    "qwen3": replace(LLAMA, qk_norm=True),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_logits_are_those_of_transformers(kind):
    shape = SHAPES[kind]
    params = oracle.random_parameters(shape, std=0.1, dtype=torch.float32)
    theirs = llama_model(shape, kind)
    missing, unexpected = theirs.load_state_dict(llama_from_oracle(params, shape), strict=False)
    assert missing == (["lm_head.weight"] if shape.tied else []) and not unexpected

    flags = {"precision": "fp32", "make_vocab_size_divisible_by": 1}
    model = build(Layout(kind, shape=shape), **flags).components.model.eval()
    with torch.no_grad():
        for name, parameter in model.parameters_by_name.items():
            parameter.copy_(params[name])
        tokens = torch.randint(
            shape.vocab, (3, shape.seq), generator=torch.Generator().manual_seed(5)
        )
        ours = model(None, Microbatch(tokens)).transpose(0, 1)
        expected = theirs(input_ids=tokens, use_cache=False).logits
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
