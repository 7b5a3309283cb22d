"""PyTorch's own kinds of parallelism and Hugging Face's GPT-2, as contenders in `training.py
--peers`.

single: the plain model. transformers: Hugging Face's. dp2: DistributedDataParallel. tp2, tp2-sp:
DTensor (`parallelize_module`). pp2: torch.distributed.pipelining's Schedule1F1B. schedules: each of
its schedules in SCHEDULES, on any number of ranks.
"""

import contextlib
import functools

import torch
import torch.distributed as dist
from plain_gpt import cross_entropy, plain_gpt
from rank import Shape, random_batches, serve
from torch import nn
from torch.distributed.tensor import DTensor


def hugging_face(shape: Shape) -> nn.Module:
    """Hugging Face's GPT-2 of this shape; returns logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.seq,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def tensor_parallel(model: nn.Module, sequence_parallel: bool) -> nn.Module:
    """Megatron's layout of the plain model, in DTensor's words."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    between = Shard(1) if sequence_parallel else Replicate()
    plan = {}
    for name, _ in model.named_children():
        if name.startswith("block"):
            plan[f"{name}.attention.qkv"] = ColwiseParallel(input_layouts=between)
            plan[f"{name}.attention.output"] = RowwiseParallel(output_layouts=between)
            plan[f"{name}.up"] = ColwiseParallel(input_layouts=between)
            plan[f"{name}.down"] = RowwiseParallel(output_layouts=between)
            if sequence_parallel:
                plan[f"{name}.norm1"] = plan[f"{name}.norm2"] = SequenceParallel()
    if sequence_parallel:
        plan["embedding"] = PrepareModuleOutput(
            output_layouts=(Replicate(),), desired_output_layouts=(Shard(1),)
        )
        plan["head.norm"] = SequenceParallel()
    # The logits stay shards of the vocabulary, for `loss_parallel`.
    plan["head.output"] = ColwiseParallel(
        input_layouts=between, output_layouts=Shard(-1), use_local_output=False
    )
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


SCHEDULES = {
    "1f1b": ("Schedule1F1B", 1),
    "gpipe": ("ScheduleGPipe", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zb-1": ("ScheduleInterleavedZeroBubble", 1),
    "zb-2": ("ScheduleInterleavedZeroBubble", 2),
    "zb-v": ("ScheduleZBVZeroBubble", 2),
}
"""torch's class, and stages on each rank."""


def pipeline_step(shape: Shape, batches, name: str = "1f1b"):
    """A step of a pipeline over all ranks, under a schedule of SCHEDULES."""
    from torch.distributed import pipelining

    kind, chunks = SCHEDULES[name]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = chunks * ranks
    numbers = [rank, count - 1 - rank] if name == "zb-v" else range(rank, count, ranks)
    layers = shape.layers // count
    models = nn.ModuleList(plain_gpt(shape, range(n * layers, (n + 1) * layers)) for n in numbers)
    stages = []
    for number, model in zip(numbers, models):
        stages.append(pipelining.PipelineStage(model, number, count, torch.device("cpu")))
    make = getattr(pipelining, kind)
    takes_one = issubclass(make, pipelining.schedules.PipelineScheduleSingle)
    schedule = make(stages[0] if takes_one else stages, shape.microbatches, loss_fn=cross_entropy)
    optimizer = torch.optim.AdamW(models.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> float | None:
        optimizer.zero_grad()
        microbatches = [next(batches) for _ in range(shape.microbatches)]
        tokens, labels = map(torch.cat, zip(*microbatches))
        losses = []
        inputs = [tokens] if 0 in numbers else []
        last = {"target": labels, "losses": losses} if count - 1 in numbers else {}
        schedule.step(*inputs, **last)
        optimizer.step()
        return sum(loss.item() for loss in losses) / len(losses) if losses else None

    return step


def prepare(variant: str, shape: Shape):
    """The training step of a variant."""
    dist.init_process_group("gloo")
    batches = random_batches(shape, seed=dist.get_rank() if variant == "dp2" else 0)
    if variant == "pp2":
        return pipeline_step(shape, batches)
    if variant == "schedules":
        make = functools.cache(functools.partial(pipeline_step, shape, batches))
        return lambda name: make(name)()
    model = hugging_face(shape) if variant == "transformers" else plain_gpt(shape)
    loss_region = contextlib.nullcontext
    if variant.startswith("tp2"):
        from torch.distributed.tensor.parallel import loss_parallel

        loss_region = loss_parallel
        tensor_parallel(model, sequence_parallel=variant == "tp2-sp")
    # The fused AdamW is the fastest on a CPU, then foreach; it does not take DTensors there.
    distributed = [p for p in model.parameters() if isinstance(p, DTensor)]
    local = [p for p in model.parameters() if not isinstance(p, DTensor)]
    groups = [{"params": distributed, "foreach": True}, {"params": local, "fused": True}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.01)
    if variant == "dp2":
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step() -> float:
        optimizer.zero_grad()
        tokens, labels = next(batches)
        output = model(tokens)
        with loss_region():
            loss = cross_entropy(output.logits if variant == "transformers" else output, labels)
            loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    serve(prepare)
