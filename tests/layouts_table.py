"""Prints the table of docs/layouts.md: every layout with its largest difference from the oracle.

OMP_NUM_THREADS=1 python -m tests.layouts_table
"""

from contextlib import closing

from tests import oracle
from tests.layouts import LAYOUTS
from tests.pool import RankPool
from tests.test_layouts import expected, largest_difference, losses_of, train_on_rank


def main() -> None:
    """Run each layout once, one step, and print a line of Markdown for it."""
    print("| layout | dp | tp | pp | flags | loss | gradients |\n|---|---|---|---|---|---|---|")
    with closing(RankPool(max_ranks=8)) as pool:
        for layout in LAYOUTS:
            params, loss, gradients, _ = expected(layout.shape, layout.packing)
            results = pool.run(train_on_rank, layout.world_size, layout, params, {}, 1)
            difference = abs(losses_of(results, layout)[0] - loss) / loss
            boxes = [box for result in results for box in result[2]]
            worst = largest_difference(boxes, gradients, oracle.parameter_shapes(layout.shape))
            flags = " ".join(f"{name}={value}" for name, value in layout.flags.items())
            sizes = f"{layout.dp} | {layout.tp} | {layout.pp}"
            print(f"| {layout.name} | {sizes} | {flags} | {difference:.0e} | {worst:.0e} |")


if __name__ == "__main__":
    main()
