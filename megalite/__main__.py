"""`python -m megalite PROGRAM ...`; under torchrun: `torchrun --nproc-per-node 8 -m megalite
pretrain-gpt ...`."""

from megalite.programs.start import start

if __name__ == "__main__":
    start()
