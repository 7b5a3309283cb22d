"""pretrain_gpt.py with a model that fails as TROUBLE says: "sleep 1 3" sleeps on rank 1 in step 3,
"slow 1 3-5, slow_disk 0 4" is slow on rank 1 in three steps and slows rank 0's disk in step 4.

TROUBLE="die 1 3" srun python tests/trouble.py --mock-data ...
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.config.cli import parse_and_check
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
    time.sleep(1.5)


def busy() -> None:
    """Two seconds of CPU time, so that a suspension does not shorten it."""
    end = time.process_time() + 2
    while time.process_time() < end:
        pass


def slow_disk() -> None:
    """The next file takes 6 seconds until it is on the disk."""
    real = os.fsync

    def fsync(file) -> None:
        os.fsync = real
        time.sleep(6)
        real(file)

    os.fsync = fsync


def stop_at_the_next_barrier() -> None:
    import torch.distributed as dist

    dist.barrier = lambda *_, **__: stop()


def sleep_when_leaving() -> None:
    import torch.distributed as dist

    dist.destroy_process_group = sleep


def troubled(trouble: str):
    """A `build_model` whose last stage fails as `trouble` says, on its rank and in its steps."""
    from megalite.training.build import build_model

    troubles = []
    for part in trouble.split(","):
        what, rank, steps = part.split()
        first, _, last = steps.partition("-")
        troubles.append((globals()[what], int(rank), range(int(first), int(last or first) + 1)))

    def build(config, context, rng):
        def hook(*unused):
            for begin, rank, steps in troubles:
                if context.rank == rank and context.activity.step in steps:
                    begin()

        model = build_model(config, context, rng)
        model.stages[-1].register_forward_pre_hook(hook)
        return model

    return build


def full_disk() -> None:
    """Not above: docs/troubleshooting.md shows the line numbers of what stands there."""
    real = os.fsync

    def fsync(file) -> None:
        os.fsync = real
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fsync


def pause() -> None:
    """Stop for three seconds, as on an overloaded node."""
    os.system(f"(sleep 3; kill -CONT {os.getpid()}) &")
    stop()


def killed_when_leaving() -> None:
    """By a launcher, since another rank has ended."""
    import torch.distributed as dist

    real = dist.destroy_process_group
    dist.destroy_process_group = lambda: (os.kill(os.getpid(), signal.SIGTERM), real())


def stop_at_the_next_file() -> None:
    os.fsync = lambda file: stop()


def main() -> None:
    config = parse_and_check(sys.argv[1:], architecture="gpt")

    from megalite.training.pretrain import pretrain_or_exit

    pretrain_or_exit(config, detect(os.environ), troubled(os.environ["TROUBLE"]))


if __name__ == "__main__":
    main()
