"""On a real SLURM: srun and torchrun, job arrays, time limits, preemption, node and rank failures.

After each interruption the losses are bitwise equal to those of an uninterrupted run. Needs root
and SLURM, which `tests/slurm/cluster.sh install` installs. `make test-slurm` runs these tests, and
fails where either is missing.
"""

import re
import shutil
from pathlib import Path

import pytest

from megalite.checkpoint.folder import list_iterations
from tests.slurm.cluster import MARKS, ROOT, TWO_NODES, Cluster, Job, losses, submit

pytestmark = MARKS

ITERATIONS = 40
MODEL = f"""
    --mock-data --vocab-size 509 --num-layers 4 --hidden-size 128 --num-attention-heads 4
    --seq-length 64 --tp 2 --global-batch-size 8 --train-iters {ITERATIONS} --lr 1e-3
    --eval-interval 0 --eval-iters 0 --device cpu
    --save-interval 5 --keep-last 20
""".split()
ONE_NODE = ["--nodes=1", *TWO_NODES[1:]]
SBATCH = "examples/slurm/pretrain_gpt.sbatch"


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> dict[int, float]:
    """The losses of an uninterrupted run by tools/submit.py."""
    run = tmp_path_factory.mktemp("undisturbed") / "a run"
    job = submit(cluster, run, *MODEL)
    assert job.end() == "COMPLETED", job.log
    assert list(losses(run / "metrics.jsonl")) == list(range(1, ITERATIONS + 1))
    assert (
        "gloo, launched by srun; layout dp=2 x tp=2 x pp=1" in job.log
        and job.show("NumNodes") == "2"
    )
    return losses(run / "metrics.jsonl")


def start(
    cluster: Cluster, folder: Path, *flags: str, file: str = SBATCH, options=TWO_NODES
) -> Job:
    """A job script as it is in examples/, with its folder of checkpoints in `folder`."""
    return cluster.sbatch(
        f"--output={folder}/%j.out", *options, file, *MODEL, *flags, SAVE=folder / "save", RANKS=2
    )


def reach(job: Job, folder: Path, iteration: int) -> None:
    """Wait until the run has trained so far, or is over."""
    metrics = folder / "save" / "metrics.jsonl"
    job.wait(
        lambda: (
            max(losses(metrics), default=0) >= iteration
            or job.show("JobState") not in ("RUNNING", "PENDING")
        )
    )


def test_a_chain_under_torchrun_resumes_after_a_time_limit(cluster, undisturbed, tmp_path):
    """torchrun has an exit status of its own at USR1; the next job of the chain still starts."""
    options = [f"--output={tmp_path}/%j.out", "--nodes=2", "--cpus-per-task=2", "--gpus-per-node=0"]
    options += ["examples/slurm/pretrain_torchrun.sbatch", *MODEL]
    said = cluster.run("examples/slurm/chain.sh", 2, *options, SAVE=tmp_path / "save", RANKS=2)
    first, second = (Job(cluster, int(n)) for n in re.findall(r"^job (\d+)$", said, re.M))
    reach(first, tmp_path, 8)
    assert second.show("JobState") == "PENDING"
    cluster.run("scancel", "--batch", "--signal=USR1", first.number)
    assert (first.end(), second.end()) == ("COMPLETED", "COMPLETED"), first.log + second.log
    saved_at = int(
        re.search(r"is to be continued: stopped at iteration (\d+): SIGUSR1", first.log)[1]
    )
    assert first.show("Restarts") == "0" and "launched by torchrun" in second.log
    assert f"training from iteration {saved_at} to {ITERATIONS}\n" in second.log
    assert losses(tmp_path / "save/metrics.jsonl") == undisturbed


def test_a_time_limit_saves_and_requeues(cluster, undisturbed, tmp_path):
    """USR1 to the batch shell, as --signal=B:USR1@300 sends it."""
    job = start(cluster, tmp_path)
    reach(job, tmp_path, 8)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait(lambda: job.show("Restarts") == "1")
    assert job.end() == "COMPLETED", job.log
    saved_at = int(re.search(r"stopped at iteration (\d+): SIGUSR1", job.log)[1])
    assert (
        f"job {job.number} is to be continued: stopped at iteration {saved_at}: SIGUSR1" in job.log
    )
    assert f"resumed from {tmp_path}/save/iter_{saved_at:07d} at iteration {saved_at}\n" in job.log
    assert losses(tmp_path / "save/metrics.jsonl") == undisturbed
    assert (tmp_path / "save/metrics.jsonl").read_text().count(
        '"loss"'
    ) == ITERATIONS  # no step was done twice
    shown = re.search(r"^```text\n(.*?)```", (ROOT / "docs/slurm.md").read_text(), re.M | re.S)[1]
    forms = [
        re.sub(r"\d+", "N", text.replace(folder, "SAVE")).splitlines()
        for text, folder in ((shown, "/shared/runs/7b"), (job.log, f"{tmp_path}/save"))
    ]
    assert set(forms[0]) <= set(forms[1]), job.log


def test_a_node_that_fails_costs_the_steps_since_the_last_checkpoint(
    cluster, undisturbed, tmp_path
):
    """Daemon and ranks of a node are killed; SLURM requeues the job on the others."""
    job = start(cluster, tmp_path)
    reach(job, tmp_path, 8)
    nodes = cluster.run("scontrol", "show", "hostnames", job.show("NodeList")).split()
    cluster.control("crash", nodes[1])
    try:
        job.wait(
            lambda: job.show("Restarts") == "1" and job.show("JobState") in ("RUNNING", "COMPLETED")
        )
        assert job.end() == "COMPLETED", job.log
        assert (
            nodes[1]
            not in cluster.run("scontrol", "show", "hostnames", job.show("NodeList")).split()
        )
    finally:
        cluster.control("boot", nodes[1])
    assert "resumed from" in job.log
    assert losses(tmp_path / "save/metrics.jsonl") == undisturbed


def test_scancel_saves_and_the_same_command_resumes_also_with_fewer_nodes(
    cluster, undisturbed, tmp_path
):
    job = start(cluster, tmp_path)
    reach(job, tmp_path, 8)
    cluster.run("scancel", job.number)
    assert job.end() == "CANCELLED" and job.show("Restarts") == "0"
    saved = list_iterations(tmp_path / "save")[-1]
    assert f"stopped at iteration {saved}: SIGTERM" in job.log and "to be continued" not in job.log
    fewer = tmp_path / "fewer"
    shutil.copytree(tmp_path / "save", fewer / "save")
    one_node, again = start(cluster, fewer, options=ONE_NODE), start(cluster, tmp_path)
    assert (again.end(), one_node.end()) == ("COMPLETED", "COMPLETED"), again.log + one_node.log
    assert losses(tmp_path / "save/metrics.jsonl") == undisturbed
    assert "layout dp=1 x tp=2 x pp=1" in one_node.log and f"at iteration {saved}\n" in one_node.log
    found = losses(fewer / "save/metrics.jsonl")
    assert found == pytest.approx(undisturbed, rel=1e-4)
    for i in range(1, saved + 1):
        assert found[i] == undisturbed[i]


def test_a_preempted_job_saves_and_resumes(cluster, undisturbed, tmp_path):
    """With a GraceTime, within which SLURM counts a job that ends as completed, and without.

    Both at once, since most of it is waiting. Four ranks on one node are the same layout.
    """
    jobs = {}
    for partition, node in {"main": "node1", "spare": "node2"}.items():
        (tmp_path / partition).mkdir()
        options = [
            *ONE_NODE,
            "--ntasks-per-node=4",
            f"--partition={partition}",
            f"--nodelist={node}",
        ]
        jobs[partition] = start(cluster, tmp_path / partition, options=options)
    for partition, job in jobs.items():
        reach(job, tmp_path / partition, 8)
    where = ["--partition=urgent", "--nodes=2", "--nodelist=node1,node2", "--exclusive"]
    urgent = cluster.sbatch(*where, "--output=/dev/null", "--wrap=sleep 1")
    assert urgent.end() == "COMPLETED"
    for partition, job in jobs.items():
        assert job.end() == "COMPLETED" and job.show("Restarts") == "1", job.log
        assert ("is to be continued: it was preempted" in job.log) == (partition == "main"), job.log
        saved_at = int(re.search(r"stopped at iteration (\d+): SIGTERM", job.log)[1])
        assert f"at iteration {saved_at}\n" in job.log
        metrics = tmp_path / partition / "save/metrics.jsonl"
        assert losses(metrics) == undisturbed and metrics.read_text().count('"loss"') == ITERATIONS


def supervised(cluster: Cluster, folder: Path, step: str, *options: str, **variables: str) -> Job:
    """A job whose step, under supervise.sh with the folder `folder`, is a bash script."""
    (folder / "step.sh").write_text(f"cd {folder}\n{step}\n")
    (folder / "job.sh").write_text(
        "#!/bin/bash\nsource megalite/programs/supervise.sh\n"
        f"supervise {folder} bash {folder}/step.sh\n"
    )
    return cluster.sbatch(f"--output={folder}/%j.out", *options, folder / "job.sh", **variables)


def test_a_warning_waits_until_the_ranks_can_receive_it(cluster, tmp_path):
    """Without a step it would be lost; a rank that is still starting would be killed."""
    rank = (
        "sleep 2; trap 'echo heard; exit 0' USR1; echo new >owner.json; "
        "for i in {1..90}; do sleep 0.2; done; exit 1"
    )
    (tmp_path / "owner.json").write_text("old\n")
    job = supervised(cluster, tmp_path, f'echo starting; sleep 2; exec srun bash -c "{rank}"')
    job.wait(lambda: "starting" in job.log)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == "COMPLETED" and "heard" in job.log, job.log


def test_what_a_job_ends_with_when_it_is_to_be_continued(cluster, tmp_path):
    """A requeue that SLURM refuses is an error. In a chain the job ends with status 0 instead."""
    step = "echo saved at 3 >to-be-continued; exit 7"
    alone = supervised(cluster, tmp_path, step, "--no-requeue")
    assert (
        alone.end() == "FAILED" and f"error: SLURM does not requeue job {alone.number}" in alone.log
    ), alone.log
    stuck = supervised(cluster, tmp_path, step)  # it would be requeued for ever
    assert (
        stuck.end() == "FAILED" and "error: no step was made, for the second time" in stuck.log
    ), stuck.log
    of_a_chain = supervised(cluster, tmp_path, step.replace("3", "4"), REQUEUE="no")
    assert of_a_chain.end() == "COMPLETED" and "is to be continued: saved at 4" in of_a_chain.log, (
        of_a_chain.log
    )
    failed = supervised(cluster, tmp_path, "exit 7")  # the file of an earlier job is ignored
    assert failed.end() == "FAILED" and failed.show("ExitCode") == "7:0", failed.log


def test_ranks_have_the_cpus_that_the_job_asked_for(cluster, tmp_path):
    """Two tasks of two CPUs on a node of four: srun must know the CPUs of a task."""
    step = 'unset SLURM_CPU_BIND; exec srun bash -c "grep Cpus_allowed_list: /proc/self/status"'
    job = supervised(
        cluster, tmp_path, step, "--ntasks-per-node=2", "--cpus-per-task=2", "--exclusive"
    )
    assert job.end() == "COMPLETED", job.log
    allowed = re.findall(r"Cpus_allowed_list:\s+(\S+)", job.log)
    assert len(allowed) == 2 and allowed[0] != allowed[1], job.log


TROUBLES = {"die 3 3": [], "fail 2 3": [], "sleep 1 3": ["--hang-timeout", "15"]}


@pytest.fixture(scope="module")
def troubled(cluster, tmp_path_factory) -> dict[str, tuple[Job, Path]]:
    """Trainings with a failure on 2 nodes x 2 ranks, and their folders; all run at once."""
    jobs = {}
    for what, flags in TROUBLES.items():
        folder = tmp_path_factory.mktemp("trouble")
        step = "srun --kill-on-bad-exit=1 python tests/trouble.py"
        where = ["--save", f"{folder}/save", "--load", f"{folder}/save"]
        wrapped = " ".join([step, *where, *MODEL, *flags])
        job = cluster.sbatch(
            f"--output={folder}/%j.out", *TWO_NODES, f"--wrap={wrapped}", TROUBLE=what
        )
        jobs[what] = job, folder
    return jobs


def test_a_rank_that_dies_takes_the_job_down_and_is_named(troubled):
    job, _ = troubled["die 3 3"]
    assert job.end() == "FAILED", job.log
    died = (
        r"^pretrain_gpt\.py: rank [012]: rank 3 on node\d \(process \d+\) "
        r"exited without an error message \(last heard: "
    )
    assert len(re.findall(died, job.log, re.M)) == 1 and "Traceback" not in job.log, job.log


def test_a_rank_that_fails_takes_the_job_down_and_is_quoted(troubled):
    job, _ = troubled["fail 2 3"]
    assert job.end() == "FAILED", job.log
    assert job.log.count("Traceback (most recent call last)") == 1, job.log
    assert re.search(r"^\[rank2\]: ArithmeticError: this model is broken$", job.log, re.M), job.log
    assert (
        len(
            re.findall(
                r"rank 2 on node\d failed: ArithmeticError: this model is broken$", job.log, re.M
            )
        )
        == 1
    )


def test_a_hang_is_explained(troubled):
    job, folder = troubled["sleep 1 3"]
    assert job.end() == "FAILED", job.log
    verdict = job.log.partition("HANG: ")[2]
    assert re.match(
        r"no progress for \d+ s, waiting for rank 1\n"
        r"  rank 1 on node\d \(process \d+\): training, step 3",
        verdict,
    )
    assert "missing from all_reduce of" in verdict and "time.sleep(1)" in verdict
    assert (folder / "save/hang-step-3.txt").read_text().count("--- rank") == 4


def test_an_array_of_shards_and_their_merge(cluster, tmp_path):
    """Three tasks and a merge produce what one process produces; one task can be run again."""
    corpus = tmp_path / "corpus.jsonl"
    with open(corpus, "w") as file:
        for i in range(2000):
            file.write(f'{{"text": "document {i} says {"la " * (i % 7)}"}}\n')
    flags = ["--input", corpus, "--tokenizer-type", "ByteTokenizer", "--append-eod"]
    options = ["--cpus-per-task=1", f"--output={tmp_path}/%x-%j.out"]
    prefix = tmp_path / "merged"
    said = cluster.run(
        "examples/slurm/preprocess.sh", prefix, *flags, SHARDS=3, ARRAY_OPTIONS=" ".join(options)
    )
    merge = Job(cluster, int(re.search(r"then merge (\d+)", said)[1]))
    cluster.run(
        "python",
        "tools/preprocess_data.py",
        *flags,
        "--output-prefix",
        tmp_path / "whole",
        "--workers",
        1,
    )
    assert merge.end() == "COMPLETED", merge.log
    for suffix in (".bin", ".idx"):
        whole = tmp_path / f"whole_text_document{suffix}"
        assert (tmp_path / f"merged_text_document{suffix}").read_bytes() == whole.read_bytes()
    shard = tmp_path / "merged_0001-of-0003_text_document"
    files = [shard.with_suffix(".bin"), shard.with_suffix(".idx")]
    before = list(map(Path.read_bytes, files))
    for path in [*files, shard.with_suffix(".json")]:
        path.unlink()
    array = "examples/slurm/preprocess_array.sbatch"
    again = cluster.sbatch(
        "--array=1", *options, array, *flags, "--output-prefix", prefix, SHARDS=3
    )
    assert again.end() == "COMPLETED", again.log
    assert list(map(Path.read_bytes, files)) == before
