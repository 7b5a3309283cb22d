"""Flags and YAML files -> RunConfig, the help, and how problems are reported. Pure."""

import dataclasses
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest

from megalite.config import cli
from megalite.config.flags import CHECKPOINTS_ELSEWHERE, ELSEWHERE
from megalite.config.problem import ConfigError
from megalite.config.run import RunConfig, options, to_flat
from megalite.fields import Field
from megalite.optim.config import EXAMPLE_GROUPS
from megalite.parallel.launch import LaunchInfo
from tests.config.validation import another_value, problems_of, write

ROOT = Path(cli.__file__).parents[2]
SOUND = ["--mock-data", "--vocab-size", "512", "--train-iters", "10"]


# Flags
# ----------------------------------------------------------------------------------------


def test_no_flags_give_the_defaults():
    assert cli.read_config([]) == RunConfig()


@pytest.mark.parametrize("key", [key for key in options() if key != "load_hf"])  # see test_load_hf
def test_each_flag_sets_its_field_and_no_other(key):
    option, value = options()[key], another_value(options()[key])
    for spelling in (
        option.flag,
        option.flag[:2] + option.flag[2:].replace("-", "_"),
        *option.field.aliases,
    ):
        if option.kind is bool:
            off = spelling.replace("--no", "-") if key.startswith("no_") else "--no-" + spelling[2:]
            argvs = [[spelling if value else off]]
        elif option.kind is tuple:
            argvs = [[spelling, *value], [spelling, *value, "--seed", "1234"]]
        else:
            argvs = [[spelling, str(value)], [f"{spelling}={value}"]]
        for argv in argvs:
            assert to_flat(cli.read_config(argv)) == to_flat(RunConfig()) | {key: value}, argv


def test_every_field_of_every_dataclass_is_an_option():
    fields = [
        f.name
        for section in dataclasses.fields(RunConfig)
        for f in dataclasses.fields(section.type)
    ]
    assert list(options()) == fields == list(to_flat(RunConfig()))


def test_the_last_of_several_wins():
    argv = "--tp 2 --tensor-model-parallel-size=4 --sp --no-sequence-parallel --lr 1 --lr 2e-4"
    config = cli.read_config(argv.split())
    assert (config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel) == (
        4,
        False,
    )
    assert config.optimizer.lr == 2e-4


def test_switches_have_one_natural_opposite():
    for argv, value in (("--no-load-optim", True), ("--no-load-optim --load-optim", False)):
        assert cli.read_config(argv.split()).checkpoint.no_load_optim is value
    assert cli.read_config(["--exit-signal-handler"]) == RunConfig()
    assert not cli.read_config(["--no-exit-signal-handler"]).training.exit_signal_handler
    assert "--no-load-optim" in problems_of("--no-no-load-optim")[0]


def test_values_may_begin_with_a_dash_or_be_joined():
    config = cli.read_config(["--lr", "-1", "--save=--odd", "--seed=-3"])
    assert (config.optimizer.lr, config.checkpoint.save, config.training.seed) == (
        -1.0,
        "--odd",
        -3,
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            "--tensor-model-paralel-size 8",
            "unknown flag --tensor-model-paralel-size --tensor-model-parallel-size",
        ),
        ("--tensor-model 8", "unknown --tensor-model"),  # no abbreviations
        ("--no-swigluu", "--no-swiglu"),
        ("--no-tp", "leave out --tp"),
        ("--num-layers 1e3", "--num-layers '1e3' whole number"),
        ("--num-layers 2.0", "'2.0' whole number"),
        ("--lr fast", "--lr 'fast' number"),
        ("--optimizer adm", "'adm' adam, sgd"),
        ("--save", "--save needs a value"),
        ("--save --swiglu", "--save needs a value"),
        ("--swiglu=yes", "--swiglu takes no value"),
        ("--swiglu true", "unexpected 'true'"),
        ("stray", "unexpected 'stray'"),
        ("--num-layers unset", "'unset' whole number"),
        ("--config", "--config needs a value"),
    ],
)
def test_a_mistake_on_the_command_line(argv, words):
    (printed,) = problems_of(*argv.split())
    for word in words.split():
        assert word in printed


@pytest.mark.parametrize("flag", list(ELSEWHERE))
def test_a_flag_of_megatron_hears_what_to_do_instead(flag):
    spelt = {flag, "--" + flag[2:].replace("-", "_")}
    for spelling in (*spelt, flag.replace("opt-param", "opt_param")):
        assert problems_of(spelling) == [f"unknown flag {flag} | {ELSEWHERE[flag]}"]
    known = {"--config", *(flag for option in options().values() for flag in option.switches)}
    for named in re.findall(r"--[a-z0-9-]+", ELSEWHERE[flag]):
        assert named in known, named


@pytest.mark.parametrize("page", ["optimizer", "megatron-lm"])
def test_the_table_of_megatron_s_flags_is_what_the_program_says(page):
    """What the table lists is a flag here, or has advice."""
    table = (ROOT / f"docs/{page}.md").read_text().partition("## Flags of Megatron-LM")[2]
    table = table.partition("\n## ")[0]
    here = {flag for option in options().values() for flag in option.switches}
    listed = []
    for row in re.findall(r"^\| (`--.*?) \| (.*) \|$", table, re.MULTILINE):
        listed += [
            (flag.replace("_", "-"), row[1]) for flag in re.findall("`(--[a-z0-9_-]+)", row[0])
        ]
    assert len(listed) > 50
    for flag, meaning in listed:
        assert (flag in here) != (flag in ELSEWHERE), flag
        assert flag in ELSEWHERE or not meaning.startswith("no:"), flag
    if page == "megatron-lm":
        assert {flag for flag, _ in listed} >= set(CHECKPOINTS_ELSEWHERE)


def test_all_mistakes_of_flags_and_file_at_once(tmp_path):
    file = write(tmp_path, "num_layer: 3\nlr: fast\nswiglu: 1\noptimizer: adm\n")
    printed = problems_of("--tpp", "2", "--num-layers", "x", "--config", file, "--pp")
    assert len(printed) == 7
    for word in (
        "num_layers",
        "lr: fast",
        "swiglu: 1",
        "adm is not",
        "--tpp",
        "--num-layers: 'x'",
        "--pp needs",
    ):
        assert sum(word in line for line in printed) == 1, word


# What the user sees
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_text() -> str:
    code = (
        "import sys\n"
        "from megalite.config import cli\n"
        "try: cli.parse_and_check(['--help'], 'Pretrain a GPT.')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    env = {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_shows_every_flag_its_default_and_its_words(help_text):
    flat = " ".join(help_text.replace("│", " ").split())
    for option in options().values():
        shown = option.flag if option.default is not True else "--no-" + option.flag[2:]
        assert f" {shown} " in flat or f" {shown}, " in flat
        for alias in option.field.aliases:
            assert f" {alias}" in flat
    assert flat.count("(default: ") == len(options()) + 2  # and --config, --print-config
    assert "Pretrain a GPT." in flat and "--config FILE.yaml" in flat


def test_help_is_grouped_and_fits_100_columns(help_text):
    for section in dataclasses.fields(RunConfig):
        assert f"\n{section.name} options:\n" in help_text
    assert max(map(len, help_text.splitlines())) <= 100
    for silly in ("--no-no-", "None", "{None}"):
        assert silly not in help_text


def launch(rank: int = 0, world_size: int = 1) -> LaunchInfo:
    return LaunchInfo(rank, world_size, rank, world_size, "env://", "torchrun")


def test_problems_are_printed_by_the_first_rank_only(capsys, monkeypatch):
    """The other leaves it the time to: a launcher ends all ranks as soon as one has ended."""
    monkeypatch.setattr(cli, "START_SKEW_SECONDS", 0.3)
    monkeypatch.setattr(cli, "OTHERS_FIRST_SECONDS", 0.0)
    for argv in (["--tp", "8"], ["--nonsense"]):
        for rank in (0, 1):
            began = time.monotonic()
            with pytest.raises(SystemExit) as end:
                cli.parse_and_check(argv, launch=launch(rank, 2))
            assert end.value.code == 2 and (time.monotonic() - began >= 0.3 or rank == 0)
            out, err = capsys.readouterr()
            assert out == "" and ("fix: " in err) == (rank == 0) and bool(err) == (rank == 0)


def test_help_is_printed_by_the_first_rank_only(capsys):
    for rank in (0, 1):
        with pytest.raises(SystemExit) as end:
            cli.parse_and_check(["--help"], "Pretrain.", launch=launch(rank, 2))
        assert end.value.code == 0
        assert ("Pretrain." in capsys.readouterr().out) == (rank == 0)


def test_a_sound_configuration_comes_back_resolved():
    config = cli.parse_and_check([*SOUND, "--micro-batch-size", "3"], launch=launch(0, 4))
    assert (config.data.global_batch_size, config.model.ffn_hidden_size) == (12, 3072)


def test_world_size_checks_a_layout_and_exits(capsys):
    argv = [*SOUND, "--tp", "2", "--pp", "4", "--global-batch-size", "32", "--sp", "--world-size"]
    with pytest.raises(SystemExit) as end:
        cli.parse_and_check([*argv, "16"], launch=launch())
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "16 = tensor 2 x pipeline 4 x data 2",
        "16 for each",
        "bubble 18.8%",
        "3 + 3 + 3 + 3",
        "memory",
    ):
        assert words in printed
    with pytest.raises(SystemExit) as end:
        cli.parse_and_check([*argv, "12"], launch=launch())
    assert end.value.code == 2
    assert "12 ranks" in capsys.readouterr().err


def test_a_preset_stands_between_the_defaults_and_what_is_given(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: bert-large\nnum_layers: 3\n")
    model = cli.read_config(["--config", str(file), "--hidden-size", "512"]).model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.gelu) == (
        3,
        512,
        16,
        "erf",
    )
    assert cli.read_config(["--preset", "gpt2-xl"]).model.hidden_size == 1600


@pytest.mark.parametrize(
    ("argv", "program", "message", "fix"),
    [
        (
            "--preset bert-base",
            "gpt",
            "--preset bert-base is a model that this",
            "python pretrain_bert.py",
        ),
        ("--preset gpt2", "bert", "--preset gpt2 is a model that this", "python pretrain_gpt.py"),
        (
            "--architecture gpt",
            "bert",
            "--architecture gpt is a model that this",
            "python pretrain_gpt.py",
        ),
        (
            "--preset gpt2 --architecture bert",
            "bert",
            "gpt2 is the shape of a GPT, but --architecture is bert",
            "leave",
        ),
        (
            "--preset bert-base --architecture gpt",
            None,
            "the shape of a BERT, but --architecture is gpt",
            "leave out",
        ),
    ],
)
def test_a_program_trains_its_own_model_only(argv, program, message, fix):
    with pytest.raises(ConfigError) as error:
        cli.read_config(argv.split(), program)
    (problem,) = error.value.problems
    assert message in problem.message and fix in problem.fix


def test_each_program_s_own_model_needs_no_flag(capsys):
    flags = "--mock-data --vocab-size 512 --train-iters 2 --world-size 1".split()
    for program, shown in (("gpt", "GPT, 12 layers"), ("bert", "BERT, 12 layers")):
        with pytest.raises(SystemExit) as end:
            cli.parse_and_check(flags, architecture=program)
        assert end.value.code == 0 and shown in capsys.readouterr().out


def test_the_help_of_a_gpt_has_no_flags_of_a_bert(capsys):
    for program, found in (("gpt", False), ("bert", True)):
        with pytest.raises(SystemExit):
            cli.parse_and_check(["--help"], "", architecture=program)
        assert ("--mask-prob" in capsys.readouterr().out) == found


def test_a_broken_launcher_is_a_problem(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.parse_and_check(SOUND)
    assert end.value.code == 2 and "RANK" in capsys.readouterr().err


def test_print_config_prints_a_file_for_config(capsys, tmp_path):
    argv = [*SOUND, "--tp", "2", "--global-batch-size", "32", "--print-config"]
    for more in ([], ["--world-size", "8"]):
        with pytest.raises(SystemExit) as end:
            cli.parse_and_check([*argv, *more], launch=launch(0, 8))
        assert end.value.code == 0
        text = capsys.readouterr().out
        resolved = cli.parse_and_check(argv[:-1], launch=launch(0, 8))
        assert cli.read_config(["--config", write(tmp_path, text)]) == resolved
    with pytest.raises(SystemExit):
        cli.parse_and_check(argv, launch=launch(1, 8))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("length", ["--train-samples", "--train-tokens"])
def test_a_printed_configuration_takes_another_length(length, capsys, tmp_path):
    argv = ["--mock-data", "--vocab-size", "512", "--global-batch-size", "8", length]
    with pytest.raises(SystemExit):
        cli.parse_and_check([*argv, "32768", "--print-config"], launch=launch())
    file = write(tmp_path, capsys.readouterr().out)
    longer = cli.parse_and_check(["--config", file, length, "40960"], launch=launch())
    steps = {"--train-samples": 5120, "--train-tokens": 5}
    assert longer.training.train_iters == longer.optimizer.lr_decay_iters == steps[length]


@pytest.mark.parametrize(
    "given", [["--rampup-batch-size", "2 2 40"], ["--rampup-batch-size", "2", "2", "40"], None]
)
def test_the_words_of_a_ramp_may_be_one_text(given, tmp_path):
    given = given or ["--config", write(tmp_path, "rampup_batch_size: 2 2 40\n")]
    config = cli.parse_and_check([*SOUND, "--global-batch-size", "8", *given], launch=launch())
    assert config.data.rampup_batch_size == ("2", "2", "40")
    assert config.batch_sizes.start == 2


def test_an_example_of_a_list_can_be_typed():
    ((_, fix),) = (line.split(" | ") for line in problems_of("--parameter-groups"))
    typed = shlex.split(fix.removeprefix("for example "))
    assert cli.read_config(typed).optimizer.parameter_groups == EXAMPLE_GROUPS


@dataclasses.dataclass(frozen=True)
class ToolOptions:
    """What a tool does."""

    prefix: Annotated[str, Field(positional=True)]
    """Where it is."""
    tokens: Annotated[int, Field(minimum=1)]
    """How many."""
    names: tuple[str, ...] = ()
    """Of what."""


def test_a_tool_s_options(capsys):
    def parse(*argv):
        return cli.parse_options(ToolOptions, "Look at data.", list(argv))

    assert parse("here", "--tokens", "3") == ToolOptions("here", 3)
    assert parse("--names", "a", "b", "--tokens=3", "here") == ToolOptions("here", 3, ("a", "b"))
    for argv, words in (
        ([], ("PREFIX is missing", "--tokens is missing")),
        (["here", "--tokens", "0"], ("--tokens 0 must be a whole number from 1",)),
        (["here", "--tokens", "x", "there"], ("--tokens: 'x' is not", "unexpected 'there'")),
    ):
        with pytest.raises(SystemExit) as end:
            parse(*argv)
        printed = capsys.readouterr().err
        assert end.value.code == 2 and f"{len(words)} problem" in printed
        assert all(word in printed for word in words)
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0 and "  PREFIX                   Where it is.\n" in text
    assert "  --tokens INT             How many.\n" in text and "--names STR ..." in text
