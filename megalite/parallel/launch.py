"""Who am I: rank and rendezvous from torchrun, from plain `srun`, or from nothing at all. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchInfo:
    """What a launcher tells a process about itself and how to meet the others."""

    rank: int
    world_size: int
    local_rank: int
    """Index among the ranks of this node."""
    local_world_size: int
    init_method: str
    """Where the ranks meet, as torch.distributed takes it: env://, tcp://host:port or file:///path."""
    source: str
    """The launcher this was read from: torchrun, srun, or none."""
    incarnation: str = ""
    """What tells this start from others that may meet at the same place: job, step and restart of SLURM."""


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: `gpu[003-006,9],login` gives gpu003, `rack[1-2]n[5,7]` gives rack1n5.

    Raises ValueError for what is no node list.
    """
    first = re.match(r"(?:[^\[\],\s]|\[\d[\d,-]*\])+(?=,|$)", nodelist.strip())
    if not first:
        raise ValueError(
            f"cannot read the SLURM node list {nodelist!r}: expected a form such as node[01-04,7]"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks on a step's node number `node`, from SLURM_STEP_TASKS_PER_NODE: node 2 of `4(x2),2` has 2.

    Raises ValueError when the list is not of this form or has no such node.
    """
    place = node
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ValueError(
                f"cannot read SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r}: expected a form like 4(x2),2"
            )
        tasks, nodes = int(match[1]), int(match[2] or 1)
        if place < nodes:
            return tasks
        place -= nodes
    raise ValueError(
        f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} has no node number {node} (SLURM_NODEID)"
    )


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"the launcher set {name}={value!r}; a whole number is needed") from None


def detect(environ: Mapping[str, str]) -> LaunchInfo:
    """Read the launcher's variables. torchrun's come before SLURM's, since torchrun may run inside a SLURM job.

    Raises ValueError when a launcher's variables are incomplete, naming the one that is missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        rank, world = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
        local_rank = _integer(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else rank
        local_world = (
            _integer(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else world
        )
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if world > 1 and missing:
            raise ValueError(
                f"RANK and WORLD_SIZE={world} are set, but not {' and '.join(missing)}: where ranks meet"
            )
        return LaunchInfo(rank, world, local_rank, local_world, "env://", "torchrun")
    # A shell inside an allocation (salloc, sbatch's batch step) has SLURM_JOB_ID but is no step of `srun`.
    in_step = environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ
    if in_step and environ.get("SLURM_STEP_NODELIST"):
        world = _integer(
            environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        )
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE")
        local_world = tasks_on_node(tasks, _integer(environ, "SLURM_NODEID")) if tasks else world
        host = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
        job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
        restart = (
            _integer(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
        )
        # One port for each start of a job step, since ranks of the start before may still be there; outside the range
        # that systems hand out for outgoing connections.
        port = environ.get("MASTER_PORT") or 10_000 + (31 * job + step + 7919 * restart) % 20_000
        return LaunchInfo(
            _integer(environ, "SLURM_PROCID"),
            world,
            _integer(environ, "SLURM_LOCALID"),
            local_world,
            f"tcp://{host}:{port}",
            "srun",
            f"{job}.{step}.{restart}",
        )
    return LaunchInfo(0, 1, 0, 1, "", "none")
