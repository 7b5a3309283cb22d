"""Training by DeepSpeed's ZeRO. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from megalite.fields import Field


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Whether DeepSpeed shards and updates the weights."""

    deepspeed: Annotated[bool, Field(changes_numbers=False)] = False
    """Let DeepSpeed (ZeRO stages 1 to 3, offload) sum gradients and update weights. Needs
    --deepspeed-config and pip install 'megalite[deepspeed]'."""
    deepspeed_config: Annotated[str | None, Field(example="ds.json")] = None
    """DeepSpeed's JSON file. It says how ZeRO works; what flags say, it may leave out or repeat."""
