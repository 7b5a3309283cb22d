"""Checkpoints of Megatron-core's own models in Megatron-LM's formats, with their logits.

    python benchmarks/peers/megatron_checkpoint.py gpt torch FOLDER
    python benchmarks/peers/megatron_checkpoint.py llama torch FOLDER
    python benchmarks/peers/megatron_checkpoint.py llama torch_dist FOLDER

`gpt`: learned positions, LayerNorm, tied, on one rank. `llama`: RoPE, RMSNorm, SwiGLU, grouped
queries, norms of queries and keys, biases of qkv, on 4 ranks (tp 2, pp 2). FOLDER/logits.pt holds
the tokens and what the model makes of them. tests/data/megatron has what these commands wrote.
"""

import argparse
import logging
import random
import signal
import sys
from pathlib import Path

import cuda_on_cpu
import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing

SEQUENCE = 16
VOCABULARY = 61
PADDED = 64
COMMON = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
MODELS = {
    "gpt": {"ffn_hidden_size": 32, "add_bias_linear": True, "normalization": "LayerNorm"},
    "llama": {
        "ffn_hidden_size": 24,
        "num_query_groups": 2,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
    },
}


def transformer_config(name: str, tensor: int, pipeline: int):
    """Megatron-core's settings of a model."""
    from megatron.core.transformer import TransformerConfig

    settings = COMMON | MODELS[name]
    gated = name == "llama"
    return TransformerConfig(
        **settings,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        bias_activation_fusion=not gated,  # for GELU: its tanh form
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )


def arguments(name: str, tensor: int, pipeline: int) -> argparse.Namespace:
    """What Megatron-LM's `args` would hold, with what is no number: enums, dtypes, signals."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    settings = COMMON | MODELS[name]
    settings["norm_epsilon"] = settings.pop("layernorm_epsilon", 1e-5)
    gated = name == "llama"
    return argparse.Namespace(
        **settings,
        group_query_attention=gated,
        swiglu=gated,
        bias_gelu_fusion=not gated,
        bias_swiglu_fusion=False,
        untie_embeddings_and_output_weights=gated,
        position_embedding_type="rope" if gated else "learned_absolute",
        add_position_embedding=True,
        rotary_base=500000 if gated else 10000,
        rotary_percent=1.0,
        rotary_interleaved=False,
        kv_channels=4,
        seq_length=SEQUENCE,
        max_position_embeddings=SEQUENCE,
        padded_vocab_size=PADDED,
        make_vocab_size_divisible_by=16,
        tokenizer_type="GPT2BPETokenizer",
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        params_dtype=torch.float32,
        model_type=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.unfused,
        exit_signal=signal.SIGTERM,
        num_experts=None,
        data_path=["corpus_text_document"],
    )


def work(rank: int, name: str, form: str, folder: str, sizes: tuple[int, int]) -> None:
    """Build this rank's part, save it, and compute logits with the others."""
    logging.disable(logging.WARNING)
    cuda_on_cpu.install()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    tensor, pipeline = sizes
    meeting = f"file://{Path(folder).absolute()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=tensor * pipeline)
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(1)
    gated = name == "llama"
    model = GPTModel(
        transformer_config(name, tensor, pipeline),
        get_gpt_layer_local_spec(qk_layernorm=gated, normalization=MODELS[name]["normalization"]),
        vocab_size=PADDED,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not gated,
        position_embedding_type="rope" if gated else "learned_absolute",
        rotary_base=500000 if gated else 10000,
    )
    # Every rank its own weights, but for what tensor-parallel ranks hold together. Biases and norms
    # too: zeros and ones would hide a mistake.
    stage = parallel_state.get_pipeline_model_parallel_rank()
    generators = {
        "mine": torch.Generator().manual_seed(100 + rank),
        "ours": torch.Generator().manual_seed(200 + stage),
    }
    with torch.no_grad():
        for parameter in model.parameters():
            split = getattr(parameter, "tensor_model_parallel", False)
            draw = torch.randn(parameter.shape, generator=generators["mine" if split else "ours"])
            parameter.add_(0.1 * draw)
    write = save if form == "torch" else save_distributed
    write(Path(folder), model, arguments(name, tensor, pipeline), sizes)
    logits = compute_logits(model, parallel_state)
    if logits is not None:
        tokens = tokens_to_read()
        torch.save(
            {"tokens": tokens, "logits": logits[..., :VOCABULARY].clone()}, f"{folder}/logits.pt"
        )


def tokens_to_read() -> torch.Tensor:
    """Token ids [2, s]."""
    return torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(7))


def save(folder: Path, model, args: argparse.Namespace, sizes: tuple[int, int]) -> None:
    """Write mp_rank_XX(_YYY)/model_optim_rng.pt as Megatron-LM does."""
    from megatron.core import parallel_state

    rank = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if sizes[1] > 1:
        rank += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    path = folder / "iter_0000020" / rank
    path.mkdir(parents=True)
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 20,
        "model": model.state_dict_for_save_checkpoint(),
        "num_floating_point_operations_so_far": 1e9,
        "rng_state": [
            {
                "random_rng_state": random.Random(1).getstate()[0],
                "np_rng_state": numpy.random.RandomState(1).get_state()[1][:4],
            }
        ],
    }
    torch.save(state, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("20")


def save_distributed(folder: Path, model, args: argparse.Namespace, sizes: tuple[int, int]) -> None:
    """Write the format torch_dist, by Megatron-core."""
    from megatron.core import dist_checkpointing, parallel_state

    path = folder / "iter_0000020"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 20}
    state["model"] = model.sharded_state_dict(metadata={"dp_cp_group": group})
    dist_checkpointing.save(state, str(path))
    (folder / "latest_checkpointed_iteration.txt").write_text("20")


@torch.no_grad()
def compute_logits(model, parallel_state) -> torch.Tensor | None:
    """Logits [2, s, padded vocabulary], on the first tensor-parallel rank of the last stage."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    last = parallel_state.is_pipeline_last_stage()
    if stages > 1 and last:
        hidden = torch.empty(SEQUENCE, 2, COMMON["hidden_size"])
        dist.recv(hidden, dist.get_rank() - tensor)
        model.set_input_tensor(hidden)
    positions = torch.arange(SEQUENCE).expand(2, SEQUENCE)
    result = model(tokens_to_read(), positions, None)
    if not last:
        dist.send(result.contiguous(), dist.get_rank() + tensor)
        return None
    shards = [torch.empty_like(result) for _ in range(tensor)]
    group = parallel_state.get_tensor_model_parallel_group()
    dist.all_gather(shards, result.contiguous(), group=group)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    return torch.cat(shards, dim=-1) if first else None


if __name__ == "__main__":
    model_name, form_name, target = sys.argv[1:]
    layout = (1, 1) if model_name == "gpt" else (2, 2)
    Path(target).mkdir(parents=True)
    torch.multiprocessing.spawn(
        work, (model_name, form_name, target, layout), nprocs=layout[0] * layout[1], join=True
    )
    Path(target, "meeting").unlink(missing_ok=True)
