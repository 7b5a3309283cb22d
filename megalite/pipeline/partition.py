"""Which layers each pipeline stage holds. Pure, no torch.

A rank may hold several stages. What it has to do is the sum of theirs, so the rank of each stage
takes part in every division.
"""

from collections.abc import Callable, Sequence

from megalite.models.cost import HeadCost, stage_flops
from megalite.nn.config import ModelConfig, RecomputeConfig
from megalite.parallel.config import ParallelConfig
from megalite.pipeline.schedules import Pipeline


def layers_of_stages(
    model: ModelConfig,
    parallel: ParallelConfig,
    pipeline: Pipeline,
    *,
    recompute: RecomputeConfig,
    head: HeadCost,
) -> list[range]:
    """Consecutive layers for each stage, at least one each: as the flags of the split say, by
    default by `balanced`.

    Raises ValueError, which names the flags, when the layers cannot be divided so.
    """
    ranks = pipeline.rank_of_stage
    layers = model.num_layers
    if len(ranks) > layers:
        raise ValueError(
            f"cannot divide {layers} layers into {len(ranks)} stages: each needs at least one"
        )
    first = parallel.decoder_first_pipeline_num_layers
    last = parallel.decoder_last_pipeline_num_layers
    if parallel.pipeline_split is not None:
        counts = by_hand(layers, ranks, parallel.pipeline_split)
    elif first is not None or last is not None:
        counts = with_given_ends(layers, ranks, first, last)
    elif parallel.split_is_given:
        embedding = int(parallel.account_for_embedding_in_pipeline_split)
        loss = int(parallel.account_for_loss_in_pipeline_split)
        counts = even(layers, ranks, embedding, loss)
    else:

        def work(stage: int, layers: int) -> float:
            is_last = stage == len(ranks) - 1
            return stage_flops(model, head, recompute, layers=layers, is_last=is_last)

        counts = balanced(layers, ranks, work)
    found = []
    start = 0
    for count in counts:
        found.append(range(start, start + count))
        start += count
    return found


def balanced(num_layers: int, ranks: Sequence[int], work: Callable[[int, int], float]) -> list[int]:
    """Layers of each stage such that the rank with most work has as little as possible, and so has,
    on each rank, the stage with most work. Of equal divisions, that with more on earlier stages.

    Args:
        num_layers: at least one a stage.
        ranks: the rank of each stage.
        work: of a stage with a number of layers; each layer adds to it.
    """
    counts = [1] * len(ranks)
    of_rank = dict.fromkeys(ranks, 0.0)
    for stage, rank in enumerate(ranks):
        of_rank[rank] += work(stage, 1)

    def after_one_more(stage: int) -> tuple[float, float, int]:
        more = work(stage, counts[stage] + 1)
        return of_rank[ranks[stage]] + more - work(stage, counts[stage]), more, stage

    # Giving each further layer to the rank that then has the least is optimal: no layer is cheaper
    # later.
    for _ in range(num_layers - len(ranks)):
        total, _, stage = min(map(after_one_more, range(len(ranks))))
        counts[stage] += 1
        of_rank[ranks[stage]] = total
    return counts


def by_hand(num_layers: int, ranks: Sequence[int], words: tuple[str, ...]) -> list[int]:
    """The numbers of --pipeline-split, which may be joined by commas."""
    joined = ",".join(words)
    shown = f"--pipeline-split {joined}"
    counts = []
    for word in joined.split(","):
        if not word.strip().isdecimal() or int(word) < 1:
            raise ValueError(f"{shown}: {word!r} is not a whole number from 1 on")
        counts.append(int(word))
    if len(counts) != len(ranks):
        stages = f"{len(ranks)} stages (--pp {max(ranks) + 1})"
        raise ValueError(f"{shown} has {len(counts)} numbers, but there are {stages}")
    if sum(counts) != num_layers:
        raise ValueError(f"{shown} makes {sum(counts)} layers, not --num-layers {num_layers}")
    return counts


def with_given_ends(
    num_layers: int, ranks: Sequence[int], first: int | None, last: int | None
) -> list[int]:
    """Layers of each stage where those of the first or last rank are given, and the others share
    the rest evenly, as with Megatron-LM's flags of these names. Stages of a rank are equal."""
    size = max(ranks) + 1
    given = {}
    shown = []
    if first is not None:
        given[0] = first
        shown.append(f"--decoder-first-pipeline-num-layers {first}")
    if last is not None:
        given[size - 1] = last
        shown.append(f"--decoder-last-pipeline-num-layers {last}")
    flags = " and ".join(shown)
    rest = num_layers - sum(given.values())
    others = size - len(given)
    chunks = len(ranks) // size
    sharing = others * chunks
    if others == 0 and rest:
        raise ValueError(f"{flags} do not make --num-layers {num_layers} with --pp {size}")
    if others and (rest < sharing or rest % sharing):
        raise ValueError(
            f"{flags}: of --num-layers {num_layers}, {rest} are left for {sharing} of the stages "
            f"of --pp {size}, which cannot have equally many, at least one"
        )
    for count in given.values():
        if count % chunks:
            raise ValueError(f"{flags}: {count} cannot be divided among {chunks} stages of a rank")
    each = rest // others if others else 0
    counts = []
    for rank in ranks:
        counts.append(given.get(rank, each) // chunks)
    return counts


def even(num_layers: int, ranks: Sequence[int], embedding: int, loss: int) -> list[int]:
    """Equal shares of the layers, the `embedding` and the `loss`: each 1 where it counts as a layer
    of the first or last stage, else 0, as with Megatron-LM's flags."""
    stages = len(ranks)
    shown = []
    if embedding:
        shown.append("--account-for-embedding-in-pipeline-split")
    if loss:
        shown.append("--account-for-loss-in-pipeline-split")
    flags = " and ".join(shown)
    total = num_layers + embedding + loss
    if total % stages:
        raise ValueError(
            f"{flags} with --num-layers {num_layers} makes {total} to divide, which {stages} "
            f"stages (--pp {max(ranks) + 1}) cannot share evenly"
        )
    counts = [total // stages] * stages
    counts[0] -= embedding
    counts[-1] -= loss
    if min(counts) < 1:
        raise ValueError(
            f"{flags} with --num-layers {num_layers} leaves a stage of {stages} "
            f"(--pp {max(ranks) + 1}) without a layer"
        )
    return counts
