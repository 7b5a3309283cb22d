"""Random streams of a rank, and dropout that draws from them; and the scheme that has none."""

from itertools import combinations

import pytest
import torch

from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import REPLICATED, TENSOR, CounterBasedRng, RngTracker, dropout
from tests.tiny import context_of

LAYOUT = ParallelLayout(tensor=2, pipeline=2, data=2)


def draw(tracker: RngTracker, name: str, count: int = 5) -> list[float]:
    return torch.rand(count, generator=tracker[name]).tolist()


def test_streams_differ_where_values_do_and_agree_where_they_must():
    """Tensor-parallel ranks hold the same residuals (REPLICATED) and different heads (TENSOR);
    other stages and other replicas have other layers and other samples."""
    ranks = range(LAYOUT.world_size)
    drawn = {
        (rank, name): draw(RngTracker.for_rank(7, context_of(LAYOUT, rank)), name)
        for rank in ranks
        for name in (REPLICATED, TENSOR)
    }
    for a, b in combinations(drawn, 2):
        tensor_neighbours = a[0] != b[0] and b[0] in LAYOUT.group_of(a[0], "tensor")
        assert (drawn[a] == drawn[b]) == (tensor_neighbours and a[1] == b[1] == REPLICATED), (a, b)


def test_seeds_follow_the_rule_of_megatron_on_replica_0():
    last = context_of(LAYOUT, LAYOUT.rank_of(pipeline=1, data=0, tensor=1))
    tracker = RngTracker.for_rank(1234, last)
    assert tracker[REPLICATED].initial_seed() == 1234 + 100
    assert tracker[TENSOR].initial_seed() == 1234 + 100 + 2718 + 1


def test_states_are_copies_that_restore_every_stream():
    tracker = RngTracker({"a": 1, "b": 2})
    draw(tracker, "a")
    states = tracker.states()
    expected = [draw(tracker, "a"), draw(tracker, "b")]
    assert [draw(tracker, "a"), draw(tracker, "b")] != expected
    tracker.restore(states)
    assert [draw(tracker, "a"), draw(tracker, "b")] == expected
    other = RngTracker({"a": 8, "b": 9})
    other.restore(states)
    assert [draw(other, "a"), draw(other, "b")] == expected
    with pytest.raises(KeyError, match="b"):
        tracker.restore({"a": states["a"]})


def test_replay_repeats_and_then_goes_on():
    tracker, plain = RngTracker({"a": 1}), RngTracker({"a": 1})
    states = tracker.states()
    first = draw(tracker, "a")
    with tracker.replay(states):
        assert draw(tracker, "a", 3) == first[:3]
    with pytest.raises(ZeroDivisionError), tracker.replay(states):
        draw(tracker, "a")
        raise ZeroDivisionError
    assert [first, draw(tracker, "a")] == [draw(plain, "a"), draw(plain, "a")]


def test_the_counted_scheme_is_a_key_of_the_seed_and_no_state():
    rng = CounterBasedRng.for_seed(1234)
    assert rng.key == (
        3775134237,
        275618109,
    )  # blake2b of b"i4:1234s7:dropout", a part of the format
    assert CounterBasedRng.for_seed(1235).key != rng.key
    assert rng.states() == {}
    rng.restore({"replicated": torch.zeros(5, dtype=torch.uint8)})
    with rng.replay({}):
        assert rng.key == CounterBasedRng.for_seed(1234).key


def test_other_code_that_draws_is_left_alone_and_leaves_us_alone():
    def kept(between) -> list[float]:
        tracker = RngTracker({"a": 1})
        with tracker.replay(tracker.states()):
            dropout(torch.ones(100), 0.5, tracker["a"])
        between()
        return dropout(torch.ones(100), 0.5, tracker["a"]).tolist()

    state = torch.get_rng_state()
    alone = kept(lambda: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert kept(lambda: torch.rand(1000)) == alone


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_scale(p):
    n = 200_000
    x = torch.full((n,), 3.0, dtype=torch.float64, requires_grad=True)
    y = dropout(x, p, torch.Generator().manual_seed(5))
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 3 / (1 - p)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 3)


def test_dropout_in_bf16_is_rounded_once():
    """Were 1 / 0.9 rounded to bf16 first, everything that stays would be 0.16% too small."""
    x = torch.linspace(1, 2, 1000).bfloat16()
    y = dropout(x, 0.1, torch.Generator().manual_seed(5))
    kept = y != 0
    assert torch.equal(y[kept], (x[kept].float() / 0.9).bfloat16())
