"""Pretrain a BERT with data x tensor x pipeline parallelism.

One process:     python pretrain_bert.py --mock-data --vocab-size 512 --num-layers 4 --train-iters 9
Eight ranks:     torchrun --nproc-per-node 8 pretrain_bert.py --tp 2 --pp 2 ...
A SLURM job:     srun python pretrain_bert.py --tp 2 --pp 2 ...
Check a layout:  python pretrain_bert.py --world-size 64 --tp 8 --pp 4 ...

Every flag can stand in a YAML file instead (--config FILE).
All problems of a configuration are reported before anything starts.
"""

from megalite.programs.pretrain_gpt import pretrain_program


def main() -> None:
    """Read and check the configuration, and only then load torch and train."""
    pretrain_program(__doc__, "bert")
