"""Initial weights: the same in every box, for ever, and normal."""

from itertools import product

import numpy as np
import pytest
import torch

from megalite.nn.init import initialize, normal
from megalite.nn.parameter import ParameterSpec, make_parameter
from megalite.parallel.boxes import Box, split

NAME = "layers.0.mlp.up.weight"
GOLDEN = [
    0.4805452540288086,
    0.5477232524597453,
    -0.822850921834477,
    -1.106232560403001,
    -2.4649778402122364,
    0.12629059376250143,
    -1.014899644421915,
    0.9166765977587561,
    0.0692303149068604,
]
"""Of seed 1234. A change of these means that no run can be repeated from its configuration any
more."""


def whole(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return normal(seed, name, shape, Box.whole(shape))


def test_the_numbers_never_change():
    np.testing.assert_allclose(whole(1234, NAME, (3, 3)).reshape(-1), GOLDEN, rtol=1e-13)


@pytest.mark.parametrize(
    "shape",
    [(11,), (1,), (7, 5), (5, 16), (3, 7, 5), (2, 9, 4), (3, 4, 5, 6), (1, 3, 1, 7)],
    ids=str,
)
def test_every_box_is_a_slice_of_the_whole(shape):
    everything = Box.whole(shape)
    tensor = whole(3, NAME, shape)
    for axis, parts in product(range(len(shape)), (2, 3)):
        for index in range(parts):
            start, size = split(shape[axis], parts, index)
            offset, extent = [0] * len(shape), list(shape)
            offset[axis], extent[axis] = start, size
            box = Box(tuple(offset), tuple(extent))
            if box.numel:
                np.testing.assert_array_equal(
                    normal(3, NAME, shape, box), tensor[box.slices_in(everything)]
                )
    inner = Box(tuple(n // 3 for n in shape), tuple(-(-n // 2) for n in shape))
    np.testing.assert_array_equal(
        normal(3, NAME, shape, inner), tensor[inner.slices_in(everything)]
    )


def test_large_boxes_are_made_in_pieces_that_fit_together():
    """Runs longer than the internal block, and more runs than fit in one."""
    long, tall = (2, 600_000), (300_000, 3)
    np.testing.assert_array_equal(
        normal(3, NAME, long, Box((1, 5), (1, 599_990))), whole(3, NAME, long)[1:, 5:599_995]
    )
    np.testing.assert_array_equal(
        normal(3, NAME, tall, Box((7, 1), (299_000, 2))), whole(3, NAME, tall)[7:299_007, 1:]
    )


def test_indices_beyond_32_bits():
    """Element 2^40 of a flat tensor and of the same one with rows; not the one that a lost carry
    would give."""
    at, width = 2**40, 2**22
    flat = normal(3, NAME, (2**41,), Box((at + 5,), (10,)))
    row, column = divmod(at + 5, width)
    np.testing.assert_array_equal(
        normal(3, NAME, (2**19, width), Box((row, column), (1, 10)))[0], flat
    )
    for wrapped in (at % 2**32, at % 2**34):
        assert not np.isin(flat, normal(3, NAME, (2**41,), Box((wrapped,), (20,)))).any()


def test_the_numbers_are_standard_normal():
    values = whole(1, "a", (400_000,))
    n = values.size
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((values**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / n) ** 0.5
    within = [(np.abs(values) < x).mean() for x in (0.1, 1, 2, 3)]
    np.testing.assert_allclose(
        within, [0.0796557, 0.6826895, 0.9544997, 0.9973002], atol=5 * 0.5 / n**0.5
    )
    for lag in (1, 2, 3, 4, 8):
        assert abs((values[lag:] * values[:-lag]).mean()) < 5 / n**0.5


def test_names_and_seeds_matter():
    base = whole(1, "layers.1.mlp.up.weight", (1000,))
    for seed, name in (
        (2, "layers.1.mlp.up.weight"),
        (1, "layers.11.mlp.up.weight"),
        (1, "layers.1.mlp.up.weigh"),
    ):
        other = whole(seed, name, (1000,))
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / 1000**0.5
        assert not np.isin(other, base).any()


def parameter(local, shape, box, init, std=0.0, dtype=torch.float32):
    return make_parameter(
        local,
        ParameterSpec(global_shape=shape, box=box, init=init, std=std),
        dtype,
        torch.device("cpu"),
    )


def test_initialize_follows_the_specs_and_leaves_padding_zero():
    shape = (5, 3)
    parameters = {
        "embedding": parameter(
            (4, 3), shape, Box((4, 0), (1, 3)), "normal", 0.5
        ),  # three rows of padding
        "empty": parameter((4, 3), shape, Box((5, 0), (0, 3)), "normal", 0.5),
        "ones": parameter((5,), (5,), Box.whole((5,)), "ones"),
        "zeros": parameter((5,), (5,), Box.whole((5,)), "zeros"),
        "half": parameter(shape, shape, Box.whole(shape), "normal", 0.5, torch.bfloat16),
    }
    parameters["zeros"].data.fill_(7)
    initialize(parameters, seed=9)
    expected = torch.from_numpy(0.5 * whole(9, "embedding", shape))
    assert torch.equal(parameters["embedding"][:1], expected[4:].float())
    assert not parameters["embedding"][1:].any() and not parameters["empty"].any()
    assert parameters["ones"].tolist() == [1.0] * 5 and parameters["zeros"].tolist() == [0.0] * 5
    assert torch.equal(
        parameters["half"], torch.from_numpy(0.5 * whole(9, "half", shape)).bfloat16()
    )


def test_the_primary_owner_is_the_first_of_all_that_hold_the_same_values():
    """Over every rank of a layout, with an axis that the specification has never heard of."""
    box = Box.whole((2,))
    axes = ("tensor", "context", "data", "pipeline")
    positions = [dict(zip(axes, at)) for at in product(range(2), range(3), range(2), range(2))]
    for sharded, owners in (
        (("pipeline",), 2),  # a norm: once a stage
        (("tensor", "pipeline"), 4),  # a linear layer
        (("tensor",), 2),  # a tied embedding: on the first stage
        (("tensor", "context", "pipeline"), 12),
    ):
        spec = ParameterSpec(global_shape=(2,), box=box, init="zeros", sharded=sharded)
        primary = [position for position in positions if spec.is_primary(position)]
        assert len(primary) == owners
        assert all(position["data"] == 0 for position in primary)
        held = {tuple(position[axis] for axis in sharded) for position in positions}
        assert {tuple(position[axis] for axis in sharded) for position in primary} == held
