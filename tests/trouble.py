"""pretrain_gpt.py with a model in which one rank gets into trouble: TROUBLE="sleep 1 3" sleeps on rank 1 in step 3.

TROUBLE="die 1 3" srun python tests/trouble.py --mock-data ...
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.cli import parse_and_check
from megalite.parallel.launch import detect


def sleep() -> None:
    while True:
        time.sleep(1)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ArithmeticError("this model is broken")


def slow() -> None:
    time.sleep(4)


def troubled(trouble: str):
    """A `build_model` whose forward gets into the trouble, on the rank and from the step that the text names."""
    from megalite.training.build import build_model

    what, rank, step = trouble.split()

    def build(config, context, rng):
        def hook(*unused):
            if (context.rank, context.activity.step) == (int(rank), int(step)):
                globals()[what]()

        model = build_model(config, context, rng)
        model.register_forward_pre_hook(hook)
        return model

    return build


def main() -> None:
    config = parse_and_check(sys.argv[1:], architecture="gpt")

    from megalite.training.pretrain import explain, pretrain

    launch = detect(os.environ)
    try:
        pretrain(config, launch, troubled(os.environ["TROUBLE"]))
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        sys.exit((explanation and f"pretrain_gpt.py: rank {launch.rank}: {explanation}") or 1)


if __name__ == "__main__":
    main()
