"""Submit a training to SLURM: check the configuration for the nodes asked for, keep it and the code, then sbatch.

    python tools/submit.py --config examples/slurm/recipes/gpt-7b.yaml --nodes 4 --run-dir /shared/runs/7b \\
        --cluster my-cluster.yaml --lr 2e-4

Flags that are not listed here are those of pretrain_gpt.py (or pretrain_bert.py) and win over the recipe, the file of
--config. The same command, with fewer or more nodes if need be, goes on from the run's last checkpoint.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from megalite.config import cli, validate
from megalite.config.run import (
    ConfigError,
    Problem,
    RunConfig,
    example,
    options_of,
    to_yaml,
    with_values,
)

PACKAGE = Path(__file__).resolve().parents[1]
SCRIPT = """from megalite.programs.start import start

if __name__ == "__main__":
    start("{name}")
"""
"""The program of a snapshot, which stands beside its copy of the package."""
WORD = r"[A-Za-z0-9_.,:=@%+*/\[\]-]+"
"""What an option of sbatch may consist of: nothing that a shell or a line of #SBATCH takes for more than a word."""
SET_HERE = """array chdir cpus-per-task error export export-file gpus-per-node help job-name nodes no-requeue ntasks
open-mode output requeue signal tasks-per-node test-only time usage version wrap""".split()
"""Options of sbatch that the script sets, under any of their names, or that would make another job of it."""
LONGEST_WARNING = 65535
"""Seconds before the time limit at which sbatch can ask for a signal, at most."""
TORCHRUN = 'exec {python} -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'


@dataclass(frozen=True)
class JobConfig:
    """Where a training runs, and for how long."""

    run_dir: str
    """Folder of the run, on a disk that all nodes share: checkpoints, metrics, logs, and a copy of code and
    configuration for each submission."""
    nodes: int
    """Nodes of the job."""
    gpus_per_node: int = 8
    """GPUs to ask for on each node; 0: none are asked for."""
    ranks_per_node: int | None = None
    """Ranks on each node. Unset: one for each GPU."""
    cpus_per_rank: int | None = 4
    """CPU cores for each rank. Unset: what SLURM gives, often a single one for a task."""
    time: str = "24:00:00"
    """Time limit, as SLURM writes it."""
    save_before_end: int = 300
    """Seconds before the time limit at which the run is told to save; the job then requeues itself."""
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
    """YAML file of flags listed here, for what is the same in all your jobs: partition, account, gpus_per_node..."""
    dry_run: bool = False
    """Print the script; write and submit nothing."""

    @property
    def ranks(self) -> int:
        """On each node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def run(self) -> Path:
        """The folder of the run, absolute."""
        return Path(self.run_dir).absolute()

    @property
    def places(self) -> dict[str, str]:
        """Where the training reads and writes, by flag."""
        checkpoints = str(self.run / "checkpoints")
        return {
            "save": checkpoints,
            "load": checkpoints,
            "metrics_file": str(self.run / "metrics.jsonl"),
        }


class SubmitError(RuntimeError):
    """sbatch, or the disk, refused; the message says why."""


def sbatch_options(job: JobConfig) -> list[str]:
    """The options of sbatch."""
    return [
        *(f"--{key}={value}" for key, value in _own_options(job).items()),
        "--requeue",
        *_further_options(job),
    ]


def _own_options(job: JobConfig) -> dict[str, Any]:
    tasks, ranks_per_task = (job.ranks, 1) if job.launcher == "srun" else (1, job.ranks)
    cpus = job.cpus_per_rank and job.cpus_per_rank * ranks_per_task
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


def _further_options(job: JobConfig) -> list[str]:
    return [word for option in job.options for word in option.split()]


def problems_of(job: JobConfig) -> list[Problem]:
    """What is wrong with the job itself."""
    numbers = {"--ranks-per-node": job.ranks} | {
        f"--{name.replace('_', '-')}": getattr(job, name)
        for name in ("nodes", "save_before_end", "cpus_per_rank")
    }
    problems = [
        Problem(f"{flag} {value} must be at least 1", f"{flag} 1")
        for flag, value in numbers.items()
        if value is not None and value < 1
    ]
    if job.gpus_per_node < 0:
        problems.append(
            Problem(f"--gpus-per-node {job.gpus_per_node} must be at least 0", "--gpus-per-node 0")
        )
    if job.save_before_end > LONGEST_WARNING:
        message = (
            f"--save-before-end {job.save_before_end} is more than SLURM takes, {LONGEST_WARNING}"
        )
        problems.append(Problem(message, f"--save-before-end {LONGEST_WARNING}"))
    limit = seconds(job.time)
    if limit is None:
        problems.append(
            Problem(f"--time {job.time!r} is no time limit", "hours:minutes:seconds, or days-hours")
        )
    elif job.save_before_end >= limit:
        message = f"--save-before-end {job.save_before_end} is not less than the {limit} seconds of --time {job.time}"
        problems.append(Problem(message, "a longer --time, or a smaller --save-before-end"))
    for key, value in _own_options(job).items():
        if not re.fullmatch(WORD, str(value)):
            problems.append(
                Problem(
                    f"{f'--{key}={value}'!r} is no option for sbatch", "one word, without spaces"
                )
            )
    for option in _further_options(job):
        name = option.partition("=")[0].removeprefix("--")
        if not re.fullmatch(f"--{WORD}", option):
            problems.append(
                Problem(f"--options: {option!r} is none here", "--NAME=VALUE, or --NAME")
            )
        # sbatch takes any unambiguous beginning of an option for the whole.
        elif name.startswith("ntasks") or any(
            taken.startswith(name) for taken in (*SET_HERE, *_own_options(job))
        ):
            problems.append(
                Problem(
                    f"--options: {option} would undo what is set here",
                    "leave it out, or see --help",
                )
            )
    # An empty one, of a variable that is not set, would be the folder where one stands.
    if not job.run_dir or "\n" in job.run_dir or "%" in job.run_dir:
        message = f"--run-dir {job.run_dir!r} cannot be a folder for SLURM's logs"
        problems.append(Problem(message, "a name without % and line breaks"))
    return problems


def seconds(limit: str) -> float | None:
    """A time limit as SLURM writes it; None: it is none."""
    if limit.lower() in ("unlimited", "infinite"):
        return math.inf
    days, dash, clock = limit.rpartition("-")
    parts = clock.split(":")
    if len(parts) > 3 or not all(part.isdecimal() for part in ([days, *parts] if dash else parts)):
        return None
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units))


def script(job: JobConfig, snapshot: Path) -> str:
    """The text of the sbatch file. Every path and argument in it is quoted."""
    code = snapshot / "code"
    supervise, program, config, save = (
        shlex.quote(str(path))
        for path in (
            code / "megalite/programs/supervise.sh",
            code / job.program,
            snapshot / "config.yaml",
            job.places["save"],
        )
    )
    places = " ".join(
        f"--{key.replace('_', '-')} {shlex.quote(value)}" for key, value in job.places.items()
    )
    python, step = shlex.quote(job.python), f"supervise {save} srun --kill-on-bad-exit=1"
    if job.launcher == "srun":
        launch = [f"{step} {python} \\"]
    else:
        launch = [
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "port=$((10000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 20000))",
            "# shellcheck disable=SC2016  # each node's own shell puts its SLURM_NODEID in",
            f"{step} bash -c {shlex.quote(TORCHRUN.format(python=python))} torchrun \\",
            f'    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={job.ranks} \\',
            """    --master-addr="${hosts%%$'\\n'*}" --master-port="$port" \\""",
            "    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \\",
            f"    --shutdown-timeout={job.save_before_end} \\",
        ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in sbatch_options(job)),
        # Relative paths of the configuration were checked here, wherever the script is submitted again.
        f"cd {shlex.quote(os.getcwd())} || exit",
        f"source {supervise}",
        *launch,
        f"    {program} --config {config} \\",
        f"    {places}",
    ]
    return "\n".join(lines) + "\n"


def snapshot_folder(job: JobConfig) -> Path:
    """Where this submission keeps its code and configuration: the next free number."""
    numbers = [
        re.fullmatch(r"submitted-([0-9]+)", path.name) for path in job.run.glob("submitted-*")
    ]
    return (
        job.run
        / f"submitted-{max((int(number[1]) for number in numbers if number), default=0) + 1}"
    )


def keep(job: JobConfig, config: RunConfig, snapshot: Path) -> Path:
    """Copy code and configuration into the snapshot; returns the path of the sbatch file."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PACKAGE, snapshot / "code/megalite", ignore=unwanted)
    program = SCRIPT.format(name=job.program.removesuffix(".py"))
    (snapshot / "code" / job.program).write_text(program)
    (snapshot / "config.yaml").write_text(to_yaml(config))
    file = snapshot / "job.sbatch"
    file.write_text(script(job, snapshot))
    return file


def submit(job: JobConfig, file: Path) -> str:
    """Hand the script to sbatch; returns the number of the job. Raises SubmitError."""
    log = f"--output={job.run}/job-%j.out"
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", log, str(file)], capture_output=True, text=True
        )
    except OSError as error:
        raise SubmitError(
            f"sbatch cannot be run: {error.strerror}; {file} is ready for it"
        ) from None
    if done.returncode:
        raise SubmitError(f"sbatch refused {file}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def read(argv: list[str]) -> tuple[JobConfig, RunConfig]:
    """The job and the configuration of the training. Raises ConfigError with all problems of both."""
    known = options_of(JobConfig)
    recipe, flags, problems = cli.read_flags(argv, known.values())
    asked = {key: flags.pop(key) for key in known if key in flags}
    if asked.get("cluster") is not None:
        values, found = read_cluster(asked["cluster"])
        asked, problems = values | asked, [*found, *problems]
    missing = {key: example(known[key]) for key in ("run_dir", "nodes") if key not in asked}
    said = {key for problem in problems for key in problem.flags}  # that a value is none is enough
    for key, value in missing.items():
        if key not in said:
            problems.append(Problem(f"{known[key].flag} is missing", f"{known[key].flag} {value}"))
    job = JobConfig(
        **{key: known[key].from_words([value]) for key, value in missing.items()} | asked
    )
    problems += problems_of(job)
    values = (cli.read_yaml(recipe)[0] if recipe is not None else {}) | flags
    owned = ", ".join(
        "--" + key.replace("_", "-")
        for key in (*job.places, "world_size")
        if values.get(key) is not None
    )
    if owned:
        problems.append(Problem(f"{owned}: follows from --run-dir and --nodes", "leave it out"))
    config = cli.build(
        recipe, flags, problems, job.program.removeprefix("pretrain_").removesuffix(".py")
    )
    problems = validate.check(with_values(config, job.places), job.nodes * job.ranks)
    if problems:
        raise ConfigError(problems)
    return job, config


def read_cluster(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems) of a --cluster file, whose values are read as flags are."""
    import yaml

    try:
        # Text as it stands: YAML would make numbers of 24:00:00 and of 0123.
        written = yaml.load(Path(path).read_text(), yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [Problem(f"--cluster {path}: {error}", "a YAML file of flags of this program")]
    if not isinstance(written, dict):
        return {}, [
            Problem(f"--cluster {path} holds no names and values", "write one `name: value` a line")
        ]
    known = {
        key: option
        for key, option in options_of(JobConfig).items()
        if key not in ("cluster", "dry_run")
    }
    values, problems = {}, []
    for name, value in written.items():
        option, words = (
            known.get(name.replace("-", "_")),
            value if isinstance(value, list) else [value],
        )
        if option is None:
            problems.append(
                Problem(f"--cluster {path}: unknown {name}", f"names are {', '.join(known)}")
            )
            continue
        try:
            if not all(isinstance(word, str) for word in words) or (
                len(words) != 1 and option.kind is not tuple
            ):
                raise ValueError
            values[option.key] = option.from_words(words)
        except ValueError:
            message = f"--cluster {path}: {name}: {value!r} is not {option.expected.replace('null', 'unset')}"
            problems.append(Problem(message, f"for example {name}: {example(option)}"))
    return values, problems


def main() -> int:
    """Exit status 0, 1 when SLURM or the disk refuse, 2 when the job or its configuration are at fault."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        tyro.cli(JobConfig, description=__doc__, args=["--help"])
    try:
        job, config = read(sys.argv[1:])
    except ConfigError as error:
        cli.refuse(error.problems)
    snapshot = snapshot_folder(job)
    if job.dry_run:
        print(script(job, snapshot), end="")
        return 0
    try:
        number = submit(job, keep(job, config, snapshot))
    except (SubmitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run = shlex.quote(str(job.run))
    print(
        f"job {number}: {job.nodes} node(s) x {job.ranks} ranks; code and configuration in {snapshot}"
    )
    print(f"  watch:   tail -F {run}/job-{number}.out        squeue --job {number}")
    print(
        f"  stop:    scancel {number}                      (ranks save first, within the KillWait of SLURM)"
    )
    print(f"           scancel --signal=TERM {number}        (save first, however long it takes)")
    print(
        f"  resume:  sbatch --output={run}/job-%j.out {shlex.quote(str(snapshot / 'job.sbatch'))}"
    )
    return 0
