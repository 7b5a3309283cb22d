"""Activation checkpointing: the same gradients to the bit, dropout included, for less memory and
more work."""

from dataclasses import replace

import pytest
import torch

from megalite.nn.block import Block
from tests.layouts import GPT2, LLAMA, PACKED, Layout, sp
from tests.tiny import build

DROPOUT = {
    "precision": "fp32",
    "hidden_dropout": 0.3,
    "attention_dropout": 0.3,
    "micro_batch_size": 2,
}
FULL = {"recompute_granularity": "full"}
MODES = {
    "selective": {"recompute_granularity": "selective"},
    "full": FULL,
    "full by 2": {**FULL, "recompute_num_layers": 2},
    "full by 3, which do not divide": {**FULL, "recompute_num_layers": 3},
    "full block of 1": {**FULL, "recompute_method": "block"},
    "full block of 3": {**FULL, "recompute_method": "block", "recompute_num_layers": 3},
}
LAYERS = 4


SCHEMES = pytest.mark.parametrize("scheme", ["global", "megatron"])


def gradients(launch, layout: Layout, flags: dict):
    """Two steps' gradients; then their losses, and the states of the random streams after each, if
    there are any."""
    tiny = build(layout, launch, **{**DROPOUT, **flags})
    gradients, others = [], []
    for consumed in (0, 8):
        others.append(tiny.gradient(consumed))
        others += tiny.components.rng.states().values()
        gradients.append(tiny.components.optimizer.gradients.flat.clone())
    return gradients + others


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@SCHEMES
@pytest.mark.parametrize(
    "layout",
    [
        Layout("gpt"),
        Layout("llama tp2", tp=2, shape=LLAMA),
        Layout("tp2+sp x pp2", tp=2, pp=2, flags=sp()),
        Layout(
            "packed llama tp2", tp=2, shape=replace(LLAMA, vocab=7), flags=PACKED
        ),  # one token in 7 ends a document
    ],
    ids=lambda layout: layout.name,
)
def test_gradients_are_the_same_to_the_bit(pool, layout, scheme):
    plain = pool.run(gradients, layout.world_size, layout, {"rng_scheme": scheme})
    assert not torch.equal(plain[0][0], plain[0][1]), (
        "two steps that drop the same and read the same prove little"
    )
    for name, flags in MODES.items():
        results = pool.run(gradients, layout.world_size, layout, {"rng_scheme": scheme, **flags})
        for rank, (got, expected) in enumerate(zip(results, plain)):
            assert equal(got, expected), f"{name}, rank {rank}"


@SCHEMES
@pytest.mark.parametrize("site", ["hidden_dropout", "attention_dropout"])
def test_dropout_takes_part_in_it(pool, scheme, site):
    """So that equality above means something: without one kind of dropout there are other
    gradients."""
    with_dropout, without = (
        pool.run(gradients, 1, Layout("gpt"), {"rng_scheme": scheme, site: p})[0][0]
        for p in (0.3, 0.0)
    )
    assert (with_dropout - without).norm() > 0.1 * without.norm()


def work_and_memory(flags: dict) -> tuple[int, int]:
    """(times that a layer runs, bytes that autograd saves) in the forward and backward of one
    microbatch."""
    tiny = build(Layout("wide", shape=replace(GPT2, seq=64, positions=64)), **DROPOUT, **flags)
    model, runs, saved = tiny.components.model, [], {}
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda module, inputs: runs.append(module))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batches, weights = tiny.data.at(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = model(None, batches[0])
    (sums * weights).sum().backward()
    return len(runs), sum(saved.values())


def test_less_is_kept_and_more_is_computed():
    cost = {name: work_and_memory(flags) for name, flags in ({"none": {}} | MODES).items()}
    runs = {name: count for name, (count, _) in cost.items()}
    assert runs == {
        "none": LAYERS,
        "selective": LAYERS,
        "full": 2 * LAYERS,
        "full by 2": 2 * LAYERS,
        "full by 3, which do not divide": 2 * LAYERS,
        "full block of 1": LAYERS + 1,
        "full block of 3": LAYERS + 3,
    }
    kept = {name: size for name, (_, size) in cost.items()}
    assert kept["full"] < kept["full block of 3"] < kept["full block of 1"] < kept["none"]
    # Of the core's [b, n, s, s] tensors in each layer, at least the softmax and dropout's mask.
    scores = 2 * 8 * 64 * 64 * 4
    assert kept["none"] - kept["selective"] >= 2 * LAYERS * scores
