"""Activation checkpointing: the same gradients to the bit, dropout included, for less memory and more work."""

from dataclasses import replace

import pytest
import torch

from megalite.nn.block import Block
from tests.layouts import GPT2, LLAMA, Layout, sp
from tests.tiny import build

DROPOUT = {"precision": "fp32", "hidden_dropout": 0.3, "attention_dropout": 0.3, "micro_batch_size": 2}
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


def gradients(launch, layout: Layout, flags: dict):
    """Two steps' loss, gradients, and state of the random streams after them."""
    tiny = build(layout, launch, **{**DROPOUT, **flags})
    results = []
    for consumed in (0, 8):
        results.append(tiny.gradient(consumed))
        results.append(tiny.parts.optimizer.gradients.flat.clone())
        results += tiny.parts.rng.states().values()
    return results


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    "layout",
    [Layout("gpt"), Layout("llama tp2", tp=2, shape=LLAMA), Layout("tp2+sp x pp2", tp=2, pp=2, flags=sp())],
    ids=lambda layout: layout.name,
)
def test_gradients_are_the_same_to_the_bit(pool, layout):
    plain = pool.run(gradients, layout.world_size, layout, {})
    assert not torch.equal(plain[0][1], plain[0][5]), "two steps that drop the same and read the same prove little"
    for name, flags in MODES.items():
        results = pool.run(gradients, layout.world_size, layout, flags)
        for rank, (got, expected) in enumerate(zip(results, plain)):
            assert equal(got, expected), f"{name}, rank {rank}"


def test_dropout_takes_part_in_it(pool):
    """So that equality above means something: other streams give other gradients."""
    with_dropout, without = (
        pool.run(gradients, 1, Layout("gpt"), {"hidden_dropout": p, "attention_dropout": p})[0][1] for p in (0.3, 0.0)
    )
    assert (with_dropout - without).norm() > 0.1 * without.norm()


def work_and_memory(flags: dict) -> tuple[int, int]:
    """(times that a layer runs, bytes that autograd saves) in the forward and backward of one microbatch."""
    tiny = build(Layout("wide", shape=replace(GPT2, seq=64, positions=64)), **DROPOUT, **flags)
    model, runs, saved = tiny.parts.model, [], {}
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda module, inputs: runs.append(module))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batches, weight = tiny.data.at(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batches[0].tokens, batches[0].labels, batches[0].loss_mask, batches[0].samples)
    (loss * weight).backward()
    return len(runs), sum(saved.values())


def test_less_is_kept_and_more_is_computed():
    cost = {name: work_and_memory(flags) for name, flags in ({"none": {}} | MODES).items()}
    runs = {name: count for name, (count, _) in cost.items()}
    assert runs == {
        "none": LAYERS, "selective": LAYERS, "full": 2 * LAYERS, "full by 2": 2 * LAYERS,
        "full by 3, which do not divide": 2 * LAYERS, "full block of 1": LAYERS + 1, "full block of 3": LAYERS + 3,
    }  # fmt: skip
    kept = {name: size for name, (_, size) in cost.items()}
    assert kept["full"] < kept["full block of 3"] < kept["full block of 1"] < kept["none"]
    # Of the core's [b, n, s, s] tensors in each layer, at least the softmax and dropout's mask.
    scores = 2 * 8 * 64 * 64 * 4
    assert kept["none"] - kept["selective"] >= 2 * LAYERS * scores
