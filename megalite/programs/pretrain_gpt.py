"""Pretrain a GPT with data x tensor x pipeline parallelism.

One process:      python pretrain_gpt.py --mock-data --vocab-size 512 --num-layers 4 --train-iters 9
Eight ranks:      torchrun --nproc-per-node 8 pretrain_gpt.py --tp 2 --pp 2 ...
A SLURM job:      srun python pretrain_gpt.py --tp 2 --pp 2 ...
Check a layout:   python pretrain_gpt.py --world-size 64 --tp 8 --pp 4 ...

Every flag can stand in a YAML file instead (--config FILE).
All problems of a configuration are reported before anything starts.
"""

import sys

from megalite.config.cli import detect_launch_or_exit, parse_with_given


def main() -> None:
    """Read and check the configuration, and only then load torch and train."""
    pretrain_program(__doc__, "gpt")


def pretrain_program(description: str, architecture: str) -> None:
    """The program that pretrains one architecture. description: what --help prints first."""
    launch = detect_launch_or_exit()
    given, config = parse_with_given(sys.argv[1:], description, launch, architecture)

    from megalite.training.pretrain import pretrain_or_exit

    pretrain_or_exit(config, launch, given=given)
