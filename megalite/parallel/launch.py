"""This process's rank and where ranks meet, from torchrun's or srun's variables. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

JOB_PORTS = range(10_000, 30_000)
"""Ports for jobs under srun: outside the range that systems give to outgoing connections."""
OTHERS_FIRST_SECONDS = 1.0
"""How long a rank that ends because of another waits before it exits, so that the other one can
print the reason: a launcher ends all ranks as soon as one has ended."""


@dataclass(frozen=True)
class LaunchInfo:
    """What a launcher tells a process about itself and about the other ranks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Index among the ranks of this node."""
    local_world_size: int = 1
    init_method: str = ""
    """Where the ranks meet: tcp://host:port or file:///path, as torch.distributed writes it."""
    source: str = "none"
    """The launcher this was read from: torchrun, srun, or none."""
    incarnation: str = ""
    """SLURM's job, step and restart: separates this start from others that meet at one address."""
    address_source: str = ""
    """The variables that the address comes from, for messages."""
    hosts_store: bool = True
    """Whether rank 0 serves the store that ranks meet in; else torchrun does."""


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: gpu003 for `gpu[003-006,9],login`.

    Raises ValueError when the text is not a node list.
    """
    first = re.match(r"(?:[^\[\],\s]|\[\d[\d,-]*\])+(?=,|$)", nodelist.strip())
    if not first:
        raise ValueError(
            f"cannot read the SLURM node list {nodelist!r}: expected a form such as node[01-04,7]"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks on a node of the step, from SLURM_STEP_TASKS_PER_NODE: node 2 of `4(x2),2` has 2.

    Raises ValueError when the list has another form or no such node.
    """
    nodes_left = node
    for entry in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
        if not match:
            raise ValueError(
                f"cannot read SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r}: "
                "expected a form like 4(x2),2"
            )
        nodes = int(match[2] or 1)
        if nodes_left < nodes:
            return int(match[1])
        nodes_left -= nodes
    raise ValueError(
        f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} has no node number {node} (SLURM_NODEID)"
    )


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name, default)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"the launcher set {name}={value!r}; a whole number is needed") from None


def _port(environ: Mapping[str, str]) -> int:
    port = _integer(environ, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT={port}; a port from 1 to 65535 is needed")
    return port


def detect(environ: Mapping[str, str]) -> LaunchInfo:
    """Read the launcher's variables. torchrun's win over SLURM's: torchrun may run in a SLURM job.

    Raises ValueError when a launcher's variables are incomplete, naming the one that is missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    # A shell inside an allocation (salloc, sbatch's batch step) has SLURM_JOB_ID but is no step of
    # `srun`.
    in_step = environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ
    if in_step and environ.get("SLURM_STEP_NODELIST"):
        return _from_srun(environ)
    return LaunchInfo()


def _from_torchrun(environ: Mapping[str, str]) -> LaunchInfo:
    rank = _integer(environ, "RANK")
    world = _integer(environ, "WORLD_SIZE")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if world > 1 and missing:
        raise ValueError(
            f"RANK and WORLD_SIZE={world} are set, but not {' and '.join(missing)}: "
            "where ranks meet"
        )
    address = ""
    if world > 1:
        address = f"tcp://{environ['MASTER_ADDR']}:{_port(environ)}"
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} with WORLD_SIZE={world}; ranks are 0 to {world - 1}")
    return LaunchInfo(
        rank=rank,
        world_size=world,
        local_rank=_integer(environ, "LOCAL_RANK", default=rank),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", default=world),
        init_method=address,
        source="torchrun",
        address_source="MASTER_ADDR and MASTER_PORT",
        hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def _from_srun(environ: Mapping[str, str]) -> LaunchInfo:
    # The step's own number of tasks, which older versions of SLURM leave to the job's.
    counts_tasks = "SLURM_STEP_NUM_TASKS" in environ
    world = _integer(environ, "SLURM_STEP_NUM_TASKS" if counts_tasks else "SLURM_NTASKS")
    local_world = world
    if tasks := environ.get("SLURM_STEP_TASKS_PER_NODE"):
        local_world = tasks_on_node(tasks, _integer(environ, "SLURM_NODEID"))

    # One port for each start of a job step, since ranks of an earlier start may still be there.
    job = _integer(environ, "SLURM_JOB_ID")
    step = _integer(environ, "SLURM_STEP_ID")
    restart = _integer(environ, "SLURM_RESTART_COUNT", default=0)
    host = environ.get("MASTER_ADDR")
    port = JOB_PORTS[(31 * job + step + 7919 * restart) % len(JOB_PORTS)]
    if environ.get("MASTER_PORT"):
        port = _port(environ)
    host_source = "MASTER_ADDR" if host else "SLURM_STEP_NODELIST"
    port_source = "MASTER_PORT" if environ.get("MASTER_PORT") else "SLURM_JOB_ID"
    return LaunchInfo(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=local_world,
        init_method=f"tcp://{host or first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        source="srun",
        incarnation=f"{job}.{step}.{restart}",
        address_source=f"{host_source} and {port_source}",
    )
