"""How a run is spread over processes. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalite.fields import Field

OF_DATA_RANKS = (
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "ddp_bucket_size",
)
"""Fields of what the optimizer divides over the data-parallel ranks and sends between them."""
OF_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
OF_EVEN_SPLIT = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
OF_SPLIT = ("pipeline_split", *OF_ENDS, *OF_EVEN_SPLIT)
"""Fields that say how layers are divided into stages."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over ranks. Data-parallel size = world size / (tp * pp)."""

    tensor_model_parallel_size: Annotated[int, Field(minimum=1, aliases=("--tp",))] = 1
    """Ranks that share each layer's weights, t."""
    pipeline_model_parallel_size: Annotated[int, Field(minimum=1, aliases=("--pp",))] = 1
    """Stages the layers are divided into, p."""
    pipeline_split: Annotated[tuple[str, ...] | None, Field(metavar="N,N,...")] = None
    """Layers of each stage, as 5,7,7,5. Unset: the stages get about equal work, by an estimate that
    counts the output layer."""
    decoder_first_pipeline_num_layers: Annotated[int | None, Field(minimum=1)] = None
    """Layers of the first pipeline rank; the others share the rest evenly."""
    decoder_last_pipeline_num_layers: Annotated[int | None, Field(minimum=1)] = None
    """Layers of the last pipeline rank; the others share the rest evenly."""
    account_for_embedding_in_pipeline_split: bool = False
    """Divide the layers evenly, counting the embedding as one layer of the first stage."""
    account_for_loss_in_pipeline_split: bool = False
    """Divide the layers evenly, counting output layer and loss as one layer of the last stage."""
    sequence_parallel: Annotated[bool, Field(aliases=("--sp",))] = False
    """Split norms, dropout and residuals along the sequence over the tensor-parallel ranks. Needs
    --tp > 1."""
    pipeline_schedule: Literal["1f1b", "interleaved", "zb-h1", "zb-v", "gpipe", "auto"] | None = (
        None
    )
    """Order of computations in the pipeline. Unset: 1f1b, or interleaved with several stages on a
    rank. auto: of all but gpipe, the one that a simulation finds fastest within the memory."""
    memory_limit_gib: Annotated[float | None, Field(above=0, changes_numbers=False)] = None
    """With --pipeline-schedule auto, the most memory of a rank, by estimate. Unset: a tenth more
    than the default schedule takes."""
    num_virtual_stages_per_pipeline_rank: Annotated[int | None, Field(minimum=1)] = None
    """Stages on each rank of the pipeline, v. Unset: 1, and 2 with interleaved and zb-v."""
    num_layers_per_virtual_pipeline_stage: Annotated[int | None, Field(minimum=1)] = None
    """Layers of each stage, in place of the number of stages."""
    microbatch_group_size_per_virtual_pipeline_stage: Annotated[int | None, Field(minimum=1)] = None
    """Microbatches that pass through a rank's first stage before any passes through its second, at
    least p, with interleaved. Unset: p."""
    use_distributed_optimizer: Annotated[bool, Field(changes_numbers=False)] = False
    """Shard master weights and optimizer states over the d data ranks (ZeRO stage 1): 6 + 12 / d
    bytes per parameter in bf16, not 18."""
    overlap_grad_reduce: Annotated[bool, Field(changes_numbers=False)] = False
    """Sum a bucket of gradients over the data ranks as soon as the last backward of a step has
    completed it."""
    overlap_param_gather: Annotated[bool, Field(changes_numbers=False)] = False
    """Gather updated weights while the next forward runs: a layer waits for its own. Needs
    --use-distributed-optimizer."""
    ddp_bucket_size: Annotated[int | None, Field(minimum=1, changes_numbers=False)] = None
    """Parameters after which a bucket of gradients is closed. Unset: 40 million or a million per
    data rank, whichever is more."""
    world_size: Annotated[int | None, Field(minimum=1, changes_numbers=False)] = None
    """Check the configuration for this many ranks and exit 0 if it is sound (for a login node;
    nothing is started)."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(changes_numbers=False)] = "auto"
    """auto: GPUs when this node has one per local rank, else the CPU; the choice and its reason are
    printed."""
    distributed_backend: Annotated[
        Literal["auto", "nccl", "gloo"], Field(changes_numbers=False)
    ] = "auto"
    """auto: nccl on GPUs, gloo on the CPU."""
    distributed_timeout_minutes: Annotated[float, Field(above=0, changes_numbers=False)] = 10.0
    """A collective that takes longer than this ends the run with an error."""
    hang_timeout: Annotated[float, Field(minimum=0, changes_numbers=False)] = 300.0
    """Seconds without progress on any rank after which the watchdog reports which rank hangs and
    where, and ends the job; 0 = never. Saving and starting may take longer."""
    check_stragglers: Annotated[bool, Field(changes_numbers=False)] = False
    """Before training, time a matrix product on each rank and an all-reduce of each group, and name
    the slow ones."""

    @property
    def schedule(self) -> str:
        """--pipeline-schedule, with its default filled in."""
        several = (self.num_virtual_stages_per_pipeline_rank or 1) > 1
        return self.pipeline_schedule or ("interleaved" if several else "1f1b")

    def bucket_size(self, data_ranks: int) -> int:
        """--ddp-bucket-size, with its default filled in."""
        return self.ddp_bucket_size or max(40_000_000, 1_000_000 * data_ranks)

    @property
    def split_is_given(self) -> bool:
        """Whether a flag says how layers are divided into stages."""
        return any(getattr(self, key) not in (None, False) for key in OF_SPLIT)
