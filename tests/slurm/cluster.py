"""The test cluster and its jobs, as a user at a terminal sees them."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
MISSING = subprocess.run(
    [SCRIPT, "missing"], capture_output=True, text=True, check=True
).stdout.splitlines()
MARKS = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING) and "MUST_HAVE_SLURM" not in os.environ,
        reason=f"no SLURM cluster here, missing: {', '.join(MISSING)}; .ci/run installs it",
    ),
]
"""Of every test on the cluster."""
TWO_NODES = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
"""What the job scripts are given for 2 nodes of 2 ranks."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
TIMEOUT = 400.0
"""Seconds after which a job counts as broken."""


class Cluster:
    """Three nodes of 4 CPUs each."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment = os.environ | {
            "BASE": str(folder), "SLURM_CONF": f"{folder}/etc/slurm.conf", "PATH": path,
            "OMP_NUM_THREADS": "1",
            "SLURM_CPU_BIND": "none",  # nodes have more CPUs than the machine
        }  # fmt: skip

    def control(self, *words: str) -> None:
        """cluster.sh with these words."""
        done = subprocess.run(
            [SCRIPT, *words], env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def run(
        self, *command: str | Path | int, cwd: Path = ROOT, **variables: str | int | Path
    ) -> str:
        """What a command prints, by default at the root of the checkout."""
        environment = self.environment | dict(zip(variables, map(str, variables.values())))
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def sbatch(self, *options: str | Path | int, **variables: str | int | Path) -> "Job":
        """Submit a job."""
        return Job(self, int(self.run("sbatch", "--parsable", *options, **variables)))


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: int):
        self.cluster, self.number = cluster, number

    def show(self, field: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        return re.search(rf" {field}=(.*?)( \w+=|$)", shown.strip())[1]

    @property
    def log(self) -> str:
        """What the job has printed so far."""
        path = Path(self.show("StdOut"))
        return path.read_text() if path.exists() else ""

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, (
                f"job {self.number}: {self.show('JobState')}\n{self.log[-5000:]}"
            )
            time.sleep(0.2)

    def end(self) -> str:
        """Wait until it is over; its state."""
        self.wait(lambda: self.show("JobState") in ENDED)
        return self.show("JobState")


def submit(cluster: Cluster, run: Path, *flags: str | Path) -> Job:
    """tools/submit.py on 2 nodes of 2 ranks."""
    where = [
        "--run-dir",
        run,
        "--nodes",
        2,
        "--ranks-per-node",
        2,
        "--gpus-per-node",
        0,
        "--cpus-per-rank",
        1,
    ]
    said = cluster.run("python", "tools/submit.py", *where, *flags)
    job = Job(cluster, int(re.search(r"job (\d+): 2 node\(s\) x 2 ranks", said)[1]))
    for command in (f"scancel {job.number}", "resume:", "tail -F"):
        assert command in said
    return job


def losses(metrics: Path) -> dict[int, float]:
    """Losses by iteration; of an iteration that was run twice, the later one."""
    found = {}
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        if line.endswith("}"):
            entry = json.loads(line)
            if "loss" in entry:
                found[entry["iteration"]] = entry["loss"]
    return found
