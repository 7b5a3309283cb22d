"""Layers into stages, against every possible division."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from megalite.config.estimate import work_of_ranks
from megalite.config.run import RunConfig, from_flat
from megalite.pipeline.partition import balanced, even, with_given_ends

LOADS = ((0, 0), (0, 0.4), (0.3, 2.6), (4, 1), (0, 20))
"""Work of the first and the last stage beside their layers, in units of a layer."""


def sizes(num_layers: int, ranks: Sequence[int], first: float = 0, last: float = 0) -> list[int]:
    """The balanced division where the ends have work beside their layers."""
    ends = [0.0] * len(ranks)
    ends[0] += first
    ends[-1] += last
    return balanced(num_layers, ranks, lambda stage, layers: layers + ends[stage])


def divisions(num_layers: int, stages: int):
    """All divisions into consecutive, non-empty parts."""
    for cuts in combinations(range(1, num_layers), stages - 1):
        yield [after - before for before, after in pairwise([0, *cuts, num_layers])]


def loads(counts, ranks, first: float, last: float) -> list[float]:
    """The work of each rank."""
    of_rank = [0.0] * (max(ranks) + 1)
    of_rank[ranks[0]] += first
    of_rank[ranks[-1]] += last
    for rank, count in zip(ranks, counts, strict=True):
        of_rank[rank] += count
    return of_rank


@pytest.mark.parametrize(
    ("num_layers", "stages", "first", "last", "counts"),
    [
        (12, 4, 0, 0, [3, 3, 3, 3]),
        (4, 3, 0, 0, [2, 1, 1]),
        (11, 4, 0, 0, [3, 3, 3, 2]),
        (5, 2, 0, 0.5, [3, 2]),
        (5, 2, 2, 0, [2, 3]),
        (8, 2, 0, 1.33, [5, 3]),
        (12, 4, 0, 1, [4, 3, 3, 2]),
        (12, 4, 0, 0.1, [3, 3, 3, 3]),
        (11, 4, 0, 2.5, [4, 3, 3, 1]),
        (10, 4, 1, 1, [2, 3, 3, 2]),
        (7, 3, 0, 100, [3, 3, 1]),
        (4, 4, 0, 9, [1, 1, 1, 1]),
        (7, 1, 0, 9, [7]),
    ],
)
def test_balanced_stages(num_layers, stages, first, last, counts):
    assert sizes(num_layers, range(stages), first, last) == counts


def test_no_division_has_a_smaller_largest_load():
    for num_layers in range(1, 11):
        for stages in range(1, num_layers + 1):
            for first, last in LOADS:
                ranks = range(stages)
                counts = sizes(num_layers, ranks, first, last)
                assert sum(counts) == num_layers and min(counts) >= 1
                best = min(
                    max(loads(other, ranks, first, last)) for other in divisions(num_layers, stages)
                )
                assert max(loads(counts, ranks, first, last)) == pytest.approx(best, rel=1e-12)
                if first == 0:
                    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("ranks", [(0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 2, 0, 1, 2)])
def test_ranks_of_several_stages_are_balanced(ranks):
    """First the ranks; then, on each, its stages."""
    for num_layers in range(len(ranks), 11):
        for first, last in LOADS:
            counts = sizes(num_layers, ranks, first, last)
            assert sum(counts) == num_layers and min(counts) >= 1
            every = list(divisions(num_layers, len(ranks)))
            best = min(max(loads(other, ranks, first, last)) for other in every)
            assert max(loads(counts, ranks, first, last)) == pytest.approx(best, rel=1e-12)
    assert sizes(8, (0, 1, 0, 1)) == [2, 2, 2, 2]
    assert sizes(8, (0, 1, 0, 1), last=6) == [3, 1, 3, 1]
    assert sizes(8, (0, 1, 1, 0), last=6) == [1, 3, 3, 1]


# The flags
# ----------------------------------------------------------------------------------------


def config_of(num_layers: int, stages: int, **flags) -> RunConfig:
    shape = dict(num_layers=num_layers, hidden_size=512, num_attention_heads=8, seq_length=256)
    shape["vocab_size"] = 8192
    return from_flat(shape | {"pipeline_model_parallel_size": stages} | flags)


def split(num_layers: int, stages: int, **flags) -> list[int]:
    return [len(layers) for layers in config_of(num_layers, stages, **flags).layers_of_stages]


def test_layers_are_consecutive_and_all_there():
    assert config_of(8, 2).layers_of_stages == [range(0, 5), range(5, 8)]
    parts = config_of(10, 3, pipeline_split="2,5,3").layers_of_stages
    assert parts == [range(0, 2), range(2, 7), range(7, 10)]


def test_the_output_layer_counts():
    """It weighs 16 / 13 of a layer. In a BERT 15% of that, with a dense layer."""
    assert split(8, 2) == [5, 3]
    assert split(8, 2, vocab_size=4096) == [4, 4]
    assert split(8, 2, architecture="bert") == [4, 4]
    assert split(8, 2, architecture="bert", mask_prob=0.9) == [5, 3]


def test_what_is_recomputed_counts():
    """An output layer of 2.2 layers. Where the layers' forward runs twice, of 1.6."""
    assert split(7, 2, vocab_size=14500) == [5, 2]
    assert split(7, 2, vocab_size=14500, recompute_granularity="full") == [4, 3]


def test_by_hand():
    for words in (("5,7,7,5",), ("5", "7", "7", "5"), ("5,7", "7,5")):
        assert split(24, 4, pipeline_split=words) == [5, 7, 7, 5]


@pytest.mark.parametrize(
    ("num_layers", "stages", "first", "last", "counts"),
    [
        (24, 4, 3, None, [3, 7, 7, 7]),
        (24, 4, None, 6, [6, 6, 6, 6]),
        (61, 16, 3, 2, [3, *[4] * 14, 2]),
        (27, 2, 13, 14, [13, 14]),
        (27, 2, 13, None, [13, 14]),
    ],
)
def test_first_and_last_rank_are_given(num_layers, stages, first, last, counts):
    """Examples of Megatron-LM's users: those of DeepSeek-V3 and Moonlight are among them."""
    flags = {"decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last}
    assert split(num_layers, stages, **flags) == counts


@pytest.mark.parametrize(
    ("num_layers", "embedding", "loss", "counts"),
    [
        (22, True, True, [5, 6, 6, 5]),
        (23, True, False, [5, 6, 6, 6]),
        (23, False, True, [6, 6, 6, 5]),
    ],
)
def test_an_even_split_counts_embedding_and_loss(num_layers, embedding, loss, counts):
    flags = {
        "account_for_embedding_in_pipeline_split": embedding,
        "account_for_loss_in_pipeline_split": loss,
    }
    assert split(num_layers, 4, **flags) == counts


def test_the_given_layers_of_a_rank_are_shared_by_its_stages():
    """As Megatron-LM does with --num-virtual-stages-per-pipeline-rank 2."""
    interleaved = (0, 1, 2, 0, 1, 2)
    assert with_given_ends(16, interleaved, 4, 2) == [2, 5, 1, 2, 5, 1]
    assert with_given_ends(12, (0, 1, 1, 0), 4, None) == [2, 4, 4, 2]
    assert even(10, interleaved, 1, 1) == [1, 2, 2, 2, 2, 1]


# (layers, stages, flags, words of the error)
IMPOSSIBLE = [
    (4, 5, {}, "4 layers 5 stages"),
    (12, 2, {"pipeline_split": "5,x"}, "--pipeline-split 5,x: 'x'"),
    (12, 2, {"pipeline_split": "12,0"}, "--pipeline-split 12,0: '0'"),
    (12, 2, {"pipeline_split": "12,"}, "--pipeline-split 12,: ''"),
    (12, 2, {"pipeline_split": "4,4,4"}, "3 numbers 2 stages --pp 2"),
    (12, 2, {"pipeline_split": "6,7"}, "13 layers --num-layers 12"),
    (12, 3, {"decoder_first_pipeline_num_layers": 3}, "9 2 stages --pp 3"),
    (12, 3, {"decoder_last_pipeline_num_layers": 12}, "last-pipeline-num-layers 12 0 are 2"),
    (
        12,
        2,
        {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 3},
        "first 3 last --num-layers 12 --pp 2",
    ),
    (12, 3, {"account_for_loss_in_pipeline_split": True}, "loss 13 3 stages --pp 3"),
]


@pytest.mark.parametrize(("num_layers", "stages", "flags", "words"), IMPOSSIBLE)
def test_impossible_divisions(num_layers, stages, flags, words):
    config = config_of(num_layers, stages, **flags)
    with pytest.raises(ValueError) as caught:
        config.layers_of_stages  # noqa: B018 - raises
    for word in words.split():
        assert word in str(caught.value)


def test_several_stages_of_a_rank_that_cannot_be_equal():
    with pytest.raises(ValueError, match="3 cannot be divided among 2 stages"):
        with_given_ends(11, (0, 1, 2, 0, 1, 2), 3, 4)
    with pytest.raises(ValueError, match="leaves a stage of 4 .--pp 2. without a layer"):
        even(2, (0, 1, 0, 1), 1, 1)


def test_work_of_ranks_says_how_balanced_a_split_is():
    """8 layers with an output layer that weighs 16 / 13 of one."""
    config = config_of(8, 2)

    def relative(**flags) -> float:
        work = work_of_ranks(replace(config, parallel=replace(config.parallel, **flags)))
        return max(work) * len(work) / sum(work)

    output = 8192 * 512 / (12 * 512**2 + 2 * 256 * 512)
    assert relative() == pytest.approx(5 * 2 / (8 + output))
    assert relative(pipeline_split=("4,4",)) == pytest.approx((4 + output) * 2 / (8 + output))
