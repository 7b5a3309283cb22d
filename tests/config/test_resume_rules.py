"""What may change when a run resumes: reported, refused, or allowed by a flag. Nothing is trained
here; test_flags and test_resume do."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from megalite.config import cli, validate
from megalite.config.problem import ConfigError, Problem
from megalite.config.run import RunConfig, from_flat
from megalite.config.yaml_file import to_yaml
from tests.config.validation import SOUND, fixed, write_index

MADE_WITH = """
    --mock-data --vocab-size 512 --train-iters 10 --num-layers 4 --hidden-size 64 --seq-length 32
    --num-attention-heads 4 --position-embedding-type rope --lr 0.001 --weight-decay 0.1 --bf16
    --adam-beta2 0.95 --hidden-dropout 0.0 --attention-dropout 0.0 --global-batch-size 4
    --norm-epsilon 1e-6 --lr-warmup-fraction 0.2
""".split()
UNASKED = ("--lr", "--weight-decay", "--bf16", "--adam-beta2", "--hidden-dropout")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a checkpoint of MADE_WITH in `run`: what the rules look at of it."""
    monkeypatch.chdir(tmp_path)
    save("run", validate.resolve(cli.read_config(MADE_WITH), 1))
    return tmp_path


def save(name: str, config: RunConfig, iteration: int = 5, **state) -> None:
    step = f"{name}/iter_{iteration:07d}"
    os.makedirs(step)
    for file, text in {
        f"{step}/state.json": json.dumps({"data": None, **state}),
        f"{step}/config.yaml": to_yaml(config),
        f"{name}/latest_checkpointed_iteration.txt": str(iteration),
    }.items():
        with open(file, "w") as stream:
            stream.write(text)
    write_index(Path(step))


def check(argv: list[str], ranks: int = 1) -> list[Problem]:
    """What the program finds."""
    _, asked = cli._read_command_line(argv, None)
    return validate.check(asked.config, ranks, asked.values)


def without(*flags: str) -> list[str]:
    """The flags of the checkpoint, without some and their values."""
    kept = []
    skipping = False
    for word in MADE_WITH:
        if word.startswith("--"):
            skipping = word in flags
        if not skipping:
            kept.append(word)
    return kept


def test_the_same_flags_resume(folder):
    assert check([*MADE_WITH, "--load", "run"]) == []
    assert check(["--config", "run/iter_0000005/config.yaml", "--load", "run"]) == []


def test_what_is_given_may_change(folder):
    """The run then prints what has changed, see tests/test_resume.py."""
    changed = "--lr 0.002 --weight-decay 0.2 --no-bf16 --adam-beta2 0.999 --hidden-dropout 0.1"
    more = "--global-batch-size 8 --clip-grad 0.5 --lr-decay-style linear --load run"
    assert check([*MADE_WITH, *changed.split(), *more.split()]) == []


def test_what_is_not_given_must_be_as_it_was(folder):
    """All at once; each names what would keep it, and that works."""
    argv = [*without(*UNASKED), "--load", "run"]
    problems = check(argv)
    assert len(problems) == len(UNASKED)
    for flag, wanted in (
        ("--lr 0.001; this run does not give --lr, and would go on with --lr 0.0003", "--lr 0.001"),
        ("--weight-decay 0.1", "--weight-decay 0.1"),
        ("--adam-beta2 0.95", "--adam-beta2 0.95"),
        ("--precision bf16", "--precision bf16"),
        ("--hidden-dropout 0", "--hidden-dropout 0"),
    ):
        (problem,) = [p for p in problems if f"was made with {flag}" in p.message]
        assert problem.fix.startswith(wanted) and "where the change is meant" in problem.fix
        argv += problem.fix.partition(", or ")[0].split()
    assert check(argv) == []


FORGOTTEN = {
    "--min-lr 1e-5": "with --min-lr 0.0001",
    "--lr-decay-iters 8": "with --lr-decay-iters 10",
    "--lr-decay-style WSD --lr-wsd-decay-iters 2": "without it",
    "--decoupled-lr 0.01": "without it",
    "--decoupled-lr 0.01 --decoupled-min-lr 0.002": "without it",
    "--weight-decay-incr-style linear --start-weight-decay 0.0 --end-weight-decay 1": "without it",
    "--parameter-groups layers.0.*_freeze": "without it",
    "--max-bad-steps 3 --skip-grad-norm-above 10": "",
    "--rampup-batch-size 2 2 8": "without it",
}


@pytest.mark.parametrize("flags", FORGOTTEN)
def test_what_has_no_default_and_is_not_given(folder, flags):
    """It is refused as well: the run would go on with other learning rates or trained weights."""
    words = [word.replace("_freeze", " freeze") for word in flags.split()]
    made_with = without("--weight-decay") if "--start-weight-decay" in words else MADE_WITH
    save("other", validate.resolve(cli.read_config([*made_with, *words]), 1))
    argv = [*made_with, "--load", "other"]
    assert check([*argv, *words]) == []
    problems = check(argv)
    assert any(FORGOTTEN[flags] in problem.message for problem in problems) or not FORGOTTEN[flags]
    for problem in problems:
        assert "other/iter_0000005 was made with" in problem.message
        assert "where the change is meant" in problem.fix
        argv += shlex.split(problem.fix.partition(", or ")[0])
    assert check(argv) == []


def test_what_follows_from_a_flag_that_is_given(folder):
    """--min-lr from --lr, the end of the decay from --train-iters. A constant rate uses neither."""
    longer = [*without("--lr", "--train-iters"), "--lr", "0.002", "--train-iters", "20"]
    assert check([*longer, "--load", "run"]) == []
    save("low", validate.resolve(cli.read_config([*MADE_WITH, "--min-lr", "1e-5"]), 1))
    (problem,) = check([*longer, "--load", "low"])
    assert "with --min-lr 1e-05; this run does not give --min-lr" in problem.message
    assert check([*longer, "--load", "low", "--lr-decay-style", "constant"]) == []
    (folder / "flags.yaml").write_text("parameter_groups: null\n")
    frozen = [*MADE_WITH, "--parameter-groups", "layers.0.* freeze"]
    save("frozen", validate.resolve(cli.read_config(frozen), 1))
    assert len(check([*MADE_WITH, "--load", "frozen"])) == 1
    assert check([*MADE_WITH, "--load", "frozen", "--config", "flags.yaml"]) == []


def test_a_batch_size_that_follows_from_the_ranks(folder):
    """4 on one rank was given; on 2 ranks it would become 2 by itself."""
    (problem,) = check([*without("--global-batch-size"), "--load", "run"], ranks=2)
    assert "--global-batch-size 4; this run does not give" in problem.message
    assert "would go on with --global-batch-size 2" in problem.message


def test_a_fine_tuning_compares_the_model_alone(folder):
    argv = [*without(*UNASKED, "--global-batch-size"), "--load", "run", "--finetune"]
    assert check(argv) == []
    (problem,) = check([*argv, "--rotary-base", "500000"])
    assert "has rotary_base 10000.0, this run has 500000.0" in problem.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--rotary-base 500000", "rotary_base 10000.0, this run has 500000.0"),
        ("--norm-epsilon 1e-5", "norm_epsilon 1e-06, this run has 1e-05"),
        ("--gelu erf", "gelu tanh, this run has erf"),
        ("--rope-scaling llama3", "rope_scaling none, this run has llama3"),
    ],
)
@pytest.mark.parametrize("how", ["--load", "--pretrained-checkpoint"])
def test_another_model_of_the_same_shapes(folder, change, words, how):
    """It is refused, and a flag allows it."""
    argv = [*MADE_WITH, *change.split(), how, "run"]
    (problem,) = check(argv)
    assert words in problem.message and "--allow-model-change" in problem.fix
    config = cli.read_config(argv)
    for offer, repaired, _ in fixed(config, 1, problem):
        assert validate.check(repaired, 1) == [], offer
    assert check([*argv, "--allow-model-change"]) == []


def test_another_shape_is_not_allowed_by_a_flag(folder):
    (problem,) = check([*MADE_WITH, "--num-layers", "5", "--load", "run", "--allow-model-change"])
    assert "num_layers 4, this run has 5" in problem.message
    assert "allow-model-change" not in problem.fix


def test_the_model_of_the_checkpoint(folder):
    """--use-checkpoint-args: what is given wins, and contradicts like any flag."""
    shape = ("--num-layers", "--hidden-size", "--seq-length", "--num-attention-heads")
    argv = [*without(*shape, "--vocab-size", "--norm-epsilon"), "--use-checkpoint-args"]
    for how in ("--load", "--pretrained-checkpoint"):
        config = cli.read_config([*argv, how, "run"])
        assert config.model.filled() == replace(cli.read_config(MADE_WITH).model.filled())
        assert check([*argv, how, "run"]) == []
    (problem,) = check([*argv, "--load", "run", "--num-layers", "2"])
    assert "num_layers 4, this run has 2" in problem.message
    with pytest.raises(ConfigError, match="use-checkpoint-args: other holds no checkpoint"):
        cli.read_config([*argv, "--load", "other", "--save", "other"])


@pytest.mark.parametrize("how", ["--load", "--pretrained-checkpoint"])
def test_the_model_of_a_checkpoint_that_cannot_be_read(folder, how):
    """Its file is named, with what is wrong; --load-fallback takes the one before it."""
    shape = ("--num-layers", "--hidden-size", "--seq-length", "--num-attention-heads")
    save("run", validate.resolve(cli.read_config(MADE_WITH), 1), iteration=8)
    argv = [*without(*shape), "--use-checkpoint-args", how, "run"]
    stored = folder / "run" / "iter_0000008" / "config.yaml"
    whole = stored.read_text()

    def made_by_a_later_version() -> None:
        stored.write_text("layers: 1")
        (stored.parent / "index.json").unlink()
        write_index(stored.parent)

    for damage, words in (
        (lambda: stored.write_text(""), f"config.yaml has 0 bytes instead of {len(whole)}"),
        (lambda: stored.write_text(whole[:-9]), f"bytes instead of {len(whole)}"),
        (lambda: stored.write_text(whole.replace("64", "65")), "config.yaml differs from its che"),
        (made_by_a_later_version, "iter_0000008/config.yaml: unknown key 'layers'"),
        (stored.unlink, "run/iter_0000008/config.yaml is missing"),
    ):
        damage()
        with pytest.raises(ConfigError) as caught:
            cli.read_config(argv)
        (problem,) = caught.value.problems
        assert "--use-checkpoint-args: the model cannot be taken from run: run/" in problem.message
        assert words in problem.message
        first = "--ckpt-step 5" if how == "--load" else "--pretrained-checkpoint run/iter_0000005"
        assert problem.fix.startswith(f"{first}, or --load-fallback, or give the model's flags")
        assert cli.read_config([*argv, *first.split()]).model.num_layers == 4
        assert cli.read_config([*argv, "--load-fallback"]).model.num_layers == 4


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.yaml", "a: ["),
        ("config.yaml", ""),
        ("state.json", "{"),
        ("state.json", '{"optimizer": "lion"}'),
        ("index.json", "{"),
        ("index.json", None),
    ],
)
def test_the_fallback_compares_the_checkpoint_that_is_read(folder, file, damage):
    """--load-fallback: what is compared is the first that can be read."""
    resolved = validate.resolve(cli.read_config(MADE_WITH), 1)
    changed = replace(resolved, model=replace(resolved.model, norm_epsilon=1e-4))
    save("run", changed, iteration=8, optimizer="adam", history=[5])
    save("run", changed, iteration=7, optimizer="adam", history=[])  # of another branch
    (folder / "run" / "latest_checkpointed_iteration.txt").write_text("8")
    argv = [*without("--lr"), "--load", "run", "--load-fallback"]
    messages = [problem.message for problem in check(argv)]
    assert len(messages) == 2 and all("run/iter_0000008" in message for message in messages)
    path = folder / "run" / "iter_0000008" / file
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    if file == "state.json":  # which checkpoints are of its run is not known
        (folder / "run" / "iter_0000007" / "index.json").unlink()
    (problem,) = check(argv)
    assert "run/iter_0000005 was made with --lr 0.001" in problem.message


@pytest.mark.parametrize(
    ("state", "words", "fix"),
    [
        (
            {"optimizer": "lion"},
            "holds the state of --optimizer lion, this run uses adam",
            "--optimizer lion --adam-beta2 0.999, or --no-load-optim",
        ),
        ({"optimizer": "later"}, "--optimizer later, this run uses adam", "--no-load-optim"),
        ({"optimizer": None}, "was saved with --no-save-optim", "--no-load-optim"),
        (
            {"optimizer": None, "converted_from": "hf llama"},
            "holds weights alone (converted from hf llama)",
            "--pretrained-checkpoint in place of --load, or --finetune",
        ),
    ],
)
def test_another_optimizer(folder, state, words, fix):
    """It is refused before the checkpoint is read, once, with what would work."""
    known = state["optimizer"] if state["optimizer"] == "lion" else "adam"
    made_with = [*without("--adam-beta2"), "--optimizer", known]
    save("other", validate.resolve(cli.read_config(made_with), 1), **state)
    for given in ([], ["--optimizer", "adam"]):
        argv = [*MADE_WITH, *given, "--load", "other"]
        (problem,) = check(argv)
        assert words in problem.message and problem.fix.startswith(fix)
        for more in ("--no-load-optim", "--finetune"):
            assert words not in "".join(p.message for p in check([*argv, more]))
        assert check([*MADE_WITH, *given, "--pretrained-checkpoint", "other"]) == []
    assert check([*argv, "--no-load-optim"]) == []


@pytest.mark.parametrize("how", ["--load", "--pretrained-checkpoint"])
def test_a_damaged_configuration_is_not_compared(folder, how):
    """An empty file would read as the defaults, which are another model. With --load, loading
    names the file."""
    stored = folder / "run" / "iter_0000005" / "config.yaml"
    size = stored.stat().st_size
    stored.write_text("")
    problems = check([*MADE_WITH, how, "run"])
    if how == "--load":
        assert problems == []
    else:
        (problem,) = problems
        assert f"config.yaml has 0 bytes instead of {size}" in problem.message


def test_weights_to_start_from_that_are_damaged(folder):
    """The latest cannot be read: it is named, and what is offered works."""
    resolved = validate.resolve(cli.read_config(MADE_WITH), 1)
    save("run", resolved, iteration=8)
    argv = [*MADE_WITH, "--pretrained-checkpoint", "run"]
    latest = folder / "run" / "latest_checkpointed_iteration.txt"
    index = folder / "run" / "iter_0000008" / "index.json"
    for damage, words in (
        (index.unlink, "run/iter_0000008/index.json is missing"),
        (lambda: latest.write_text("?"), "latest_checkpointed_iteration.txt should hold an iter"),
    ):
        damage()
        (problem,) = check(argv)
        assert f"--pretrained-checkpoint run cannot be read: run/{words}"[:40] in problem.message
        assert words in problem.message
        assert problem.fix.startswith("--pretrained-checkpoint run/iter_0000005, or --load-fall")
        for offer, repaired, _ in fixed(cli.read_config(argv), 1, problem):
            assert validate.check(repaired, 1) == [], offer
    # None can be read: another folder is offered, not this one.
    save("rum", resolved)
    for stored in folder.glob("run/*/config.yaml"):
        stored.unlink()
    (problem,) = check([*argv, "--load-fallback"])
    assert problem.fix == "--pretrained-checkpoint rum"


def test_weights_to_start_from(folder):
    """They count where --load holds no checkpoint, and must be there only then."""
    first = [*MADE_WITH, "--save", "new", "--load", "new", "--exit-on-missing-checkpoint"]
    assert check([*first, "--pretrained-checkpoint", "run"]) == []
    (problem,) = check(first)
    assert "new holds no checkpoint yet" in problem.message
    (problem,) = check([*first, "--pretrained-checkpoint", "rnu"])
    assert "--pretrained-checkpoint rnu holds no checkpoints" in problem.message
    assert problem.fix.startswith("--pretrained-checkpoint run")
    save("new", validate.resolve(cli.read_config(MADE_WITH), 1))
    assert check([*first, "--pretrained-checkpoint", "rnu"]) == []
    config = from_flat(SOUND | {"load": "new", "finetune": True, "pretrained_checkpoint": "run"})
    messages = [problem.message for problem in validate.check(config, 1)]
    assert any("--pretrained-checkpoint run has no effect" in message for message in messages)
