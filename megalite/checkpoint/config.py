"""Where checkpoints are written and loaded. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalite.fields import Field


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints are written to and loaded from."""

    save: Annotated[str | None, Field(changes_numbers=False)] = None
    """Folder to write checkpoints to (iter_0000100/, latest_checkpointed_iteration.txt).
    Unset: none are written."""
    save_interval: Annotated[int | None, Field(minimum=1, changes_numbers=False)] = None
    """Iterations between checkpoints. Unset: one at the end of the run (and at a signal or an exit
    flag)."""
    async_save: Annotated[bool, Field(changes_numbers=False)] = False
    """Write checkpoints while training goes on: it stops only for a copy of each rank's shards to
    host memory, which must have room for them. Another save, and the end of the run, wait until the
    last one is written."""
    keep_last: Annotated[int | None, Field(minimum=1, changes_numbers=False)] = None
    """Keep only this many newest checkpoints in --save. Unset: all, or with --keep-every one."""
    keep_every: Annotated[
        int | None, Field(minimum=1, changes_numbers=False, aliases=("--save-retain-interval",))
    ] = None
    """Keep the checkpoints whose iteration is a multiple of this, beside those of --keep-last."""
    no_save_optim: Annotated[bool, Field(changes_numbers=False)] = False
    """Do not save the optimizer's state. Only --no-load-optim resumes from such a checkpoint."""
    no_save_rng: Annotated[bool, Field(changes_numbers=False)] = False
    """With --rng-scheme megatron, do not save the random state. Only --no-load-rng resumes from
    such a checkpoint in the same layout."""
    load: Annotated[str | None, Field(changes_numbers=False)] = None
    """Folder to resume from. An empty or absent folder that is also --save starts from scratch."""
    load_hf: Annotated[str | None, Field(changes_numbers=False)] = None
    """Folder of a Hugging Face model (config.json, safetensors files) to start from: its shape, its
    weights, and its tokenizer unless one is given. A run that finds a checkpoint in --load resumes
    that one."""
    ckpt_step: Annotated[int | None, Field(minimum=0, changes_numbers=False)] = None
    """Iteration to load. Unset: the latest."""
    load_fallback: Annotated[bool, Field(changes_numbers=False)] = False
    """When the latest checkpoint in --load is damaged, resume from the last one before it that is
    whole. Also where weights are read from --pretrained-checkpoint."""
    verify_checkpoint: Annotated[Literal["on", "off"], Field(changes_numbers=False)] = "on"
    """Whether to compare what is read from --load or --pretrained-checkpoint with its
    checksums."""
    exit_on_missing_checkpoint: Annotated[bool, Field(changes_numbers=False)] = False
    """Refuse to start from scratch where --load, which is also --save, holds no checkpoint yet."""
    pretrained_checkpoint: Annotated[str | None, Field(changes_numbers=False)] = None
    """Folder with a checkpoint whose weights, and nothing else, start a run that finds none in
    --load. A run that finds one, and resumes, takes no notice of it."""
    use_checkpoint_args: Annotated[bool, Field(changes_numbers=False)] = False
    """Take the flags of the model and the tokenizer that are not given from the checkpoint."""
    finetune: bool = False
    """Load only the weights: iteration, optimizer, random state and data position start from
    scratch."""
    no_load_optim: Annotated[bool, Field(changes_numbers=False)] = False
    """Do not load the optimizer's state."""
    no_load_rng: Annotated[bool, Field(changes_numbers=False)] = False
    """With --rng-scheme megatron, do not load the random state: dropout's streams start from the
    seed."""
    allow_model_change: Annotated[bool, Field(changes_numbers=False)] = False
    """Take the weights of a model with another RoPE (base, scaling), norm epsilon or form of GELU.
    The shapes of the weights do not show such a difference."""
    allow_data_change: Annotated[bool, Field(changes_numbers=False)] = False
    """Resume with other training data, weights or order than the checkpoint's run had. Sources that
    the checkpoint knows continue where they were."""
