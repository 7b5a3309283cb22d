"""Megatron-core on a CPU with gloo, as a contender in `training.py --peers`."""

import logging
import re

import cuda_on_cpu
import torch
import torch.distributed as dist
from rank import Shape, random_batches, serve

cuda_on_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig, torch_norm  # noqa: E402


def allow_sequence_parallel() -> None:
    """Give the layers a LayerNorm whose gradients are summed over tensor ranks.

    Without Apex and Transformer Engine, Megatron-core takes torch's LayerNorm and refuses sequence
    parallelism, since its parameters lack the mark by which it finds gradients to be summed.
    """

    def layer_norm(cls, config, hidden_size, eps=1e-5, *args, **kwargs):
        norm = torch.nn.LayerNorm(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = layer_norm


def transformer_config(
    shape: Shape, tensor: int, pipeline: int, *, chunks: int | None, sequence_parallel: bool
):
    """The model's and the layout's settings. chunks: stages on each rank if they are
    interleaved."""
    # By default it sends and receives in batches, which mixes messages up without an error where
    # two ranks hold several stages each.
    transfers = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if chunks else {}
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        activation_func=torch.nn.functional.gelu,  # the fused one is its tanh approximation
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        # By torch.compile these two save 3% of CPU time; with that of the cross-entropy it is 1%.
        # The others, as fused attention, need a GPU.
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        virtual_pipeline_model_parallel_size=chunks,
        **transfers,
    )


def build(shape: Shape, config: TransformerConfig, distributed_optimizer: bool):
    """(this rank's stages, optimizer)."""
    sharding = {"use_distributed_optimizer": distributed_optimizer}
    reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **sharding)
    models = []
    for i in range(config.virtual_pipeline_model_parallel_size or 1):
        where = {}
        if config.virtual_pipeline_model_parallel_size:
            where = {"ignore_virtual": False, "vp_stage": i}
        module = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=shape.vocab,
            max_sequence_length=shape.seq,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=False,
            position_embedding_type="learned_absolute",
            vp_stage=where.get("vp_stage"),
        )
        models.append(DistributedDataParallel(config, reduction, module))
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-4, clip_grad=0.0, weight_decay=0.01, **sharding
    )
    return models, get_megatron_optimizer(settings, models)


def prepare(variant: str, shape: Shape):
    """The training step of a layout, such as tp2, pp4 or pp4-interleaved."""
    logging.disable(logging.WARNING)
    allow_sequence_parallel()
    tensor = 2 if variant.startswith("tp2") else 1
    found = re.search(r"pp(\d+)", variant)
    pipeline = int(found[1]) if found else 1
    chunks = 2 if variant.endswith("interleaved") else None
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline, chunks)
    model_parallel_cuda_manual_seed(1)
    config = transformer_config(
        shape, tensor, pipeline, chunks=chunks, sequence_parallel=variant == "tp2-sp"
    )
    models, optimizer = build(shape, config, distributed_optimizer=variant == "dp2-zero1")
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    schedule = get_forward_backward_func()
    # The stages of a rank ask for the same microbatches, each at its own time.
    seed = parallel_state.get_data_parallel_rank()
    batches = [random_batches(shape, seed) for _ in models]
    positions = torch.arange(shape.seq).repeat(shape.micro_batch, 1)

    def mean_loss(losses):
        loss = losses.mean()
        # A copy: the schedule divides the loss by the number of microbatches in place.
        return loss, {"loss": loss.detach().clone()}

    def forward(iterator, model):
        tokens, labels = next(iterator)
        return model(tokens, positions, None, labels=labels), mean_loss

    def step() -> float | None:
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = schedule(
            forward_step_func=forward,
            data_iterator=batches if chunks else batches[0],
            model=models,
            num_microbatches=shape.microbatches,
            seq_length=shape.seq,
            micro_batch_size=shape.micro_batch,
            forward_only=False,
        )
        optimizer.step()
        return sum(r["loss"].item() for r in reports) / len(reports) if reports else None

    return step


if __name__ == "__main__":
    serve(prepare)
