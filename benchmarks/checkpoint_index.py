#!/usr/bin/env python
"""Measure the index of a checkpoint of many ranks: its size, the time and memory of the rank that
writes it and of a rank that opens it, and the files that a rank opens to load.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_index.py

The model is Llama 3's 70B with --use-distributed-optimizer and bf16, at tp=8 x pp=16 with dp=8 and
dp=128: 1,024 and 16,384 ranks. No weights exist: each rank's stage is made on torch's meta device,
its shards are those that it would write, and checksums are random. The index is merged, checked,
written and read by the code of checkpoint/. Each side runs in a process of its own, so that its
peak memory is its own. Times are CPU seconds of that process.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import multiprocessing
import pickle  # noqa: TID251  what a gather of objects sends
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch

from megalite.checkpoint.checksum import DIGITS, number_of_blocks
from megalite.checkpoint.format import Index, StoredFile, StoredShard, StoredTensor, rank_file
from megalite.checkpoint.save import _merge
from megalite.config.run import RunConfig, from_flat
from megalite.config.validate import resolve
from megalite.models import stage
from megalite.nn.parameter import held_boxes
from megalite.optim.buckets import BucketLayout
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import Group
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng
from megalite.training.build import build_model

LLAMA_70B = dict(
    num_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_query_groups=8,
    ffn_hidden_size=28672,
    seq_length=8192,
    vocab_size=128256,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    disable_bias_linear=True,
    untie_embeddings_and_output_weights=True,
)
TINY = dict(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=61)
SHAPES = {"llama-70b": LLAMA_70B, "tiny": TINY}
STATE = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """What one rank has of one tensor of a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: list[Box]


def configuration(shape: str, layout: ParallelLayout) -> RunConfig:
    """A run of this model in this layout."""
    flags = dict(
        SHAPES[shape],
        mock_data=True,
        train_iters=10,
        micro_batch_size=1,
        global_batch_size=layout.data * 2 * layout.pipeline,
        lr=1e-4,
        min_lr=0.0,
        precision="bf16",
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        use_distributed_optimizer=True,
        device="cpu",
    )
    return resolve(from_flat(flags), layout.world_size)


def held_by_ranks(
    shape: str, layout: ParallelLayout, ranks: list[int], reads: bool = False
) -> Iterator[list[Held]]:
    """What each of these ranks writes: the weights and its part of the optimizer's state of which
    it is the primary owner; or reads: of all parameters of its stage. They need not be in order;
    ranks of one stage are fastest in a row."""
    config = configuration(shape, layout)
    place, parameters, buckets = None, {}, None
    for rank in ranks:
        position = layout.coordinates(rank)
        if place != (position["tensor"], position["pipeline"]):
            place = (position["tensor"], position["pipeline"])
            context = context_of(layout, rank)
            with patch.object(stage, "initialize"):  # nothing to initialize
                model = build_model(config, context, CounterBasedRng.for_seed(1))
            parameters = model.parameters_by_name
            tied = context.embedding is not None
            size = config.parallel.bucket_size(layout.data)
            buckets = BucketLayout(parameters, tied, size, shards=layout.data)
        yield held_by_rank({} if reads else position, parameters, buckets, position["data"])


def context_of(layout: ParallelLayout, rank: int) -> ParallelContext:
    """The place of a rank, without any communication, on a device without memory."""
    groups = {}
    for axis in layout.axes:
        ranks = layout.group_of(rank, axis)
        groups[(axis,)] = Group(ranks, ranks.index(rank))
    world = Group(range(layout.world_size), rank)
    device = torch.device("meta")
    return ParallelContext(layout=layout, device=device, world=world, control=world, groups=groups)


def held_by_rank(position: dict, parameters: dict, buckets: BucketLayout, data: int) -> list[Held]:
    """The tensors of which the rank at this position, the data rank `data`, is the primary owner;
    an empty position is that of every tensor."""
    held = []
    ranges = buckets.ranges_of_shard(parameters, data)
    for name, parameter in parameters.items():
        spec = parameter.spec
        shape = spec.global_shape
        if spec.is_primary(position):
            boxes = [box for box, _ in held_boxes(parameter, parameter.detach())]
            held.append(Held(name, torch.bfloat16, shape, boxes))
        if name in ranges and spec.is_primary({**position, "data": 0}):
            start, stop = ranges[name]
            part = torch.empty(stop - start, device="meta")
            boxes = [box for box, _ in held_boxes(parameter, part, ranges[name])]
            for kind in STATE:
                held.append(Held(f"optimizer.{kind}.{name}", torch.float32, shape, boxes))
    return held


def stored(rank: int, held: list[Held]) -> tuple[dict[str, StoredTensor], StoredFile]:
    """What a rank sends to rank 0 once it has written its file."""
    draw = random.Random(rank)
    size = 0
    tensors = {}
    for item in held:
        shards = []
        for number, box in enumerate(item.boxes):
            length = box.numel * item.dtype.itemsize
            size += length
            digits = number_of_blocks(length) * DIGITS
            key = f"{item.name}@{number}" if number else item.name
            checksums = f"{draw.getrandbits(4 * digits):0{digits}x}"
            shards.append(StoredShard(rank_file(rank), key, box, checksums))
        tensors[item.name] = StoredTensor(item.dtype, item.shape, tuple(shards))
    return tensors, StoredFile(size, f"{draw.getrandbits(64):016x}")


def by_stage(layout: ParallelLayout) -> list[int]:
    """All ranks, those of one stage and one tensor-parallel rank in a row."""
    places = [(layout.coordinates(rank), rank) for rank in range(layout.world_size)]
    return [r for _, r in sorted(places, key=lambda p: (p[0]["pipeline"], p[0]["tensor"], p[1]))]


def pickled(shape: str, layout: ParallelLayout, folder: str) -> dict:
    """What the ranks send to rank 0, as one file of pickles in the order of ranks."""
    ranks = by_stage(layout)
    sent = {}
    for rank, held in zip(ranks, held_by_ranks(shape, layout, ranks)):
        sent[rank] = pickle.dumps(stored(rank, held))
    with open(f"{folder}/sent", "wb") as file:
        for rank in range(layout.world_size):
            file.write(sent[rank])
    sizes = list(map(len, sent.values()))
    return {"sent by all ranks, MB": sum(sizes) / 1e6, "by one at most, kB": max(sizes) / 1e3}


def written(shape: str, layout: ParallelLayout, folder: str) -> dict:
    """Rank 0: what the others sent becomes an index."""
    before = peak_memory()
    begin = time.process_time()
    received = []
    with open(f"{folder}/sent", "rb") as file:
        for _ in range(layout.world_size):
            received.append(pickle.load(file))
    unpickled = time.process_time()
    tensors, files = zip(*received)
    merged = _merge(tensors)
    checked = time.process_time()
    names = {rank_file(rank): file for rank, file in enumerate(files)}
    text = Index(1, layout.world_size, merged, names).to_json().encode()
    Path(folder, "index.json").write_bytes(text)
    end = time.process_time()
    return {
        "tensors": len(merged),
        "boxes": sum(len(tensor.shards) for tensor in merged.values()),
        "index, MB": len(text) / 1e6,
        "receive, s": unpickled - begin,
        "merge and check, s": checked - unpickled,
        "write, s": end - checked,
        "memory of rank 0, MB": peak_memory() - before,
    }


def opened(shape: str, layout: ParallelLayout, folder: str) -> dict:
    """Any rank: the index is read, and the files that hold its shards are found."""
    before = peak_memory()
    begin = time.process_time()
    index = Index.from_json(Path(folder, "index.json").read_bytes())
    found = {"open, s": time.process_time() - begin}
    found["memory of a reader, MB"] = peak_memory() - before
    half = ParallelLayout(
        tensor=max(layout.tensor // 2, 1), data=layout.data * 4, pipeline=layout.pipeline // 2
    )
    for what, other in (("same layout", layout), (f"as {half}", half)):
        counts = []
        begin = time.process_time()
        # The first, a middle and the last rank.
        ranks = [0, other.world_size // 2 + 1, other.world_size - 1]
        for held in held_by_ranks(shape, other, ranks, reads=True):
            counts.append(len(files_of(index, held, other)))
        found[f"files opened by a rank, {what}"] = max(counts)
        found[f"find them, s, {what}"] = (time.process_time() - begin) / len(ranks)
    return found


def files_of(index: Index, held: list[Held], layout: ParallelLayout) -> set[str]:
    """The files that a rank reads: those whose shards share elements with its own."""
    files = set()
    for item in held:
        for shard in index.tensors[item.name].shards:
            if any(shard.box.intersect(box) for box in item.boxes):
                files.add(shard.file)
    return files


def peak_memory() -> float:
    """Of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(shape: str, layout: ParallelLayout) -> dict:
    """All figures of one layout."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in (pickled, written, opened):
            with multiprocessing.get_context("spawn").Pool(1) as process:
                found |= process.apply(side, (shape, layout, folder))
    return found


def main() -> None:
    """Print a column for each number of data-parallel ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-70b")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--pp", type=int, default=16)
    parser.add_argument("--dp", type=int, nargs="+", default=[8, 128])
    flags = parser.parse_args()
    for data in flags.dp:
        layout = ParallelLayout(tensor=flags.tp, data=data, pipeline=flags.pp)
        print(f"{flags.shape} on {layout.world_size:,} ranks, {layout}")
        for name, value in measure(flags.shape, layout).items():
            print(f"  {name:45} {value:>12,.2f}".removesuffix(".00"), flush=True)


if __name__ == "__main__":
    main()
