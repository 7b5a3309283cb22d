"""Submit a training to SLURM: check its configuration, copy configuration and code, call sbatch.

    python tools/submit.py --config examples/slurm/recipes/gpt-7b.yaml --nodes 4 \\
        --run-dir /shared/runs/7b --cluster my-cluster.yaml --lr 2e-4

Flags that are not listed here are those of pretrain_gpt.py (or pretrain_bert.py) and override the
recipe, the file of --config. The same command, with fewer or more nodes if need be, resumes from
the run's last checkpoint.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from megalite.checkpoint.folder import CONFIG_FILE
from megalite.config import cli, validate
from megalite.config.flags import read_flags, read_own_flags
from megalite.config.options import options_of
from megalite.config.problem import ConfigError, Problem
from megalite.config.run import RunConfig, options, with_values
from megalite.config.yaml_file import read_yaml, to_yaml
from megalite.fields import Field
from megalite.programs.reporting import failures_reported
from megalite.system.errors import ReportedError, error_message

PACKAGE = Path(__file__).resolve().parents[1]
SCRIPT = """from megalite.programs.start import start

if __name__ == "__main__":
    start("{name}")
"""
"""The program in a copy of the code: a script beside the package."""
WORD = r"[A-Za-z0-9_.,:=@%+*/\[\]-]+"
"""Characters allowed in an option of sbatch: nothing that a shell or a line of #SBATCH would split
or expand."""
SET_HERE = """array chdir cpus-per-task error export export-file gpus-per-node help job-name nodes
no-requeue ntasks open-mode output requeue signal tasks-per-node test-only time usage version
wrap""".split()
"""Options of sbatch that the job script sets, under any of their names, or that would break it."""
LONGEST_WARNING = 65535
"""Seconds before the time limit at which sbatch can ask for a signal, at most."""
TORCHRUN = 'exec {python} -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'


@dataclass(frozen=True)
class JobConfig:
    """Where a training runs, and for how long."""

    run_dir: str
    """Folder of the run, on a disk that all nodes share. It holds checkpoints, metrics, logs, and a
    copy of code and configuration for each submission."""
    nodes: Annotated[int, Field(minimum=1)]
    """Nodes of the job."""
    gpus_per_node: Annotated[int, Field(minimum=0)] = 8
    """GPUs to ask for on each node; 0: none are asked for."""
    ranks_per_node: int | None = None
    """Ranks on each node. Unset: one for each GPU."""
    cpus_per_rank: Annotated[int | None, Field(minimum=1)] = 4
    """CPU cores for each rank. Unset: what SLURM gives, often a single one for a task."""
    time: str = "24:00:00"
    """Time limit, as SLURM writes it."""
    save_before_end: Annotated[int, Field(minimum=1, maximum=LONGEST_WARNING)] = 300
    """Seconds before the time limit at which the run saves; the job then requeues itself."""
    name: str = "pretrain"
    """Name of the job."""
    partition: str | None = None
    """Partition of the cluster."""
    account: str | None = None
    """Account to charge."""
    options: tuple[str, ...] = ()
    """Further options of sbatch: --options='--constraint=a100 --exclusive'."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """srun: a task for each rank. torchrun: one for each node."""
    program: Literal["pretrain_gpt.py", "pretrain_bert.py"] = "pretrain_gpt.py"
    """The main program."""
    python: str = sys.executable
    """Interpreter on the nodes."""
    cluster: str | None = None
    """YAML file of flags listed here, for those that all your jobs share: partition, account,
    gpus_per_node..."""
    dry_run: bool = False
    """Print the script; write and submit nothing."""

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def run(self) -> Path:
        """The folder of the run, absolute."""
        return Path(self.run_dir).absolute()

    @property
    def paths(self) -> dict[str, str]:
        """Paths that the training reads and writes, by configuration field."""
        checkpoints = str(self.run / "checkpoints")
        metrics = str(self.run / "metrics.jsonl")
        return {"save": checkpoints, "load": checkpoints, "metrics_file": metrics}


class SubmitError(ReportedError):
    """sbatch refused the job; the message says why."""


def sbatch_options(job: JobConfig) -> list[str]:
    """All options of sbatch: those of the job's fields, then the user's."""
    own = [f"--{key}={value}" for key, value in _own_options(job).items()]
    return [*own, "--requeue", *" ".join(job.options).split()]


def _own_options(job: JobConfig) -> dict[str, Any]:
    tasks = job.ranks
    cpus = job.cpus_per_rank
    if job.launcher == "torchrun":
        tasks = 1
        cpus = cpus and cpus * job.ranks
    wanted = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cpus,
        "time": job.time,
        "gpus-per-node": job.gpus_per_node or None,
        "signal": f"B:USR1@{job.save_before_end}",
        "open-mode": "append",
        "partition": job.partition,
        "account": job.account,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def problems_of(job: JobConfig) -> list[Problem]:
    """All problems of the job itself, beside single numbers out of range."""
    problems = []
    if job.ranks < 1:
        message = f"--ranks-per-node {job.ranks} must be at least 1"
        problems.append(Problem(message, "--ranks-per-node 1"))
    # The time.
    limit = seconds(job.time)
    if limit is None and job.time:
        fix = "hours:minutes:seconds, or days-hours"
        problems.append(Problem(f"--time {job.time!r} is no time limit", fix))
    elif limit is not None and job.save_before_end >= limit:
        warning = f"--save-before-end {job.save_before_end}"
        message = f"{warning} is not less than the {limit} seconds of --time {job.time}"
        problems.append(Problem(message, "a longer --time, or a smaller --save-before-end"))
    # The options.
    own = _own_options(job)
    for key, value in own.items():
        if value != "" and not re.fullmatch(WORD, str(value)):
            message = f"{f'--{key}={value}'!r} is no option for sbatch"
            problems.append(Problem(message, "one word, without spaces"))
    for option in " ".join(job.options).split():
        name = option.partition("=")[0].removeprefix("--")
        # sbatch accepts any unambiguous prefix of an option's name.
        taken = any(other.startswith(name) for other in (*SET_HERE, *own))
        if not re.fullmatch(f"--{WORD}", option):
            message = f"--options: {option!r} is not accepted here"
            problems.append(Problem(message, "--NAME=VALUE, or --NAME"))
        elif taken or name.startswith("ntasks"):
            message = f"--options: {option} would override what is set here"
            problems.append(Problem(message, "leave it out, or see --help"))
    # The folder.
    if "\n" in job.run_dir or "%" in job.run_dir:
        message = f"--run-dir {job.run_dir!r} cannot be a folder for SLURM's logs"
        problems.append(Problem(message, "a name without % and line breaks"))
    return problems


def seconds(limit: str) -> float | None:
    """The seconds of a time limit in SLURM's notation; None if it is not one."""
    if limit.lower() in ("unlimited", "infinite"):
        return math.inf
    days, dash, clock = limit.rpartition("-")
    fields = clock.split(":")
    numbers = [days, *fields] if dash else fields
    if len(fields) > 3 or not all(number.isdecimal() for number in numbers):
        return None
    # With days, the first field is hours; of one or two fields without days, it is minutes.
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    total = int(days or 0) * 86400
    for field, unit in zip(fields, units):
        total += int(field) * unit
    return total


def script(job: JobConfig, snapshot: Path) -> str:
    """The text of the sbatch file. Every path and argument in it is quoted."""
    code = snapshot / "code"
    supervise = shlex.quote(str(code / "megalite/programs/supervise.sh"))
    program = shlex.quote(str(code / job.program))
    config = shlex.quote(str(snapshot / CONFIG_FILE))
    paths = []
    for key, path in job.paths.items():
        paths += [f"--{key.replace('_', '-')}", shlex.quote(path)]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in sbatch_options(job)),
        # Relative paths of the configuration were checked from this folder.
        f"cd {shlex.quote(os.getcwd())} || exit",
        f"source {supervise}",
        *_launch_lines(job),
        f"    {program} --config {config} \\",
        f"    {' '.join(paths)}",
    ]
    return "\n".join(lines) + "\n"


def _launch_lines(job: JobConfig) -> list[str]:
    """The lines of the script that start Python on every rank, each to be continued by the next."""
    save = shlex.quote(job.paths["save"])
    python = shlex.quote(job.python)
    step = f"supervise {save} srun --kill-on-bad-exit=1"
    if job.launcher == "srun":
        return [f"{step} {python} \\"]
    return [
        'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "port=$((10000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 20000))",
        "# shellcheck disable=SC2016  # each node's own shell expands its SLURM_NODEID",
        f"{step} bash -c {shlex.quote(TORCHRUN.format(python=python))} torchrun \\",
        f'    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={job.ranks} \\',
        """    --master-addr="${hosts%%$'\\n'*}" --master-port="$port" \\""",
        "    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \\",
        f"    --shutdown-timeout={job.save_before_end} \\",
    ]


def snapshot_folder(job: JobConfig) -> Path:
    """The folder for code and configuration of this submission: submitted-N with the next free
    number."""
    names = " ".join(path.name for path in job.run.glob("submitted-*"))
    numbers = re.findall(r"(?<!\S)submitted-([0-9]+)(?!\S)", names)
    return job.run / f"submitted-{max(map(int, numbers), default=0) + 1}"


def keep(job: JobConfig, config: RunConfig, snapshot: Path) -> Path:
    """Copy code and configuration into the snapshot; returns the path of the sbatch file."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PACKAGE, snapshot / "code/megalite", ignore=unwanted)
    program = SCRIPT.format(name=job.program.removesuffix(".py"))
    (snapshot / "code" / job.program).write_text(program)
    (snapshot / CONFIG_FILE).write_text(to_yaml(config))
    file = snapshot / "job.sbatch"
    file.write_text(script(job, snapshot))
    return file


def submit(job: JobConfig, file: Path) -> str:
    """Pass the script to sbatch; returns the number of the job. Raises SubmitError."""
    log = f"--output={job.run}/job-%j.out"
    command = ["sbatch", "--parsable", log, str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        message = f"sbatch cannot be run: {error.strerror}; {file} is ready for it"
        raise SubmitError(message) from None
    if done.returncode:
        raise SubmitError(f"sbatch refused {file}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def read(argv: list[str]) -> tuple[JobConfig, RunConfig]:
    """The job and the configuration of the training. Raises ConfigError with all problems of
    both."""
    # Flags of both kinds, and the file of the cluster, which flags override.
    known = options_of(JobConfig)
    others = [*options().values(), *options_of(cli.ConfigFile).values()]
    cluster = read_flags(argv, [*others, *known.values()])[0].get("cluster")
    given, problems = ({}, []) if cluster is None else read_cluster(cluster)
    job_values, flags, found = read_own_flags(JobConfig, argv, others, given=given)
    recipe = flags.pop("config", None)
    # The job, with examples for required flags that are missing, so that the rest can be checked.
    for key in ("run_dir", "nodes"):
        job_values.setdefault(key, known[key].from_words([known[key].example]))
    job = JobConfig(**job_values)
    problems += found + problems_of(job)
    # The configuration of the training, which must leave to the job what follows from it.
    values = flags if recipe is None else read_yaml(recipe)[0] | flags
    keys = [key for key in (*job.paths, "world_size") if values.get(key) is not None]
    if keys:
        owned = ", ".join(options()[key].flag for key in keys)
        message = f"{owned}: follows from --run-dir and --nodes"
        problems.append(Problem(message, "leave it out"))
    architecture = job.program.removeprefix("pretrain_").removesuffix(".py")
    config = cli.build_config(recipe, flags, problems, architecture)
    problems = validate.check(with_values(config, job.paths), job.nodes * job.ranks)
    if problems:
        raise ConfigError(problems)
    return job, config


def read_cluster(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems) of a --cluster file, whose values are read as flags are."""
    try:
        # Values stay text: YAML would convert 24:00:00 and 0123 to other numbers.
        written = yaml.load(Path(path).read_text(), yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"--cluster {path}: {error_message(error)}"
        return {}, [Problem(message, "a YAML file of flags of this program")]
    if not isinstance(written, dict):
        fix = "write one `name: value` a line"
        return {}, [Problem(f"--cluster {path} holds no names and values", fix)]
    known = options_of(JobConfig)
    del known["cluster"], known["dry_run"]
    words = []
    for name, value in written.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        words.append(f"--{name}={text}")
    values, problems = read_flags(words, known.values())
    return values, [replace(p, message=f"--cluster {path}: {p.message}") for p in problems]


def main() -> None:
    """Exit status 0, 1 when SLURM or the disk refuse, 2 when the job or its configuration are at
    fault."""
    groups = {"options": JobConfig, "configuration": cli.ConfigFile}
    cli.show_help(sys.argv, __doc__, groups)
    try:
        job, config = read(sys.argv[1:])
    except ConfigError as error:
        cli.refuse(error.problems)
    snapshot = snapshot_folder(job)
    if job.dry_run:
        print(script(job, snapshot), end="")
        return
    with failures_reported():
        number = submit(job, keep(job, config, snapshot))
    run = shlex.quote(str(job.run))
    file = shlex.quote(str(snapshot / "job.sbatch"))
    print(
        f"job {number}: {job.nodes} node(s) x {job.ranks} ranks; "
        f"code and configuration in {snapshot}\n"
        f"  watch:   tail -F {run}/job-{number}.out        squeue --job {number}\n"
        f"  stop:    scancel {number}                      "
        "(ranks save first, within the KillWait of SLURM)\n"
        f"           scancel --signal=TERM {number}        (save first, however long it takes)\n"
        f"  resume:  sbatch --output={run}/job-%j.out {file}"
    )
