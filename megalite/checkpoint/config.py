"""Where checkpoints go and come from. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go and where they come from."""

    save: str | None = None
    """Folder to write checkpoints to (iter_0000100/, latest_checkpointed_iteration.txt). Unset: none are written."""
    save_interval: int | None = None
    """Iterations between checkpoints. Unset: one at the end of the run (and at a signal or an exit flag)."""
    keep_last: int | None = None
    """Keep only this many newest checkpoints in --save. Unset: all."""
    load: str | None = None
    """Folder to resume from. An empty or absent folder that is also --save starts from scratch."""
    ckpt_step: int | None = None
    """Iteration to load. Unset: the latest."""
    finetune: bool = False
    """Load only the weights: iteration, optimizer, random state and data position start anew."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    no_load_rng: bool = False
    """With --rng-scheme megatron, do not load the random state: dropout's streams start from the seed."""
    allow_data_change: bool = False
    """Go on with other training data, weights or order than the checkpoint's run had; known sources go on where they
    were."""
