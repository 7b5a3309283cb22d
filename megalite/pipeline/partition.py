"""Which layers each pipeline stage holds. Pure, no torch."""

from megalite.models.cost import output_cost
from megalite.nn.config import ModelConfig


def partition(
    num_layers: int, stages: int, first_cost: float = 0.0, last_cost: float = 0.0
) -> list[range]:
    """Consecutive layers for each stage, at least one each.

    Equal shares when they divide evenly, as users of pipelines expect. Otherwise the largest load
    is made as small as it can be, counting `first_cost` layers' worth of work for the embedding on
    the first stage and `last_cost` for the output layer and loss on the last. Raises ValueError
    with more stages than layers.
    """
    if not 1 <= stages <= num_layers:
        raise ValueError(
            f"cannot divide {num_layers} layers into {stages} stages: each needs at least one"
        )
    counts = [num_layers // stages] * stages
    if num_layers % stages:
        load = [1.0] * stages
        load[0] += first_cost
        load[-1] += last_cost
        counts = [1] * stages
        # Giving each further layer to the least loaded stage is optimal: layers all cost the same.
        for _ in range(num_layers - stages):
            lightest = min(range(stages), key=lambda stage: (load[stage], stage))
            counts[lightest] += 1
            load[lightest] += 1
    layers = []
    start = 0
    for count in counts:
        layers.append(range(start, start + count))
        start += count
    return layers


def layers_of_stages(model: ModelConfig, stages: int, predicted: float) -> list[range]:
    """The layers of each stage of a model whose output layer is computed for this share of the
    tokens.

    The embedding is a look-up and weighs nothing beside a layer. Raises ValueError with more stages
    than layers.
    """
    return partition(model.num_layers, stages, last_cost=output_cost(model, predicted))
