"""The commands of docs/slurm.md and the recipes, on a real SLURM with 4 CPU ranks."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from megalite.data.tokenizers import train_bpe
from tests.slurm.cluster import MARKS, ROOT, TWO_NODES, Cluster, Job, submit

pytestmark = MARKS

SHRUNK = dict(
    num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, micro_batch_size=1,
    global_batch_size=8, train_iters=2, lr_warmup_iters=1, eval_interval=0, eval_iters=0,
    device="cpu",
)  # fmt: skip
MOCK = """
    --mock-data --vocab-size 509 --data-path unset --tokenizer-type unset --vocab-file unset
    --merge-file unset
""".split()
SMALLER = {
    "--nodes=4": " ".join(TWO_NODES),
    "--world-size 32": "--world-size 4", "chain.sh 5": "chain.sh 2",
    "--nodes 4": "--nodes 2 --ranks-per-node 2 --gpus-per-node 0 --cpus-per-rank 1",
}  # fmt: skip
"""What the docs say, and what is run in its place."""
NUMBERS = r"\b(?:job|array|merge) (\d+)"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout with recipes for smaller models on 4 ranks.

    Each recipe keeps its stages, shape of the block, precision, recompute and reports.
    """
    for name in ("megalite", "tools", "pretrain_gpt.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples/slurm", tmp_path / "examples/slurm")
    for recipe in tmp_path.glob("examples/slurm/recipes/*.yaml"):
        values = yaml.safe_load(recipe.read_text())
        layout = {"tensor_model_parallel_size": min(2, values["tensor_model_parallel_size"])}
        layout |= {"pipeline_model_parallel_size": min(2, values["pipeline_model_parallel_size"])}
        smaller = {"ffn_hidden_size": 128} if "ffn_hidden_size" in values else {}
        smaller |= {"num_query_groups": 2} if "num_query_groups" in values else {}
        recipe.write_text(yaml.safe_dump(values | SHRUNK | layout | smaller))
    return tmp_path


def test_what_the_docs_show_runs(cluster, checkout):
    """One after the other, each when the jobs of the one before are done."""
    texts = []
    with open(checkout / "corpus.jsonl", "w") as file:
        for i in range(200):
            text = f"Fellow citizens, this is document {i} of the state of the Union. " * (
                1 + i % 7
            )
            texts.append(text)
            file.write(json.dumps({"text": text}) + "\n")
    (checkout / "data").mkdir()
    for name, content in zip(("vocab.json", "merges.txt"), train_bpe(texts, 300)):
        (checkout / "data" / name).write_bytes(content)
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs/slurm.md").read_text(), re.M | re.S)
    said = [run(cluster, checkout, block) for block in blocks]
    assert sorted(map(len, said)) == [0, 1, 1, 2, 2]  # jobs of each: none for the check
    for folder in ("7b", "7b-slower/checkpoints"):
        assert (checkout / "runs" / folder / "iter_0000002").is_dir()
    assert "nothing to do: the checkpoint is at iteration 2" in said[3][0].log


def run(cluster: Cluster, checkout: Path, block: str) -> list[Job]:
    """The jobs of a block of commands, when all are done."""
    for shown, smaller in SMALLER.items():
        block = block.replace(shown, smaller)
    block = block.replace("/shared", str(checkout))
    said = cluster.run("bash", "-euc", block, cwd=checkout, ARRAY_OPTIONS="--cpus-per-task=1")
    jobs = [Job(cluster, int(number)) for number in dict.fromkeys(re.findall(NUMBERS, said))]
    for job in jobs:
        assert job.end() == "COMPLETED", job.log
    return jobs


def test_the_recipes_run_when_they_are_shrunk(cluster, checkout):
    jobs = []
    for recipe in sorted(checkout.glob("examples/slurm/recipes/*.yaml")):
        flags = ["--config", recipe, *MOCK]
        where = ["--run-dir", checkout / recipe.stem, *SMALLER["--nodes 4"].split()]
        script = recipe.with_suffix(".sbatch")
        script.write_text(cluster.run("python", "tools/submit.py", *flags, *where, "--dry-run"))
        cluster.run("sbatch", "--test-only", script)
        jobs.append(submit(cluster, checkout / recipe.stem, *flags))
    assert len(jobs) == 4
    for job in jobs:
        assert (
            job.end() == "COMPLETED"
            and "stopped at iteration 2: all 2 iterations are done" in job.log
        ), job.log
