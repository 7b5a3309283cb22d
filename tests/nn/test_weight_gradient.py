"""The one seam of weight gradients: deferring the products, and knowing when a gradient is
complete."""

from collections import Counter

import pytest
import torch

from tests.layouts import FULL, GPT2, LLAMA, POST_NORM, SELECTIVE, Layout, as_bert
from tests.tiny import build

CASES = {
    "gpt2": (GPT2, {}),
    "llama": (LLAMA, {}),
    "bert": (as_bert(GPT2, **POST_NORM), {}),
    "full recompute": (GPT2, FULL),
    "selective recompute": (LLAMA, SELECTIVE),
    "positions of documents": (GPT2, {"reset_position_ids": True}),
}


@pytest.fixture(params=CASES)
def tiny(request):
    shape, flags = CASES[request.param]
    return build(Layout(request.param, shape=shape), **flags)


def backward_of(tiny):
    """Forward and backward of the first microbatch."""
    batches, loss_weights = tiny.data.at(0)
    output = tiny.components.model(None, batches[0])
    (output * loss_weights).sum().backward()


def test_every_parameter_is_complete_once_in_a_backward(tiny):
    """Also a tied embedding, which is used twice, and layers that are computed twice. Its gradient
    is final then."""
    gradients = tiny.components.optimizer.gradients
    completed = Counter()
    at_completion = {}

    def complete(parameter):
        completed[parameter.spec.name] += 1
        at_completion[parameter.spec.name] = parameter.main_grad.clone()

    gradients.weight_gradients.on_complete = complete
    gradients.zero()
    backward_of(tiny)
    assert completed == Counter(dict.fromkeys(tiny.components.model.parameters_by_name, 1))
    for name, parameter in tiny.components.model.parameters_by_name.items():
        assert torch.equal(at_completion[name], parameter.main_grad), name


def test_deferred_products_give_the_same_gradients_to_the_bit(tiny):
    """While products are deferred no weight of a linear layer or an embedding gets a gradient or is
    complete."""
    gradients = tiny.components.optimizer.gradients
    gradients.zero()
    backward_of(tiny)
    expected = gradients.flat.clone()

    completed = []
    gradients.weight_gradients.on_complete = lambda p: completed.append(p.spec.name)
    gradients.zero()
    with gradients.weight_gradients.deferring() as products:
        backward_of(tiny)
    names = {weight.spec.name for weight in products}
    assert {"layers.0.mlp.up.weight", "embedding.word_embeddings.weight"} <= names
    assert not names & set(completed)
    assert not any(weight.main_grad.any() for weight in products)

    gradients.weight_gradients.run_deferred(products)
    assert torch.equal(gradients.flat, expected)
    assert sorted(completed) == sorted(tiny.components.model.parameters_by_name)


def test_two_backwards_may_be_deferred_before_their_products_run():
    """As in a zero-bubble schedule, where the products of a microbatch wait for a gap."""
    tiny = build()
    gradients = tiny.components.optimizer.gradients
    gradients.zero()
    for _ in range(2):
        backward_of(tiny)
    expected = gradients.flat.clone()
    gradients.zero()
    kept = []
    for _ in range(2):
        with gradients.weight_gradients.deferring() as products:
            backward_of(tiny)
        kept.append(products)
    for products in kept:
        gradients.weight_gradients.run_deferred(products)
    assert torch.equal(gradients.flat, expected)
