"""Record what one training step computes in one layout, as shards of global tensors.

Recorded are the activations, the losses, the gradients of activations and the gradients of
parameters. Like a parameter, an activation has a global name and a global shape, [samples of the
global batch, sequence, features], of which a rank computes a box. Steps of any two layouts can
therefore be compared.
"""

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megalite.config.run import RunConfig
from megalite.data.architectures import DATA_OF
from megalite.data.build import blended, build_sources
from megalite.models.stages import Stages
from megalite.nn.attention import Attention
from megalite.nn.dropout import HiddenDropout
from megalite.nn.embedding import Embedding
from megalite.nn.init import normal
from megalite.nn.linear import ColumnParallelLinear
from megalite.nn.mlp import MLP
from megalite.nn.norm import Norm
from megalite.optim.loss_scale import LossScale
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import barrier
from megalite.parallel.launch import LaunchInfo
from megalite.system.errors import ReportedError
from megalite.training.batches import GlobalBatches, build_batches
from megalite.training.build import build_components, build_context, build_model

ACTIVATION = "activation"
LOSS = "loss"
ACTIVATION_GRADIENT = "gradient of activation"
GRADIENT = "gradient"
RECORDED_MODULES = (Attention, ColumnParallelLinear, Embedding, HiddenDropout, MLP, Norm)
"""Modules whose outputs are hidden states [s, b, h], or [s, b, f/t] of a column-parallel layer."""
END = 0
"""The token that ends a synthetic document; its positions are left out of the loss."""


class RanksFailed(ReportedError, RuntimeError):
    """A rank started by `record_on_ranks` failed; its own message is on stderr."""


FP16_LOSS_SCALE = 1024.0
"""Of the recorded step: the one that training starts with overflows."""


@dataclass(frozen=True)
class RecordedShard:
    """What one rank computed of one global tensor."""

    kind: str
    """ACTIVATION, LOSS, ACTIVATION_GRADIENT or GRADIENT."""
    name: str
    """Name of the module or parameter, the same in every layout; LOSS for the loss."""
    global_shape: tuple[int, ...]
    box: Box
    values: torch.Tensor
    """Of shape box.shape."""


class SyntheticDocuments:
    """Synthetic samples, each of at least two documents and padding.

    Microbatches then differ in their number of unmasked tokens, which exposes a missing loss mask
    and a mean of means. Several documents in a sample expose attention across documents.
    """

    def __init__(self, samples, seq_length: int):
        self.samples = samples
        self.spread = max(1, seq_length // 2)

    def __getitem__(self, i: int) -> np.ndarray:
        """Sample i, int64 [s + 1]."""
        row = self.samples[i].copy()
        row[len(row) - 7 * i % self.spread :] = END
        row[5 * i % self.spread] = END
        return row


class Recorder:
    """Hooks on a model: a forward adds module outputs to `shards`, a backward their gradients.

    Sample numbers are those of the first global batch, from 0.
    """

    def __init__(self, model: Stages, batch_size: int):
        self.shards: list[RecordedShard] = []
        self.model = model
        self.batch_size = batch_size
        self._samples: torch.Tensor | None = None  # of the microbatch in its forward
        for stage in model.stages:
            stage.register_forward_pre_hook(self._start_forward)
            stage.register_forward_hook(self._end_forward)
            for module_name, module in stage.named_modules():
                if isinstance(module, RECORDED_MODULES):
                    module.register_forward_hook(partial(self._record_output, module_name))

    def _start_forward(self, stage, args) -> None:
        self._samples = args[1].samples

    def _end_forward(self, stage, args, output) -> None:
        if stage.is_last:  # the output is the microbatch's sum of each term of the loss
            rows = len(self._samples)
            terms = len(output)
            box = Box((int(self._samples[0]) // rows, 0), (1, terms))
            shape = (self.batch_size // rows, terms)
            values = output.detach().unsqueeze(0).cpu()
            self.shards.append(RecordedShard(LOSS, LOSS, shape, box=box, values=values))
        self._samples = None

    def _record_output(self, module_name: str, module, args, output) -> None:
        # Outside a forward it is a recomputation, recorded before. An output of other than three
        # dims belongs to a head that sees some of the tokens only.
        if self._samples is None or output.dim() != 3:
            return
        first = int(self._samples[0])
        self._record(ACTIVATION, module_name, module, first, tensor=output)
        if output.requires_grad:
            hook = partial(self._record, ACTIVATION_GRADIENT, module_name, module, first)
            output.register_hook(hook)

    def _record(
        self, kind: str, module_name: str, module, first: int, tensor: torch.Tensor
    ) -> None:
        """Record [s, b, h], [s/t, b, h] or [s, b, f/t] as a box of [samples, s, h or features...].

        `first` is the number of the microbatch's first sample.
        """
        values = tensor.detach().transpose(0, 1)
        # The box along the features: a part of them in the output of a column-parallel layer.
        features = (tensor.shape[-1],)
        offset = (0,)
        if isinstance(module, ColumnParallelLinear):
            spec = module.weight.spec
            features = spec.global_shape[:-1]
            offset = spec.box.offset[:-1]
            values = values.unflatten(-1, spec.box.shape[:-1])
        # The box along the sequence: a part of it under sequence parallelism.
        length = self.model.model_config.seq_length
        start = 0
        if values.shape[1] != length:
            start = values.shape[1] * self.model.context.tensor.rank
        box = Box((first, start, *offset), tuple(values.shape))
        # A copy, since later operations may change the tensor in place.
        values = values.to("cpu", copy=True).contiguous()
        shape = (self.batch_size, length, *features)
        self.shards.append(RecordedShard(kind, module_name, shape, box=box, values=values))


def record(
    launch: LaunchInfo, config: RunConfig, folder: str | Path, build_model: Callable = build_model
) -> None:
    """Run and record one step as one rank of a resolved configuration.

    The step is forward and backward of the first global batch and the reduction of gradients. The
    record is this rank's own file in `folder`. Collective over the launcher's ranks.

    `build_model(config, context, rng)` makes this rank's stage, as in `pretrain`. Random numbers
    are added to weights that start as zeros or ones.
    """
    context, _ = build_context(config, launch)
    try:
        # Build the stage and attach the recorder.
        components = build_components(config, context, build_model)
        if config.optimizer.dtype == "float16":
            components.optimizer.loss_scale = LossScale(value=FP16_LOSS_SCALE)
        model = components.model
        _perturb_constant_weights(model.parameters_by_name, config.training.seed)
        recorder = Recorder(model, config.data.global_batch_size)
        # Run the step without the optimizer's update.
        batches, loss_weights = _batches(config, model).at(0)
        components.optimizer.gradients.zero()
        components.engine.train_step(batches, loss_weights)
        components.optimizer.gradients.reduce()
        # Weight the losses as the engine does, so that their sum is the global mean.
        shards = recorder.shards
        for i, shard in enumerate(shards):
            if shard.kind == LOSS:
                shards[i] = replace(shard, values=shard.values.double() * loss_weights.cpu())
        # Add the gradients of the parameters, without vocabulary padding.
        for name, box, values in components.optimizer.gradients.held():
            values = values.to("cpu", copy=True).contiguous()
            shape = model.parameters_by_name[name].spec.global_shape
            shards.append(RecordedShard(GRADIENT, name, shape, box=box, values=values))
        # Write, and wait until every rank's file is complete.
        _write(_file_of(folder, launch.rank), shards)
        barrier(context.world)
    finally:
        context.destroy()


def _perturb_constant_weights(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Add random numbers to biases and norms: zeros and ones would hide a misplaced addition.

    The numbers are counter-based, so they are the same in every layout.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            spec = parameter.spec
            if spec.init != "normal" and spec.box.numel:
                values = normal(seed, f"verify {name}", spec.global_shape, spec.box)
                spec.real(parameter).add_(torch.from_numpy(values * 0.1).to(parameter))


def _batches(config: RunConfig, model) -> GlobalBatches:
    data = config.data
    samples = {"train": data.global_batch_size}
    seed = config.training.seed
    sources = build_sources(data, config.model, seed, sample_counts=samples, bert=config.bert)
    dataset = blended(sources["train"])
    # Samples that are padded differ in length already.
    if not data.mock_data or DATA_OF[config.model.architecture].pads:
        return build_batches(config, dataset, model)
    config = replace(config, data=replace(data, eod_mask_loss=True))
    return build_batches(config, SyntheticDocuments(dataset, config.model.seq_length), model, END)


def record_on_ranks(config: RunConfig, world_size: int, folder: str | Path) -> None:
    """Call `record` in `world_size` processes of this machine, one for each rank.

    Raises RanksFailed as soon as one of them fails, and stops the others.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "torch._dynamo"])
    # A new rendezvous file for each call: the ranks would misread one left by a killed run.
    meet = f"file://{tempfile.mkdtemp(dir=Path(folder).resolve(), prefix='meet-')}/ranks"
    ranks = []
    for rank in range(world_size):
        discard_record(folder, rank)
        launch = LaunchInfo(rank, world_size, rank, world_size, init_method=meet, source="verify")
        arguments = (launch, config, folder)
        ranks.append(processes.Process(target=record, args=arguments, daemon=True))
    for process in ranks:
        process.start()
    running = ranks
    try:
        while running:
            wait([process.sentinel for process in running])
            failed = []
            for rank, process in enumerate(ranks):
                if process.exitcode:
                    failed.append(f"rank {rank} ended with status {process.exitcode}")
            if failed:
                raise RanksFailed(f"{', '.join(failed)} of {world_size}: see its message above")
            running = [process for process in running if process.exitcode is None]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def discard_record(folder: str | Path, rank: int) -> None:
    """Delete this rank's record of an earlier run, so that it is not taken for one of this run."""
    Path(_file_of(folder, rank)).unlink(missing_ok=True)


def _file_of(folder: str | Path, rank: int) -> Path:
    return Path(folder, f"rank-{rank:05}.safetensors")


def _write(file: Path, shards: list[RecordedShard]) -> None:
    """One tensor per shard, named by its index; all else as JSON in the metadata entry `parts`."""
    descriptions = []
    tensors = {}
    for i, shard in enumerate(shards):
        box = shard.box
        descriptions.append((shard.kind, shard.name, shard.global_shape, box.offset, box.shape))
        tensors[str(i)] = shard.values
    save_file(tensors, file, metadata={"parts": json.dumps(descriptions)})


def read_shards(folder: str | Path, rank: int) -> Iterator[RecordedShard]:
    """What `record` wrote for a rank, in the order of the computation."""
    with safe_open(_file_of(folder, rank), "pt") as file:
        descriptions = json.loads(file.metadata()["parts"])
        for i, (kind, name, shape, offset, size) in enumerate(descriptions):
            box = Box(tuple(offset), tuple(size))
            values = file.get_tensor(str(i))
            yield RecordedShard(kind, name, tuple(shape), box=box, values=values)
