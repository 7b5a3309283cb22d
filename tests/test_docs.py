"""What the docs show runs, and what they list is all there is."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

from tests import presets_table, schedules_table
from tests.layouts import LAYOUTS
from tests.test_readme import environment

DOCS = Path(__file__).resolve().parents[1] / "docs"
SMALLER = {
    "--preset bert-base": "--num-layers 2 --hidden-size 32 --num-attention-heads 4 "
    "--seq-length 32 --save-interval 5",
    "--nproc-per-node 8": "--nproc-per-node 4",
    "--vocab-size 4096": "--vocab-size 200",
    "--train-iters 1000000": "--train-iters 2",
    "--lr-warmup-iters 10000": "--lr-warmup-iters 1",
    "--global-batch-size 256": "--global-batch-size 8",
}
"""What docs/bert.md says, and what is run in its place."""


def test_the_library_example_runs():
    code = "\n".join(
        re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(), re.DOTALL)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=DOCS.parent
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[2]) for line in done.stdout.splitlines() if " loss " in line]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert "(4, 3, 16, 64)" in done.stdout


def test_the_commands_of_bert_run(tmp_path):
    """From text to filled blanks and a classifier, with smaller numbers."""
    script = "".join(
        re.findall(r"^```bash\n(.*?)^```$", (DOCS / "bert.md").read_text(), re.M | re.S)
    )
    for shown, smaller in SMALLER.items():
        assert script.count(shown) == 1, shown
        script = script.replace(shown, smaller)
    for name in ("pretrain_bert.py", "tools"):
        (tmp_path / name).symlink_to(DOCS.parent / name)
    draw = random.Random(3)
    words = ["".join(draw.choices("aeioulmnrst", k=draw.randint(2, 8))) for _ in range(300)]
    sentences = [" ".join(draw.choices(words, k=9)).capitalize() + "." for _ in range(2000)]
    texts = [" ".join(sentences[i : i + 20]) for i in range(0, len(sentences), 20)]
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert (
        "saved checkpoints at iteration 2" in run.stdout
        and "the people of the united [MASK] ." in run.stdout
    )
    lines = [json.loads(line) for line in (tmp_path / "classes.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {line["label"] for line in lines} <= {"glad", "sad"}


def test_the_table_of_presets_is_what_they_are():
    text = (DOCS / "models.md").read_text()
    assert "\n".join(presets_table.lines()) in text, "run python -m tests.presets_table"


def test_the_commands_of_models_pass_the_checks():
    script = "".join(
        re.findall(r"^```bash\n(.*?)^```$", (DOCS / "models.md").read_text(), re.M | re.S)
    )
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=DOCS.parent,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "vocabulary 128256" in run.stdout and "parameters    8.03 G" in run.stdout


def test_what_schedules_shows_is_what_the_commands_print(tmp_path):
    """The table, the picture with the lengths that its caption says, and the line of auto."""
    page = (DOCS / "schedules.md").read_text()
    assert "\n".join(schedules_table.lines()) in page, "run python -m tests.schedules_table"
    (script,) = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "tools").symlink_to(DOCS.parent / "tools")
    (tmp_path / "docs/images").mkdir(parents=True)
    options = {"env": environment(), "capture_output": True, "text": True, "check": True}
    drawn = subprocess.run(["bash", "-c", script], cwd=tmp_path, **options).stdout
    assert (tmp_path / "docs/images/schedules.png").is_file()
    lengths = re.findall(r"makespan ([\d.]+)", drawn)
    caption = re.search(r"microbatches: (.*?) units", page)[1]
    assert re.findall(r"[\d.]+", caption) == lengths
    command, shown = re.search(
        r"^\$ python (.*)\n(--pipeline-schedule auto.*)$", page, re.M
    ).groups()
    started = [sys.executable, *command.split()]
    printed = subprocess.run(started, cwd=DOCS.parent, **options).stdout
    assert printed.splitlines()[0] == shown


def test_the_commands_that_import_from_megatron_run(tmp_path):
    """A small checkpoint of Megatron-core, and mock data in place of a corpus."""
    page = (DOCS / "megatron-lm.md").read_text()
    (script,) = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    data = re.search(r"--data-path.*merges.txt", script)[0]
    for shown, smaller in {
        data: "--mock-data --eval-interval 0 --eval-iters 0",
        "--vocab-size 50257": "--vocab-size 61",
        "--nproc-per-node 8": "--nproc-per-node 2",
        "--train-iters 10000": "--train-iters 2 --device cpu",
        "--global-batch-size 64": "--global-batch-size 2",
    }.items():
        assert script.count(shown) == 1, shown
        script = script.replace(shown, smaller)
    for name in ("pretrain_gpt.py", "tools"):
        (tmp_path / name).symlink_to(DOCS.parent / name)
    (tmp_path / "old").symlink_to(DOCS.parent / "tests/data/megatron/gpt")
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    assert "iteration 20 of Megatron-LM in old: 28 tensors" in run.stdout
    assert "weights from imported/iter_0000000; all else starts from scratch" in run.stdout
    assert (tmp_path / "checkpoints/iter_0000002/index.json").is_file()


def test_the_table_of_layouts_lists_each_with_a_small_difference():
    rows = dict(
        re.findall(
            r"^\| (.+?) \| \d.* \| (\S+) \|$", (DOCS / "layouts.md").read_text(), re.MULTILINE
        )
    )
    assert list(rows) == [layout.name for layout in LAYOUTS], "run python -m tests.layouts_table"
    assert all(float(difference) < 1e-9 for difference in rows.values())
