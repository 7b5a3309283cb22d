"""ParallelContext: this process's groups, place and device. Passed to whoever needs it; nothing is global."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megalite.parallel.activity import Activity
from megalite.parallel.agreement import compare_facts
from megalite.parallel.collectives import Group
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import AXES, Coordinates, ParallelLayout

PATIENCE_HOURS = 2
"""Ranks that wait for the slowest disk wait longer than a collective may take: a checkpoint must not time out."""


class DeviceError(ValueError):
    """A device or backend that this machine does not have: says what it has."""


def choose_device(wanted: str, launch: LaunchInfo) -> tuple[torch.device, str]:
    """(device, reason). "auto" takes a GPU when this node has one for each local rank, else the CPU.

    Raises DeviceError when "cuda" is asked for and cannot be had.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu":
        return torch.device("cpu"), "asked for with --device cpu"
    enough = gpus >= launch.local_world_size
    found = f"{gpus} GPU(s) on this node for {launch.local_world_size} local rank(s)"
    if wanted == "cuda" and not enough:
        raise DeviceError(
            f"--device cuda: {found}; start fewer ranks per node, or use --device cpu"
        )
    if enough:
        return torch.device("cuda", launch.local_rank), found
    return torch.device("cpu"), found


@dataclass(frozen=True, eq=False)
class ParallelContext:
    """The groups this rank belongs to. Make it with `single` or `create`."""

    layout: ParallelLayout
    coordinates: Coordinates
    device: torch.device
    world: Group
    tensor: Group
    data: Group
    pipeline: Group
    control: Group
    """All ranks, for small objects and for waiting on each other's files: gloo, and patient."""
    embedding: Group | None
    """First and last stage of this pipeline, on those two only; None elsewhere and with one stage."""
    activity: Activity = field(default_factory=Activity)
    """What this rank is doing: all its groups note it there."""
    store: Any = field(default_factory=dist.HashStore)
    """torch's key-value store that all ranks share; here for what must work while collectives do not."""

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.world.rank

    @property
    def host(self) -> str:
        """Name of the machine."""
        return os.uname().nodename

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.world.size

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.coordinates.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer and computes the loss."""
        return self.coordinates.pipeline == self.layout.pipeline - 1

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> "ParallelContext":
        """A context of one rank, without any process group."""
        alone = Group((0,), 0)
        return cls(
            ParallelLayout(),
            Coordinates(0, 0, 0),
            torch.device(device),
            alone,
            alone,
            alone,
            alone,
            alone,
            None,
        )

    @classmethod
    def create(
        cls,
        layout: ParallelLayout,
        launch: LaunchInfo,
        device: str | torch.device = "cpu",
        backend: str = "gloo",
        timeout_minutes: float = 10.0,
        facts: Mapping[str, Any] | None = None,
    ) -> "ParallelContext":
        """Meet the other ranks and make all groups. Collective over the world; every rank passes the same layout.

        facts: what must be the same on every rank, compared before any group is made. Raises ValueError when the
        layout's world size is not the launcher's, RanksDiffer when the facts differ.
        """
        if layout.world_size != launch.world_size:
            raise ValueError(
                f"layout {layout} has {layout.world_size} ranks; the launcher started {launch.world_size}"
            )
        device = torch.device(device)
        if layout.world_size == 1:
            return cls.single(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = timedelta(minutes=timeout_minutes)
        store, _, _ = next(
            dist.rendezvous(launch.init_method, launch.rank, launch.world_size, timeout=timeout)
        )
        store.set_timeout(timeout)
        store = dist.PrefixStore(launch.incarnation, store)
        own = dist.PrefixStore("megalite", store)
        if facts is not None:
            compare_facts(own, launch.rank, launch.world_size, facts)
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            # NCCL then connects every group now: the first use of a pipeline's group, where only some ranks have
            # something to send, would be too late.
            device_id=device if device.type == "cuda" else None,
        )

        activity = Activity()

        def mine(groups, name, timeout=timeout, backend=None):
            """new_group is collective: every rank makes every group, in the same order, and keeps its own."""
            found = None
            for ranks in groups:
                alone = len(ranks) == 1
                handle = (
                    None
                    if alone
                    else dist.new_group(list(ranks), timeout, backend=backend, group_desc=name)
                )
                if launch.rank in ranks:
                    found = Group(
                        ranks, ranks.index(launch.rank), handle, name, activity, name == "control"
                    )
            return found

        everyone = range(layout.world_size)
        axes = {axis: mine(layout.groups(axis), axis) for axis in AXES}
        embedding = mine(layout.embedding_groups(), "embedding")
        control = mine([everyone], "control", timedelta(hours=PATIENCE_HOURS), "gloo")
        world = Group(everyone, launch.rank, dist.group.WORLD, "world", activity)
        here = layout.coordinates(launch.rank)
        more = dict(control=control, embedding=embedding, activity=activity, store=own)
        return cls(layout, here, device, world, **axes, **more)

    def destroy(self) -> None:
        """Leave all groups. The context is of no use afterwards."""
        if self.world.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def tell_torchrun(error: Exception) -> None:
    """That this rank is the root cause: else it names the first that ended."""
    get_error_handler().record_exception(error)
