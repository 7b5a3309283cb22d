"""What one training step computes in one layout: every activation, loss and gradient, as parts of
global tensors.

An activation has a global name and a global shape too: [samples of the global batch, sequence,
features]. What a rank computes of it is a box, as with parameters, so that steps in any two layouts
can be compared.
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
from megalite.data.build import blended, build_sources
from megalite.nn.attention import Attention
from megalite.nn.dropout import HiddenDropout
from megalite.nn.embedding import Embedding
from megalite.nn.init import normal
from megalite.nn.linear import ColumnParallelLinear
from megalite.nn.mlp import MLP
from megalite.nn.norm import Norm
from megalite.parallel.boxes import Box
from megalite.parallel.collectives import barrier
from megalite.parallel.launch import LaunchInfo
from megalite.training.batches import GlobalBatches, build_batches
from megalite.training.build import build_components, build_context, build_model

ACTIVATION, LOSS, ACTIVATION_GRADIENT, GRADIENT = (
    "activation",
    "loss",
    "gradient of activation",
    "gradient",
)
RECORDED_MODULES = (Attention, ColumnParallelLinear, Embedding, HiddenDropout, MLP, Norm)
"""Modules whose outputs are hidden states [s, b, h], or [s, b, f/t] of a column-parallel layer."""
END = 0
"""The token that made-up documents end in; its positions are left out of the loss."""


class RanksFailed(RuntimeError):
    """A rank that was started here did not finish; its own message is on stderr."""


@dataclass(frozen=True)
class Part:
    """What one rank holds of one global tensor."""

    kind: str
    """ACTIVATION, LOSS, ACTIVATION_GRADIENT or GRADIENT."""
    place: str
    """Name of the module or parameter, the same in every layout; "loss"."""
    global_shape: tuple[int, ...]
    box: Box
    values: torch.Tensor
    """Of shape box.shape."""


class SyntheticDocuments:
    """Made-up samples of at least two documents, padded: microbatches then differ in their number
    of unmasked tokens, and so a loss mask that is forgotten, or a mean of means, shows; and
    documents that are not kept apart show."""

    def __init__(self, samples, seq_length: int):
        self.samples, self.spread = samples, max(1, seq_length // 2)

    def __getitem__(self, i: int) -> np.ndarray:
        """Sample i, int64 [s + 1]."""
        row = self.samples[i].copy()
        row[len(row) - 7 * i % self.spread :] = END
        row[5 * i % self.spread] = END
        return row


class Recorder:
    """Listens to a model: every forward leaves the outputs of its modules in `parts`, every
    backward their gradients.

    Sample numbers are those of the first global batch, from 0.
    """

    def __init__(self, model, batch_size: int):
        self.parts: list[Part] = []
        self.model, self.batch_size = model, batch_size
        self._samples: torch.Tensor | None = None
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave)
        for name, module in model.named_modules():
            if isinstance(module, RECORDED_MODULES):
                module.register_forward_hook(partial(self._output, name))

    def _enter(self, model, args) -> None:
        self._samples = args[1].samples

    def _leave(self, model, args, output) -> None:
        if model.is_last:  # the microbatch's sums of each term of the loss
            rows, terms = len(self._samples), len(output)
            box = Box((int(self._samples[0]) // rows, 0), (1, terms))
            shape = (self.batch_size // rows, terms)
            self.parts.append(Part(LOSS, LOSS, shape, box, output.detach().unsqueeze(0).cpu()))
        self._samples = None

    def _output(self, place: str, module, args, output) -> None:
        if self._samples is None or output.dim() != 3:
            return  # recomputed in a backward: recorded before; or of a head, for some tokens only
        first = int(self._samples[0])
        self._keep(ACTIVATION, place, module, first, output)
        if output.requires_grad:
            output.register_hook(partial(self._keep, ACTIVATION_GRADIENT, place, module, first))

    def _keep(self, kind: str, place: str, module, first: int, tensor: torch.Tensor) -> None:
        """Keep [s, b, h], [s/t, b, h] or [s, b, f/t] as a box of [samples, s, h or features...]."""
        features, offset = (tensor.shape[-1],), (0,)
        values = tensor.detach().transpose(0, 1)
        if isinstance(module, ColumnParallelLinear):
            spec = module.weight.spec
            features, offset = spec.global_shape[:-1], spec.box.offset[:-1]
            values = values.unflatten(-1, spec.box.shape[:-1])
        length = self.model.config.seq_length
        start = 0 if values.shape[1] == length else values.shape[1] * self.model.context.tensor.rank
        box = Box((first, start, *offset), tuple(values.shape))
        values = values.to("cpu", copy=True).contiguous()
        self.parts.append(Part(kind, place, (self.batch_size, length, *features), box, values))


def record(
    launch: LaunchInfo, config: RunConfig, folder: str | Path, build_model: Callable = build_model
) -> None:
    """Run one step (forward and backward of the first global batch, gradients reduced) as one rank
    of a resolved configuration, and write what it computed to a file of its own in `folder`.
    Collective over the launcher's ranks.

    `build_model(config, context, rng)` makes this rank's stage, as in `pretrain`. Weights that
    start as zeros or ones are drawn at random as well.
    """
    context, _ = build_context(config, launch)
    try:
        parts = build_components(config, context, build_model)
        _stir(parts.model.parameters_by_name, config.training.seed)
        recorder = Recorder(parts.model, config.data.global_batch_size)
        batches, loss_weights = _batches(config, parts.model).at(0)
        parts.optimizer.gradients.zero()
        parts.engine.train_step(batches, loss_weights)
        parts.optimizer.gradients.reduce()
        found = [
            _weighted(part, loss_weights.cpu()) if part.kind == LOSS else part
            for part in recorder.parts
        ]
        for name, parameter in parts.model.parameters_by_name.items():
            spec = parameter.spec
            values = spec.real(parameter.main_grad).to("cpu", copy=True).contiguous()
            found.append(Part(GRADIENT, name, spec.global_shape, spec.box, values))
        _write(_file_of(folder, launch.rank), found)
        barrier(context.world)
    finally:
        context.destroy()


def _stir(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Add counted random numbers to biases and norms, since zeros and ones would hide a bias added
    in a wrong place."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            spec = parameter.spec
            if spec.init != "normal" and spec.box.numel:
                values = normal(seed, f"verify {name}", spec.global_shape, spec.box)
                spec.real(parameter).add_(torch.from_numpy(values * 0.1).to(parameter))


def _batches(config: RunConfig, model) -> GlobalBatches:
    data = config.data
    samples = {"train": data.global_batch_size}
    dataset = blended(
        build_sources(data, config.model, config.training.seed, samples, config.bert)["train"]
    )
    if not data.mock_data or config.is_bert:  # BERT's made-up samples are of many lengths already
        return build_batches(config, dataset, model)
    config = replace(config, data=replace(data, eod_mask_loss=True))
    return build_batches(config, SyntheticDocuments(dataset, config.model.seq_length), model, END)


def _weighted(part: Part, loss_weights: torch.Tensor) -> Part:
    return Part(
        part.kind, part.place, part.global_shape, part.box, part.values.double() * loss_weights
    )


def record_on_ranks(config: RunConfig, world_size: int, folder: str | Path) -> None:
    """`record` on processes of this machine, one for each rank. Raises RanksFailed when one of them
    fails."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload([__name__, "torch._dynamo"])
    # A place of its own for each time: what a killed run left there would mislead the next one.
    meet = f"file://{tempfile.mkdtemp(dir=Path(folder).resolve(), prefix='meet-')}/ranks"
    launches = [
        LaunchInfo(rank, world_size, rank, world_size, meet, "verify") for rank in range(world_size)
    ]
    ranks = [
        fork.Process(target=record, args=(launch, config, folder), daemon=True)
        for launch in launches
    ]
    for rank in ranks:
        rank.start()
    try:
        running = list(ranks)
        while running:
            wait([rank.sentinel for rank in running])
            failed = [
                f"rank {i} ended with status {rank.exitcode}"
                for i, rank in enumerate(ranks)
                if rank.exitcode
            ]
            if failed:
                raise RanksFailed(f"{', '.join(failed)} of {world_size}: see its message above")
            running = [rank for rank in running if rank.exitcode is None]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def discard_record(folder: str | Path, rank: int) -> None:
    """Forget what an earlier run recorded on this rank: it must not be taken for this one's."""
    Path(_file_of(folder, rank)).unlink(missing_ok=True)


def _file_of(folder: str | Path, rank: int) -> Path:
    return Path(folder, f"rank-{rank:05}.safetensors")


def _write(file: Path, parts: list[Part]) -> None:
    described = json.dumps(
        [(p.kind, p.place, p.global_shape, p.box.offset, p.box.shape) for p in parts]
    )
    save_file(
        {str(i): part.values for i, part in enumerate(parts)}, file, metadata={"parts": described}
    )


def read_parts(folder: str | Path, rank: int) -> Iterator[Part]:
    """What `record` wrote for a rank, in the order of the computation."""
    with safe_open(_file_of(folder, rank), "pt") as file:
        for i, (kind, place, shape, offset, size) in enumerate(
            json.loads(file.metadata()["parts"])
        ):
            yield Part(
                kind, place, tuple(shape), Box(tuple(offset), tuple(size)), file.get_tensor(str(i))
            )
