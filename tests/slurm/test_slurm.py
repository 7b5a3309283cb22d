"""On a real SLURM: both ways to launch, arrays, time limits, nodes that fail, ranks that die and hang.

After each disturbance the losses are those of a run that nobody disturbed, to the bit. Needs root and SLURM, which
`tests/slurm/cluster.sh install` installs; `make test-slurm` runs it.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from megalite.checkpoint.folder import list_iterations
from tests.slurm.cluster import ROOT, Cluster, Job, losses

MISSING = [
    name
    for name in ("slurmctld", "slurmd", "srun", "munged", "ip")
    if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING), reason=f"SLURM is not installed here ({', '.join(MISSING)}); .ci/run installs it"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster of network namespaces needs root"),
]

ITERATIONS = 40
MODEL = f"""
    --mock-data --vocab-size 509 --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --tp 2
    --global-batch-size 8 --train-iters {ITERATIONS} --lr 1e-3 --eval-interval 0 --eval-iters 0 --device cpu
    --save-interval 5 --keep-last 20
""".split()
TWO_NODES = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"]
SBATCH = "examples/slurm/pretrain_gpt.sbatch"


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="mls-"))  # short: sockets have paths of at most 108 bytes
    made = Cluster(folder)
    try:
        made.control("up")
        yield made
    finally:
        made.control("down")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> dict[int, float]:
    """The losses of a run by tools/submit.py that nobody disturbs."""
    run = tmp_path_factory.mktemp("undisturbed") / "a run"
    job = submit(cluster, run, *MODEL)
    assert job.end() == "COMPLETED", job.log
    assert list(losses(run / "metrics.jsonl")) == list(range(1, ITERATIONS + 1))
    assert "gloo, launched by srun; layout dp=2 x tp=2 x pp=1" in job.log and job.show("NumNodes") == "2"
    return losses(run / "metrics.jsonl")


def submit(cluster: Cluster, run: Path, *flags: str) -> Job:
    """tools/submit.py on 2 nodes of 2 ranks."""
    where = ["--run-dir", run, "--nodes", 2, "--ranks-per-node", 2, "--gpus-per-node", 0]
    said = cluster.run("python", "tools/submit.py", *where, *flags)
    job = Job(cluster, int(re.search(r"job (\d+): 2 node\(s\) x 2 ranks", said)[1]))
    for command in (f"scancel {job.number}", "resume:", "tail -F"):
        assert command in said
    return job


def start(cluster: Cluster, folder: Path, *flags: str, file: str = SBATCH, options=TWO_NODES) -> Job:
    """A job script as it is in examples/, with its folder of checkpoints in `folder`."""
    return cluster.sbatch(f"--output={folder}/%j.out", *options, file, *MODEL, *flags, SAVE=folder / "save", RANKS=2)


def reach(job: Job, folder: Path, iteration: int) -> None:
    """Wait until the run has trained so far, or is over."""
    metrics = folder / "save" / "metrics.jsonl"
    job.wait(lambda: max(losses(metrics), default=0) >= iteration or job.show("JobState") not in ("RUNNING", "PENDING"))


def test_torchrun_gives_the_same_losses(cluster, undisturbed, tmp_path):
    options = ["--nodes=2", "--gpus-per-node=0"]
    job = start(cluster, tmp_path, file="examples/slurm/pretrain_torchrun.sbatch", options=options)
    assert job.end() == "COMPLETED", job.log
    assert "launched by torchrun" in job.log and losses(tmp_path / "save/metrics.jsonl") == undisturbed


def test_a_time_limit_saves_and_requeues(cluster, undisturbed, tmp_path):
    """USR1 to the batch shell, as --signal=B:USR1@300 sends it."""
    job = start(cluster, tmp_path)
    reach(job, tmp_path, 8)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait(lambda: job.show("Restarts") == "1")
    assert job.end() == "COMPLETED", job.log
    saved_at = int(re.search(r"stopped at iteration (\d+): SIGUSR1", job.log)[1])
    assert f"requeue of job {job.number}: stopped at iteration {saved_at}: SIGUSR1" in job.log
    assert f"resumed from {tmp_path}/save/iter_{saved_at:07d} at iteration {saved_at}\n" in job.log
    assert losses(tmp_path / "save/metrics.jsonl") == undisturbed
    assert (tmp_path / "save/metrics.jsonl").read_text().count('"loss"') == ITERATIONS  # no step was done twice


def test_a_node_that_fails_costs_the_steps_since_the_last_checkpoint(cluster, undisturbed, tmp_path):
    """Daemon and ranks of a node are killed; SLURM requeues the job on the others."""
    job = start(cluster, tmp_path)
    reach(job, tmp_path, 8)
    nodes = cluster.run("scontrol", "show", "hostnames", job.show("NodeList")).split()
    cluster.control("crash", nodes[1])
    try:
        job.wait(lambda: job.show("Restarts") == "1" and job.show("JobState") in ("RUNNING", "COMPLETED"))
        assert job.end() == "COMPLETED", job.log
        assert nodes[1] not in cluster.run("scontrol", "show", "hostnames", job.show("NodeList")).split()
    finally:
        cluster.control("boot", nodes[1])
    assert "resumed from" in job.log
    assert losses(tmp_path / "save/metrics.jsonl") == undisturbed


def test_scancel_saves_and_the_same_command_goes_on_also_with_fewer_nodes(cluster, undisturbed, tmp_path):
    job = start(cluster, tmp_path)
    reach(job, tmp_path, 8)
    cluster.run("scancel", job.number)
    assert job.end() == "CANCELLED" and job.show("Restarts") == "0"
    saved = list_iterations(tmp_path / "save")[-1]
    assert f"stopped at iteration {saved}: SIGTERM" in job.log and "requeue of job" not in job.log
    fewer = tmp_path / "fewer"
    shutil.copytree(tmp_path / "save", fewer / "save")
    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0"]
    one_node, again = start(cluster, fewer, options=options), start(cluster, tmp_path)
    assert (again.end(), one_node.end()) == ("COMPLETED", "COMPLETED"), again.log + one_node.log
    assert losses(tmp_path / "save/metrics.jsonl") == undisturbed
    assert "layout dp=1 x tp=2 x pp=1" in one_node.log and f"at iteration {saved}\n" in one_node.log
    found = losses(fewer / "save/metrics.jsonl")
    assert found == pytest.approx(undisturbed, rel=1e-4)
    assert [found[i] for i in range(1, saved + 1)] == [undisturbed[i] for i in range(1, saved + 1)]


def test_a_chain_of_jobs(cluster, undisturbed, tmp_path):
    """Each goes on where the one before stopped, and waits for it."""
    options = [f"--output={tmp_path}/%j.out", *TWO_NODES, SBATCH, *MODEL, "--exit-interval", "3"]
    said = cluster.run("examples/slurm/chain.sh", 2, *options, SAVE=tmp_path / "save")
    first, second = (Job(cluster, int(number)) for number in re.findall(r"^job (\d+)$", said, re.M))
    assert (first.end(), second.end()) == ("COMPLETED", "COMPLETED"), first.log + second.log
    assert "from iteration 3 to" in second.log
    found = losses(tmp_path / "save/metrics.jsonl")
    assert found == {i: undisturbed[i] for i in range(1, 7)}


def trouble(cluster: Cluster, folder: Path, what: str, *flags: str) -> Job:
    """A training that gets into trouble on 2 nodes x 2 ranks."""
    step = f"srun --kill-on-bad-exit=1 python tests/trouble.py --save {folder}/save --load {folder}/save"
    wrapped = " ".join([step, *MODEL, *flags])
    return cluster.sbatch(f"--output={folder}/%j.out", *TWO_NODES, f"--wrap={wrapped}", TROUBLE=what)


def test_a_rank_that_dies_takes_the_job_down_and_is_named(cluster, tmp_path):
    job = trouble(cluster, tmp_path, "die 3 3")
    assert job.end() == "FAILED", job.log
    died = r"^pretrain_gpt\.py: rank [012]: rank 3 on node\d \(process \d+\) died without a word \(last heard: "
    assert len(re.findall(died, job.log, re.M)) == 1 and "Traceback" not in job.log, job.log


def test_a_rank_that_fails_takes_the_job_down_and_is_quoted(cluster, tmp_path):
    job = trouble(cluster, tmp_path, "fail 2 3")
    assert job.end() == "FAILED", job.log
    assert job.log.count("Traceback (most recent call last)") == 1, job.log
    assert re.search(r"^\[rank2\]: ArithmeticError: this model is broken$", job.log, re.M), job.log
    assert len(re.findall(r"rank 2 on node\d failed: ArithmeticError: this model is broken$", job.log, re.M)) == 1


def test_a_hang_is_explained(cluster, tmp_path):
    job = trouble(cluster, tmp_path, "sleep 1 3", "--hang-timeout", "15")
    assert job.end() == "FAILED", job.log
    verdict = job.log.partition("HANG: ")[2]
    assert re.match(
        r"no progress for \d+ s, waiting for rank 1\n  rank 1 on node\d \(process \d+\): training, step 3", verdict
    )
    assert "missing from all_reduce of" in verdict and "time.sleep(1)" in verdict
    assert (tmp_path / "save/hang-step-3.txt").read_text().count("--- rank") == 4


def test_an_array_of_shards_and_their_merge(cluster, tmp_path):
    """Three tasks and a merge after them make what one process makes."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "document {i} says {"la " * (i % 7)}"}}\n' for i in range(2000)))
    flags = ["--input", corpus, "--tokenizer-type", "ByteTokenizer", "--append-eod"]
    options = f"--cpus-per-task=1 --output={tmp_path}/%x-%j.out"
    said = cluster.run("examples/slurm/preprocess.sh", tmp_path / "parts", *flags, SHARDS=3, ARRAY_OPTIONS=options)
    merge = Job(cluster, int(re.search(r"then merge (\d+)", said)[1]))
    cluster.run("python", "tools/preprocess_data.py", *flags, "--output-prefix", tmp_path / "whole", "--workers", 1)
    assert merge.end() == "COMPLETED", merge.log
    for suffix in (".bin", ".idx"):
        parts, whole = (tmp_path / f"{name}_text_document{suffix}" for name in ("parts", "whole"))
        assert parts.read_bytes() == whole.read_bytes()


SHRUNK = dict(
    num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, micro_batch_size=1, global_batch_size=8,
    train_iters=2, lr_warmup_iters=1, eval_interval=0, eval_iters=0, mock_data=True, vocab_size=509, data_path=None,
     tokenizer_type=None, vocab_file=None, merge_file=None, device="cpu",
)  # fmt: skip


def test_the_recipes_run_when_they_are_shrunk(cluster, tmp_path):
    """Each keeps what can be kept of it on 4 ranks: stages, shape of the block, precision, recompute, reports."""
    jobs = []
    for recipe in sorted(ROOT.glob("examples/slurm/recipes/*.yaml")):
        values = yaml.safe_load(recipe.read_text())
        layout = {"tensor_model_parallel_size": min(2, values["tensor_model_parallel_size"])}
        layout |= {"pipeline_model_parallel_size": min(2, values["pipeline_model_parallel_size"])}
        smaller = {"ffn_hidden_size": 128} if "ffn_hidden_size" in values else {}
        smaller |= {"num_query_groups": 2} if "num_query_groups" in values else {}
        config = tmp_path / recipe.name
        config.write_text(yaml.safe_dump(values | SHRUNK | layout | smaller))
        where = ["--run-dir", tmp_path / recipe.stem, "--nodes", 2, "--ranks-per-node", 2, "--gpus-per-node", 0]
        script = tmp_path / f"{recipe.stem}.sbatch"
        script.write_text(cluster.run("python", "tools/submit.py", "--config", config, *where, "--dry-run"))
        cluster.run("sbatch", "--test-only", script)
        jobs.append(submit(cluster, tmp_path / recipe.stem, "--config", config))
    for job in jobs:
        assert job.end() == "COMPLETED" and "stopped at iteration 2: all 2 iterations are done" in job.log, job.log
