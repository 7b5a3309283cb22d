"""tools/submit.py, the job scripts and the recipes, as far as they can be tested without a cluster."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megalite import validate
from megalite.config import ConfigError, from_flat
from megalite.estimate import estimate_stages
from tools.submit import ROOT, JobConfig, keep, problems_of, read, sbatch_options, script, snapshot_folder

SLURM = ROOT / "examples/slurm"
RECIPES = sorted(SLURM.glob("recipes/*.yaml"))
FILES = sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")])
MADE_UP = dict(data_path=None, tokenizer_type=None, vocab_file=None, merge_file=None, mock_data=True, vocab_size=50257)
SOUND = "--mock-data --vocab-size 512 --train-iters 10 --run-dir runs/x --nodes 2".split()


@pytest.fixture
def job(tmp_path) -> JobConfig:
    return JobConfig(run_dir=str(tmp_path / "run"), nodes=2, ranks_per_node=4)


def shellcheck(*files: Path) -> None:
    """No complaint, not even about style. Files that are sourced are followed."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_job_scripts_are_clean(file):
    shellcheck(file)
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    text = file.read_text()
    assert not re.search(
        r"--(partition|account|qos|nodelist|reservation)|module load|/(scratch|gpfs|lustre|home)/", text
    )


def test_the_scripts_of_both_models_differ_in_the_model_only():
    gpt, bert = ((SLURM / f"pretrain_{name}.sbatch").read_text() for name in ("gpt", "bert"))
    body = gpt[gpt.index("#SBATCH") :].replace("gpt", "bert")
    assert body == bert[bert.index("#SBATCH") :]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_sound_for_its_nodes_and_fits(recipe):
    """The first line says on how many nodes, and the line of the layout how the ranks are spread."""
    text = recipe.read_text()
    nodes, gpus, memory = map(int, re.search(r"on (\d+) nodes? of (\d+) GPUs with (\d+) GB", text).groups())
    config = from_flat(yaml.safe_load(text) | MADE_UP | {"save": "unmade"})
    assert validate.check(config, nodes * gpus) == []
    assert f"--world-size {nodes * gpus}" in text
    layout = dict(re.findall(r"\b(tp|pp|dp)=(\d+)", text.partition("Layout: ")[2].partition(". ")[0]))
    sizes = {key: int(layout.get(key, 1)) for key in ("tp", "pp", "dp")}
    assert (sizes["tp"], sizes["pp"]) == (
        config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size,
    )  # fmt: skip
    assert sizes["tp"] * sizes["pp"] * sizes["dp"] == nodes * gpus
    stages = estimate_stages(validate.resolve(config, nodes * gpus), nodes * gpus)
    assert max(stage.total_bytes for stage in stages) < 0.7e9 * memory
    billions = sum(stage.parameters for stage in stages) * sizes["tp"] / 1e9
    assert billions == pytest.approx(float(re.search(r"of ([\d.]+) billion", text)[1]), rel=0.1)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_what_is_written_is_clean(job, launcher, tmp_path):
    made = JobConfig(**vars(job) | {"launcher": launcher, "options": ("--constraint=a100",)})
    file = keep(made, from_flat(MADE_UP), snapshot_folder(made))
    shellcheck(file)
    assert "#SBATCH --constraint=a100\n" in file.read_text()
    tasks = 4 if launcher == "srun" else 1
    assert f"#SBATCH --nodes=2\n#SBATCH --ntasks-per-node={tasks}\n" in file.read_text()


def test_what_is_kept_runs_by_itself(job, tmp_path):
    """The copy of the code reads the copy of the configuration, whatever becomes of the checkout."""
    config = from_flat(MADE_UP | {"train_iters": 3, "num_layers": 2})
    file = keep(job, config, snapshot_folder(job))
    code = file.parent / "code"
    command = [sys.executable, code / "pretrain_gpt.py", "--config", file.parent / "config.yaml", "--world-size", "8"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "layers        2" in done.stdout, done.stderr
    assert snapshot_folder(job).name == "submitted-2"


HOSTILE = ["x; touch owned", "$(touch owned)", "`touch owned`", "a'b", 'a"b', "a\nb", "#!", "--wrap=touch owned", "a b"]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_recipe_reaches_a_shell(text, tmp_path):
    """Names that go to SLURM are refused; folders are quoted; what is left in the script are the words themselves."""
    for key in ("name", "partition", "account", "time"):
        assert problems_of(JobConfig("run", 1, **{key: text}))
    assert problems_of(JobConfig("run", 1, options=(f"--comment={text}",)))
    if "\n" in text:
        assert problems_of(JobConfig(text, 1))
        return
    for launcher in ("srun", "torchrun"):
        job = JobConfig(f"{tmp_path}/{text}", 1, python=f"/bin/{text}", launcher=launcher)
        assert not problems_of(job)
        words = shlex.split(script(job, snapshot_folder(job)), comments=True)
        assert f"{tmp_path}/{text}/checkpoints" in words
        if launcher == "srun":
            assert f"/bin/{text}" in words
        else:
            inner = next(word for word in words if word.startswith("exec "))
            assert shlex.split(inner)[1] == f"/bin/{text}"


def test_options_that_would_take_the_script_away_are_refused():
    for option in ("--wrap=true", "--output=x", "--error=x", "nodes=3"):
        assert problems_of(JobConfig("run", 1, options=(option,)))
    assert not problems_of(JobConfig("run", 1, options=("--exclude=node[1-3,7]", "--mail-user=a@b.org")))


def test_all_problems_before_anything_is_submitted(tmp_path):
    with pytest.raises(ConfigError) as refused:
        read([*SOUND, "--tp", "5", "--global-batch-size", "7", "--bogus", "1"])
    assert [p.message for p in refused.value.problems] == ["unknown flag --bogus"]
    with pytest.raises(ConfigError) as refused:
        read([*SOUND, "--tp", "5", "--global-batch-size", "7"])
    said = " ".join(p.message for p in refused.value.problems)
    assert "16 ranks" in said and "--num-attention-heads 12" in said
    for flags, wanted in {
        "--save here": "--save: these lie in --run-dir",
        "--nodes 0": "--nodes 0 must be at least 1",
        "--ranks-per-node 0": "",
    }.items():
        try:
            read([*SOUND, *flags.split()])
        except ConfigError as error:
            assert wanted and wanted in error.problems[0].message


def test_a_cluster_file_sets_what_is_the_same_in_all_jobs(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("partition: gpu\ngpus_per_node: 4\noptions: [--exclusive=user]\n")
    job, config = read([*SOUND, "--cluster", str(file), "--tp", "4"])
    options = sbatch_options(job)
    assert {"--partition=gpu", "--gpus-per-node=4", "--ntasks-per-node=4", "--exclusive=user"} <= set(options)
    assert config.parallel.tensor_model_parallel_size == 4
    assert read([*SOUND, "--cluster", str(file), "--gpus-per-node", "8"])[0].ranks == 8
    file.write_text("partitoin: gpu\n")
    with pytest.raises(ConfigError) as refused:
        read([*SOUND, "--cluster", str(file)])
    assert "unknown partitoin" in refused.value.problems[0].message


def test_without_sbatch_the_script_is_left_and_named(tmp_path):
    command = [sys.executable, ROOT / "tools/submit.py", *SOUND, "--run-dir", tmp_path / "run"]
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 1 and done.stderr.startswith("error: sbatch cannot be run") and done.stderr.count("\n") == 1
    )
    assert (tmp_path / "run/submitted-1/job.sbatch").exists()
    dry = subprocess.run([*map(str, command), "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert dry.stdout.startswith("#!/bin/bash\n") and not (tmp_path / "run/submitted-2").exists()
