"""tools/submit.py, the job scripts and the recipes: what can be tested without a cluster."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megalite.config import validate
from megalite.config.estimate import estimate_ranks
from megalite.config.problem import ConfigError
from megalite.config.run import from_flat
from megalite.programs.submit import (
    JobConfig,
    keep,
    problems_of,
    read,
    sbatch_options,
    script,
    seconds,
    snapshot_folder,
)

ROOT = Path(__file__).resolve().parents[1]

SLURM = ROOT / "examples/slurm"
RECIPES = sorted(SLURM.glob("recipes/*.yaml"))
FILES = sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")])
SIZES = {"gpt-1.3b": 1, "gpt-7b": 4, "gpt-20b": 8, "gpt-175b": 128}
"""Nodes of 8 GPUs for each recipe."""
SYNTHETIC = dict(
    data_path=None,
    tokenizer_type=None,
    vocab_file=None,
    merge_file=None,
    mock_data=True,
    vocab_size=50257,
)
MOCK = """
    --mock-data --vocab-size 9 --data-path unset --tokenizer-type unset --vocab-file unset
    --merge-file unset
""".split()
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
        r"--(partition|account|qos|nodelist|reservation)|module load|/(scratch|gpfs|lustre|home)/",
        text,
    )


@pytest.mark.parametrize("number", ["0", "010", "x", "-1", "a[$(touch owned)]", "--nodes=4"])
def test_what_is_no_number_of_jobs_is_refused_before_any_is_submitted(number, tmp_path):
    """In bash, 010 is eight, and the index of an array may be a command."""
    for name, *words in (
        ["chain.sh", number, "a.sbatch"],
        ["preprocess.sh", "data/c", "--input", "c.jsonl"],
    ):
        command = ["bash", SLURM / name, *words]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"SHARDS": number},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert re.search(rf"{re.escape(number)} is not a number of ", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file", sorted(SLURM.glob("pretrain_*.sbatch")), ids=lambda path: path.name
)
def test_elsewhere_than_in_the_checkout_a_job_script_ends_with_that(file, tmp_path):
    environment = os.environ | dict.fromkeys(("SAVE", "IMAGE", "MOUNT"), str(tmp_path))
    done = subprocess.run(
        ["bash", file], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "supervise.sh: No such file" in done.stderr
    )


def test_the_scripts_of_both_models_differ_in_the_model_only():
    gpt = (SLURM / "pretrain_gpt.sbatch").read_text()
    bert = (SLURM / "pretrain_bert.sbatch").read_text()
    body = gpt[gpt.index("#SBATCH") :].replace("gpt", "bert")
    assert body == bert[bert.index("#SBATCH") :]


def test_there_is_a_recipe_for_each_size():
    assert {recipe.stem for recipe in RECIPES} == set(SIZES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_sound_for_its_nodes_and_fits(recipe, tmp_path):
    """Its first line gives the number of nodes, the line of the layout the sizes of the axes."""
    text = recipe.read_text()
    nodes, gpus, memory = map(
        int, re.search(r"on (\d+) nodes? of (\d+) GPUs with (\d+) GB", text).groups()
    )
    assert (nodes, gpus) == (SIZES[recipe.stem], 8)
    config = from_flat(yaml.safe_load(text) | SYNTHETIC | {"save": "unmade"})
    check = (
        re.search(r"Check: python (.*)", text)[1]
        .replace("THIS", str(recipe))
        .replace("FOLDER", "unmade")
        .split()
    )
    done = subprocess.run([sys.executable, *check, *MOCK], cwd=ROOT, capture_output=True, text=True)
    assert f"ranks         {nodes * gpus} = tensor " in done.stdout, done.stderr
    shellcheck(keep(JobConfig(str(tmp_path), nodes), config, tmp_path / "submitted-1"))
    layout = dict(
        re.findall(r"\b(tp|pp|dp)=(\d+)", text.partition("Layout: ")[2].partition(". ")[0])
    )
    sizes = dict(tp=1, pp=1, dp=1)
    for axis, size in layout.items():
        sizes[axis] = int(size)
    assert (sizes["tp"], sizes["pp"]) == (
        config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size,
    )  # fmt: skip
    assert sizes["tp"] * sizes["pp"] * sizes["dp"] == nodes * gpus
    ranks = estimate_ranks(validate.resolve(config, nodes * gpus), nodes * gpus)
    assert max(rank.total_bytes for rank in ranks) < 0.7e9 * memory
    billions = sum(rank.parameters for rank in ranks) * sizes["tp"] / 1e9
    assert billions == pytest.approx(float(re.search(r"of ([\d.]+) billion", text)[1]), rel=0.1)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_what_is_written_is_clean(job, launcher, tmp_path):
    made = JobConfig(
        **vars(job)
        | {"launcher": launcher, "options": ("--constraint=a100",), "save_before_end": 77}
    )
    file = keep(made, from_flat(SYNTHETIC), snapshot_folder(made))
    shellcheck(file)
    assert "#SBATCH --constraint=a100\n" in file.read_text()
    assert ("--shutdown-timeout=77 " in file.read_text()) == (launcher == "torchrun")
    tasks = 4 if launcher == "srun" else 1
    assert f"#SBATCH --nodes=2\n#SBATCH --ntasks-per-node={tasks}\n" in file.read_text()


def test_what_is_kept_runs_by_itself(job, tmp_path):
    """The copy of the code reads the copy of the configuration, without the checkout."""
    config = from_flat(SYNTHETIC | {"train_iters": 3, "num_layers": 2})
    file = keep(job, config, snapshot_folder(job))
    code = file.parent / "code"
    command = [
        sys.executable,
        code / "pretrain_gpt.py",
        "--config",
        file.parent / "config.yaml",
        "--world-size",
        "8",
    ]
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "layers        2" in done.stdout, done.stderr
    assert snapshot_folder(job).name == "submitted-2"


HOSTILE = [
    "x; touch owned",
    "$(touch owned)",
    "`touch owned`",
    "a'b",
    'a"b',
    "a\nb",
    "#!",
    "--wrap=touch owned",
    "a b",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_recipe_reaches_a_shell(text, tmp_path):
    """Names for SLURM are refused, folders are quoted: the script contains only the words."""
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


TAKEN = """
    --wrap=true --output=x --error=x --out=x --nodes=3 --node=3 --nod=3 -N3 nodes=3 --ntasks=3
    --ntasks-per-gpu=1 --nt=3 --signal=INT --sig=INT --requeue --no-requeue --no-req --export=NONE
    --array=1-3 --time=1 --ti=1 --gpus-per-node=1 --job-name=x --open-mode=truncate
    --cpus-per-task=1 --test-only --tasks-per-node=3 --tasks=3 --chdir=/ --
""".split()


@pytest.mark.parametrize("option", TAKEN)
def test_options_that_would_undo_what_the_script_needs_are_refused(option):
    """Whole, or as short as sbatch takes them; by themselves or among others."""
    for options in [(option,), ("--exclusive", option), (f"--exclusive {option}",)]:
        assert problems_of(JobConfig("run", 1, options=options)), options


def test_other_options_are_handed_on():
    job, _ = read([*SOUND, "--options=--exclude=node[1-3,7] --exclusive", "--partition", "gpu"])
    assert sbatch_options(job)[-2:] == ["--exclude=node[1-3,7]", "--exclusive"]
    assert not problems_of(
        JobConfig("run", 1, options=("--partition=gpu", "--mail-user=a@b.org", "--nodelist=a"))
    )
    assert problems_of(JobConfig("run", 1, options=("--partition=gpu",), partition="cpu"))


def problems(*argv: str) -> list[str]:
    """What is said of each mistake."""
    with pytest.raises(ConfigError) as refused:
        read(list(argv))
    return [problem.message for problem in refused.value.problems]


def test_all_problems_before_anything_is_submitted(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("partitoin: gpu\nlauncher: foo\nsave_before_end: soon\nnodes: [1, 2]\n")
    assert problems(
        "--cluster", str(file), "--bogus", "1", "--lr", "x", "--save=y", "--options=-N3"
    ) == [
        f"--cluster {file}: unknown flag --partitoin",
        f"--cluster {file}: --launcher: 'foo' is not one of srun, torchrun",
        f"--cluster {file}: --save_before_end: 'soon' is not a whole number",
        f"--cluster {file}: --nodes: '1 2' is not a whole number",
        "unknown flag --bogus",
        "--lr: 'x' is not a number",
        "--run-dir is missing",
        "--nodes is missing",
        "--options: '-N3' is not accepted here",
        "--save: follows from --run-dir and --nodes",
    ]
    said = " ".join(problems(*SOUND, "--tp", "5", "--global-batch-size", "7"))
    assert "16 ranks" in said and "--num-attention-heads 12" in said


@pytest.mark.parametrize("key", ["run_dir", "name", "partition", "account"])
def test_what_a_variable_that_is_not_set_leaves_empty_is_refused(key):
    """A run in the folder where one stands, or a default that nobody asked for."""
    assert len(problems(*SOUND, f"--{key.replace('_', '-')}", "")) == 1


def test_a_value_that_is_none_is_not_missing_as_well():
    assert problems(*SOUND[:-1], "two") == ["--nodes: 'two' is not a whole number"]


def test_numbers_that_sbatch_would_refuse_are_refused():
    assert problems(*SOUND, "--gpus-per-node", "-1", "--ranks-per-node", "1") == [
        "--gpus-per-node -1 must be a whole number from 0"
    ]
    assert read([*SOUND, "--gpus-per-node", "0", "--ranks-per-node", "1"])[0].ranks == 1
    assert problems(*SOUND, "--save-before-end", "65536") == [
        "--save-before-end 65536 must be a whole number from 1 to 65535"
    ]
    assert read([*SOUND, "--save-before-end", "65535"])[0].save_before_end == 65535


@pytest.mark.parametrize(
    "flag", ["--nodes 0", "--ranks-per-node 0", "--cpus-per-rank 0", "--save-before-end 0"]
)
def test_numbers_below_one_are_refused(flag):
    (problem,) = problems(*SOUND, *flag.split())
    assert problem.startswith(f"{flag} must be ") and " 1" in problem


@pytest.mark.parametrize("key", ["save", "load", "metrics_file", "world_size"])
def test_what_follows_from_the_job_is_refused_however_it_is_written(key, tmp_path):
    value = "8" if key == "world_size" else "here"
    recipe = tmp_path / "recipe.yaml"
    flag = "--" + key.replace("_", "-")
    for name in {key, key.replace("_", "-")}:
        recipe.write_text(f"{name}: {value}\n")
        for words in (
            [f"--{name}", value],
            [f"--{name}={value}"],
            ["--config", str(recipe)],
            [f"--config={recipe}"],
        ):
            assert problems(*SOUND, *words) == [f"{flag}: follows from --run-dir and --nodes"], (
                words
            )
    recipe.write_text(f"{key}: null\n")
    read([*SOUND, "--config", str(recipe)])


def test_a_time_limit_leaves_time_to_save():
    limits = {
        "90": 5400,
        "90:30": 5430,
        "24:00:00": 86400,
        "1-12": 129600,
        "1-0:30": 88200,
        "1-0:0:5": 86405,
    }
    assert {text: seconds(text) for text in limits} == limits
    for text in ("soon", "1:2:3:4", "-5", "1-", "", "1.5"):
        assert seconds(text) is None
        wrong = f"{text!r} is no time limit" if text else "is empty"
        assert problems(*SOUND, f"--time={text}") == [f"--time {wrong}"]
    too_late = "--save-before-end 300 is not less than the 300 seconds of --time 5"
    assert problems(*SOUND, "--time", "5") == [too_late]
    assert read([*SOUND, "--time", "6"])[0].time == "6"


def test_a_cluster_file_sets_what_is_the_same_in_all_jobs(tmp_path):
    """Its values are text: YAML would read 86400 and 83 for the time and the account."""
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "partition: gpu\naccount: 0123\ntime: 12:00:00\ngpus-per-node: 4\n"
        "save_before_end: 60\ncpus_per_rank: unset\n"
        "options: [--exclusive=user, --constraint=a100]\n"
    )
    job, config = read([*SOUND, "--cluster", str(file), "--tp", "4"])
    assert sbatch_options(job) == [
        "--job-name=pretrain", "--nodes=2", "--ntasks-per-node=4", "--time=12:00:00",
        "--gpus-per-node=4", "--signal=B:USR1@60", "--open-mode=append", "--partition=gpu",
        "--account=0123", "--requeue", "--exclusive=user", "--constraint=a100",
    ]  # fmt: skip
    assert config.parallel.tensor_model_parallel_size == 4
    assert read([*SOUND, "--cluster", str(file), "--gpus-per-node", "8"])[0].ranks == 8
    for text, wanted in {
        "[a]": "holds no names and values",
        "name: [a, b]": "is no option for sbatch",
        "a: b: c": "mapping",
    }.items():
        file.write_text(text)
        assert wanted in problems(*SOUND, "--cluster", str(file))[0]
    assert "No such file" in problems(*SOUND, "--cluster", str(tmp_path / "none.yaml"))[0]


def test_the_cluster_file_of_the_docs_is_read(tmp_path):
    text = (ROOT / "docs/slurm.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.*?)```", text, re.M | re.S)
    (tmp_path / "my.yaml").write_text(shown)
    job, _ = read([*SOUND, "--cluster", str(tmp_path / "my.yaml")])
    assert (job.account, job.time) == ("0123", "12:00:00")
    assert sbatch_options(job)[-2:] == ["--constraint=a100", "--exclusive"]


def test_other_folders_beside_the_copies_do_no_harm(job, tmp_path):
    for name in ("submitted-1.bak", "submitted-x", "submitted-9"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert snapshot_folder(job).name == "submitted-10"


def test_a_number_of_a_job_may_name_its_cluster(tmp_path):
    """sbatch --parsable may print number;cluster; a dependency takes the number only."""
    (tmp_path / "sbatch").write_text(
        '#!/bin/bash\necho "$*" >>"$TRACE"\necho "$(wc -l <"$TRACE");alpha"\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TRACE": str(tmp_path / "trace"),
    }

    def run(*command: str) -> tuple[str, list[str]]:
        (tmp_path / "trace").write_text("")
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout, re.findall(r"--dependency=\S+", (tmp_path / "trace").read_text())

    said, after = run("examples/slurm/chain.sh", "3", "a.sbatch")
    assert said == "job 1\njob 2\njob 3\n" and after == [
        "--dependency=afterok:1",
        "--dependency=afterok:2",
    ]
    said, after = run("examples/slurm/preprocess.sh", "data/c", "--input", "c.jsonl")
    assert said.startswith("array 1, then merge 2: ") and after == ["--dependency=afterok:1"]
    said, _ = run(sys.executable, "tools/submit.py", *SOUND, "--run-dir", str(tmp_path / "run"))
    assert said.startswith("job 1: ") and "scancel 1 " in said


def test_the_script_finds_relative_data_wherever_it_is_submitted_again(job, tmp_path, monkeypatch):
    here, there = tmp_path / "a $(touch owned) 'b'", tmp_path / "there"
    here.mkdir(), there.mkdir()
    monkeypatch.chdir(here)
    file = tmp_path / "job.sbatch"
    start = script(job, snapshot_folder(job)).partition("source ")[0]
    file.write_text(start + "pwd\n")
    done = subprocess.run(["bash", file], cwd=there, capture_output=True, text=True)
    assert done.stdout == f"{here}\n", done.stderr
    here.rmdir()
    assert subprocess.run(["bash", file], cwd=there, capture_output=True).returncode == 1


def test_without_sbatch_the_script_is_left_and_named(tmp_path):
    command = [sys.executable, ROOT / "tools/submit.py", *SOUND, "--run-dir", tmp_path / "run"]
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: sbatch cannot be run")
        and done.stderr.count("\n") == 1
    )
    assert (tmp_path / "run/submitted-1/job.sbatch").exists()
    dry = subprocess.run(
        [*map(str, command), "--dry-run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert dry.stdout.startswith("#!/bin/bash\n") and not (tmp_path / "run/submitted-2").exists()
