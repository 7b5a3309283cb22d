"""Submit a training to SLURM: check the configuration for the nodes asked for, keep it and the code, then sbatch.

    python tools/submit.py --config examples/slurm/recipes/gpt-7b.yaml --nodes 4 --run-dir /shared/runs/7b \\
        --cluster my-cluster.yaml --lr 2e-4

Flags that are not listed here are those of pretrain_gpt.py (or pretrain_bert.py) and win over the recipe. The same
command, with fewer or more nodes if need be, goes on from the run's last checkpoint. --cluster names a YAML file of
flags listed here, for what is the same in all your jobs: partition, account, gpus_per_node, options.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite import cli, validate
from megalite.config import ConfigError, Problem, RunConfig, to_yaml, with_values

ROOT = Path(__file__).resolve().parents[1]
WORD = r"[A-Za-z0-9_.,:=@%+*/\[\]-]+"
"""What an option of sbatch may consist of: nothing that a shell or a line of #SBATCH takes for more than a word."""
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
    cpus_per_rank: int | None = None
    """CPU cores for each rank. Unset: what SLURM gives."""
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
    """Further options of sbatch, such as --constraint=a100."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """srun: a task for each rank. torchrun: one for each node."""
    program: Literal["pretrain_gpt.py", "pretrain_bert.py"] = "pretrain_gpt.py"
    """The main program."""
    python: str = sys.executable
    """Interpreter on the nodes."""
    dry_run: bool = False
    """Print the script; write and submit nothing."""

    @property
    def ranks(self) -> int:
        """On each node."""
        return self.ranks_per_node or self.gpus_per_node


class SubmitError(RuntimeError):
    """sbatch, or the disk, refused; the message says why."""


def sbatch_options(job: JobConfig) -> list[str]:
    """The options of sbatch."""
    per_node = job.ranks if job.launcher == "srun" else 1
    cpus = job.cpus_per_rank and job.cpus_per_rank * (job.ranks // per_node)
    wanted = {
        "job-name": job.name, "nodes": job.nodes, "ntasks-per-node": per_node, "cpus-per-task": cpus, "time": job.time,
        "gpus-per-node": job.gpus_per_node or None, "signal": f"B:USR1@{job.save_before_end}", "open-mode": "append",
        "partition": job.partition, "account": job.account,
    }  # fmt: skip
    return [*(f"--{key}={value}" for key, value in wanted.items() if value is not None), "--requeue", *job.options]


def problems_of(job: JobConfig) -> list[Problem]:
    """What is wrong with the job itself."""
    problems = []
    for name in ("nodes", "save_before_end", "cpus_per_rank", "ranks"):
        value = getattr(job, name)
        if value is not None and value < 1:
            flag = "--" + ("ranks-per-node" if name == "ranks" else name.replace("_", "-"))
            problems.append(Problem(f"{flag} {value} must be at least 1", f"{flag} 1"))
    for option in sbatch_options(job):
        if not re.fullmatch(f"--{WORD}", option) or re.match(r"--(wrap|output|error)\b", option):
            problems.append(
                Problem(f"{option!r} is no option for sbatch here", "one word, --NAME=VALUE, without spaces")
            )
    if "\n" in job.run_dir or "%" in job.run_dir:
        problems.append(
            Problem(f"--run-dir {job.run_dir!r} cannot be a folder for SLURM's logs", "no % and no line breaks")
        )
    return problems


def script(job: JobConfig, snapshot: Path) -> str:
    """The text of the sbatch file. Every path and argument in it is quoted."""
    run = Path(job.run_dir).absolute()
    code, config, save, metrics = (
        shlex.quote(str(path))
        for path in (snapshot / "code", snapshot / "config.yaml", run / "checkpoints", run / "metrics.jsonl")
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
            "    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=300 \\",
        ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in sbatch_options(job)),
        f"source {code}/examples/slurm/supervise.sh",
        *launch,
        f"    {code}/{job.program} --config {config} \\",
        f"    --save {save} --load {save} --metrics-file {metrics}",
    ]
    return "\n".join(lines) + "\n"


def snapshot_folder(job: JobConfig) -> Path:
    """Where this submission keeps its code and configuration: the next free number."""
    taken = [int(path.name.rpartition("-")[2]) for path in Path(job.run_dir).absolute().glob("submitted-[0-9]*")]
    return Path(job.run_dir).absolute() / f"submitted-{max(taken, default=0) + 1}"


def keep(job: JobConfig, config: RunConfig, snapshot: Path) -> Path:
    """Copy code and configuration into the snapshot; returns the path of the sbatch file."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "megalite", snapshot / "code/megalite", ignore=unwanted)
    (snapshot / "code/examples/slurm").mkdir(parents=True)
    for name in (job.program, "examples/slurm/supervise.sh"):
        shutil.copy(ROOT / name, snapshot / "code" / name)
    (snapshot / "config.yaml").write_text(to_yaml(config))
    file = snapshot / "job.sbatch"
    file.write_text(script(job, snapshot))
    return file


def submit(job: JobConfig, file: Path) -> str:
    """Hand the script to sbatch; returns the number of the job. Raises SubmitError."""
    log = f"--output={Path(job.run_dir).absolute()}/job-%j.out"
    try:
        done = subprocess.run(["sbatch", "--parsable", log, str(file)], capture_output=True, text=True)
    except OSError as error:
        raise SubmitError(f"sbatch cannot be run: {error.strerror}; {file} is ready for it") from None
    if done.returncode:
        raise SubmitError(f"sbatch refused {file}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def read(argv: list[str]) -> tuple[JobConfig, RunConfig]:
    """The job and the configuration of the training. Raises ConfigError with all problems of both."""
    job, rest = _read_job(argv)
    architecture = job.program.removeprefix("pretrain_").removesuffix(".py")
    config = cli.read(rest, architecture)
    owned = [
        f"--{key.replace('_', '-')}" for key in ("save", "load", "metrics_file") if f"--{key.replace('_', '-')}" in rest
    ]
    if owned:
        raise ConfigError([Problem(f"{', '.join(owned)}: these lie in --run-dir", "leave them out")])
    problems = problems_of(job)
    if not problems:
        run = Path(job.run_dir).absolute()
        places = {
            "save": str(run / "checkpoints"),
            "load": str(run / "checkpoints"),
            "metrics_file": str(run / "metrics.jsonl"),
        }
        problems = validate.check(with_values(config, places), job.nodes * job.ranks)
    if problems:
        raise ConfigError(problems)
    return job, config


def _read_job(argv: list[str]) -> tuple[JobConfig, list[str]]:
    """The job's own flags, over those of the --cluster file, and all other flags. Raises ConfigError."""
    defaults, rest = {}, list(argv)
    if "--cluster" in rest[:-1]:
        at = rest.index("--cluster")
        defaults, rest = _read_cluster(rest[at + 1]), rest[:at] + rest[at + 2 :]
    needed = {"run_dir": tyro.MISSING, "nodes": tyro.MISSING}
    return tyro.cli(
        JobConfig, default=JobConfig(**needed | defaults), args=rest, description=__doc__, return_unknown_args=True
    )


def _read_cluster(path: str) -> dict:
    """The values in a --cluster file. Raises ConfigError."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([Problem(f"--cluster {path}: {error}", "a YAML file of flags of this program")]) from None
    known = {field.name: field.type for field in fields(JobConfig)}
    unknown = sorted(map(str, set(values) - set(known))) if isinstance(values, dict) else [path]
    if unknown:
        raise ConfigError([Problem(f"--cluster {path}: unknown {', '.join(unknown)}", f"names are {', '.join(known)}")])
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def main() -> int:
    """Exit status 0, 1 when SLURM or the disk refuse, 2 when the job or its configuration are at fault."""
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
    run = shlex.quote(str(Path(job.run_dir).absolute()))
    print(f"job {number}: {job.nodes} node(s) x {job.ranks} ranks; code and configuration in {snapshot}")
    print(f"  watch:   tail -F {run}/job-{number}.out        squeue --job {number}")
    print(f"  stop:    scancel {number}                      (ranks save first, within the KillWait of SLURM)")
    print(f"           scancel --signal=TERM {number}        (save first, however long it takes)")
    print(f"  resume:  sbatch --output={run}/job-%j.out {shlex.quote(str(snapshot / 'job.sbatch'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
