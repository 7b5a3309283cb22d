"""ParallelContext: this process's groups, place and device. Passed to whoever needs it; nothing is
global."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megalite.parallel.activity import Activity
from megalite.parallel.collectives import Group
from megalite.parallel.launch import LaunchInfo
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rendezvous import meet
from megalite.system.errors import ReportedError

PATIENCE_HOURS = 2
"""Ranks that wait for the slowest disk wait longer than a collective may take: a checkpoint must
not time out."""


class DeviceError(ReportedError, ValueError):
    """A device or backend that this machine does not have: says what it has."""


def choose_device(wanted: str, launch: LaunchInfo) -> tuple[torch.device, str]:
    """(device, reason). "auto" takes a GPU when this node has one for each local rank, else the
    CPU.

    Raises DeviceError when "cuda" is asked for and cannot be had.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu":
        return torch.device("cpu"), "as --device cpu says"
    enough = gpus >= launch.local_world_size
    found = f"{gpus} GPU(s) on this node for {launch.local_world_size} local rank(s)"
    if wanted == "cuda" and not enough:
        remedy = "start fewer ranks per node, or use --device cpu"
        raise DeviceError(f"--device cuda: {found}; {remedy}")
    if enough:
        return torch.device("cuda", launch.local_rank), found
    return torch.device("cpu"), found


NEEDED_GROUPS = (("tensor",), ("data",), ("pipeline",))
"""The sets of axes that every run communicates over. Only their groups are made, and what
`ParallelContext.create` is asked for beside them: a group costs memory, connections and, on GPUs, a
communicator."""


class _GroupFactory:
    """Makes the groups of one rank while all ranks make theirs, in the same order."""

    def __init__(self, layout: ParallelLayout, rank: int, device: torch.device, timeout: timedelta):
        self.rank = rank
        self.timeout = timeout
        self.activity = Activity()
        everyone = range(layout.world_size)
        self.world = Group(everyone, rank, dist.group.WORLD, "world", self.activity)
        # With gloo a rank takes part in its own groups only, so the time does not grow with the
        # world. NCCL splits the world's communicator, and every rank must take part in every split.
        self._members_only = device.type == "cpu"
        self._handles = {tuple(everyone): dist.group.WORLD}

    def make(
        self, name: str, own: Sequence[int] | None, of_all: Callable[[], Sequence[Sequence[int]]]
    ) -> Group | None:
        """The group of the ranks `own`, which this rank belongs to; None for None. Collective over
        the world.

        of_all: the groups of this kind of all ranks. Groups of the same ranks share one of torch's,
        as where one axis spans the world.
        """
        mine = [] if own is None else [own]
        for ranks in mine if self._members_only else of_all():
            if tuple(ranks) not in self._handles:
                self._handles[tuple(ranks)] = self._new(ranks, name, self.timeout)
        if own is None:
            return None
        return Group(own, own.index(self.rank), self._handles[tuple(own)], name, self.activity)

    def make_along(
        self, layout: ParallelLayout, sets: Sequence[tuple[str, ...]]
    ) -> dict[tuple[str, ...], Group]:
        """The groups along sets of axes, by their axes of more than one rank. Collective over the
        world."""
        groups = {}
        for axes in map(layout.canonical, sets):
            if axes:
                own = layout.group_of(self.rank, *axes)
                groups[axes] = self.make(" x ".join(axes), own, partial(layout.groups, *axes))
        return groups

    def make_patient(self, name: str, activity: Activity) -> Group:
        """A group of all ranks for small objects: on gloo, and with a timeout for the slowest of
        disks."""
        handle = self._new(self.world.ranks, name, timedelta(hours=PATIENCE_HOURS), "gloo")
        return replace(self.world, handle=handle, name=name, activity=activity, untimed=True)

    def make_alone(self) -> dist.ProcessGroup:
        """torch's group of this rank only. Collective over the world."""
        return self.make("alone", (self.rank,), lambda: [(r,) for r in self.world.ranks]).handle

    def _new(
        self, ranks: Sequence[int], name: str, timeout: timedelta, backend: str | None = None
    ) -> dist.ProcessGroup:
        local = self._members_only
        return dist.new_group(
            list(ranks), timeout, backend, use_local_synchronization=local, group_desc=name
        )


@dataclass(frozen=True, eq=False)
class ParallelContext:
    """This rank's position, groups and device. Make one with `single` or `create`."""

    layout: ParallelLayout
    device: torch.device
    world: Group
    control: Group
    """All ranks, for small objects and for waiting on each other's files: on gloo, with a long
    timeout."""
    saving: Group | None = None
    """All ranks, as `control`, for a thread that saves while the rank trains; None where no thread
    does. Its calls are recorded in an activity of its own."""
    groups: Mapping[tuple[str, ...], Group] = field(default_factory=dict)
    """The groups of more than one rank, by the axes they span; `group` looks them up."""
    alone: dist.ProcessGroup | None = None
    """torch's group of this rank only, where a library needs one."""
    embedding: Group | None = None
    """The ranks of the first and the last stage of this pipeline, on those two only; None
    elsewhere, and where one rank holds both stages."""
    activity: Activity = field(default_factory=Activity)
    """What this rank is doing: all its groups record their calls there."""
    store: Any = field(default_factory=dist.HashStore)
    """torch's key-value store that all ranks share, for what must work while collectives do not."""

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> "ParallelContext":
        """A context of one rank, without any process group."""
        alone = Group((0,), 0)
        return cls(
            layout=ParallelLayout(),
            device=torch.device(device),
            world=alone,
            control=alone,
            saving=Group((0,), 0),
        )

    @classmethod
    def create(
        cls,
        layout: ParallelLayout,
        launch: LaunchInfo,
        device: str | torch.device = "cpu",
        backend: str = "gloo",
        timeout_minutes: float = 10.0,
        store: Any = None,
        more_groups: Sequence[tuple[str, ...]] = (),
        groups_of_one: bool = False,
        saves_in_thread: bool = False,
        ends_apart: bool = True,
    ) -> "ParallelContext":
        """Meet the other ranks and make the groups. Collective over the world; every rank passes
        the same layout.

        store: what `meet` returned, if it was called before. more_groups: sets of axes beside
        NEEDED_GROUPS. groups_of_one: whether a library needs torch's groups also where one rank is
        alone: `alone`, and the default group of a world of one rank. saves_in_thread: whether a
        thread saves, and needs the group `saving`. ends_apart: whether different ranks of a
        pipeline hold its first and its last stage, and need the group `embedding`. Raises
        ValueError when the layout's world size is not the launcher's, RendezvousError when ranks do
        not meet.
        """
        if layout.world_size != launch.world_size:
            raise ValueError(
                f"layout {layout} has {layout.world_size} ranks; "
                f"the launcher started {launch.world_size}"
            )
        device = torch.device(device)
        if layout.world_size == 1:
            return cls._of_one_rank(device, backend) if groups_of_one else cls.single(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)

        timeout = timedelta(minutes=timeout_minutes)
        if store is None:
            store = meet(launch, timeout)
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            # NCCL then connects every group now: the first use of a pipeline's group, where only
            # some ranks have something to send, would be too late.
            device_id=device if device.type == "cuda" else None,
        )
        factory = _GroupFactory(layout, launch.rank, device, timeout)
        groups = factory.make_along(layout, (*NEEDED_GROUPS, *more_groups))
        control = factory.make_patient("control", factory.activity)
        saving = factory.make_patient("saving", Activity()) if saves_in_thread else None
        alone = factory.make_alone() if groups_of_one else None
        # Last, since only some ranks have one: torch names groups by how many a rank has made
        # before.
        own = layout.embedding_group(launch.rank) if ends_apart else None
        of_all = layout.embedding_groups if ends_apart else list
        embedding = factory.make("embedding", own, of_all)
        return cls(
            layout=layout,
            device=device,
            world=factory.world,
            control=control,
            saving=saving,
            groups=groups,
            alone=alone,
            embedding=embedding,
            activity=factory.activity,
            store=dist.PrefixStore("megalite", store),
        )

    @classmethod
    def _of_one_rank(cls, device: torch.device, backend: str) -> "ParallelContext":
        """A context of one rank in a world of one, with torch's default group."""
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        handle = dist.group.WORLD
        alone = Group((0,), 0, handle)
        return cls(
            ParallelLayout(),
            device,
            world=alone,
            control=alone,
            saving=Group((0,), 0),
            alone=handle,
        )

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.world.ranks[self.world.rank]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.world.size

    @property
    def host(self) -> str:
        """Name of the machine."""
        return os.uname().nodename

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's position along every axis."""
        return self.layout.coordinates(self.rank)

    @property
    def shard_coordinates(self) -> dict[str, int]:
        """Coordinates of what data ranks hold different shards of: of the first of them, since they
        have one copy together."""
        return self.coordinates | {"data": 0}

    def group(self, *axes: str) -> Group:
        """The ranks that differ from this one along these axes only.

        Raises ValueError for an unknown axis, and for a set of axes that is not among
        NEEDED_GROUPS.
        """
        spanned = self.layout.canonical(axes)
        if not spanned:
            return Group((self.rank,), 0)
        if spanned not in self.groups:
            names = " x ".join(spanned)
            raise ValueError(f"no group over {names} was made: add it to context.NEEDED_GROUPS")
        return self.groups[spanned]

    @cached_property
    def tensor(self) -> Group:
        """The ranks that share each layer's weights with this one."""
        return self.group("tensor")

    @cached_property
    def data(self) -> Group:
        """The ranks that hold the same weights and train on other samples."""
        return self.group("data")

    @cached_property
    def pipeline(self) -> Group:
        """The ranks that hold the other layers of this replica."""
        return self.group("pipeline")

    def destroy(self) -> None:
        """Leave all groups. The context is of no use afterwards."""
        if self.world.handle is not None and dist.is_initialized():
            dist.destroy_process_group()


def tell_torchrun(error: Exception) -> None:
    """That this rank is the root cause: else it names the first that ended."""
    get_error_handler().record_exception(error)
