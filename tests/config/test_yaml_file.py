"""Configurations in YAML files: what is read, the traps of YAML 1.1, and how mistakes are
reported."""

import pytest
import yaml

from megalite.config import cli
from megalite.config.problem import ConfigError
from megalite.config.run import RunConfig, from_flat, options, to_flat
from megalite.config.yaml_file import config_of_checkpoint, parse_yaml, to_yaml
from tests.config.validation import another_value, problems_of, write


def test_a_file_with_either_spelling(tmp_path):
    file = write(
        tmp_path,
        "num-layers: 3\nhidden_size: 64\ntp: 2\nsp: true\nlr: 1e-4\nmin-lr: 0\nsave: null\n",
    )
    config = cli.read_config(["--config", file])
    changed = dict(
        num_layers=3,
        hidden_size=64,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        lr=1e-4,
        min_lr=0.0,
    )
    assert to_flat(config) == to_flat(RunConfig()) | changed
    assert isinstance(config.optimizer.min_lr, float)


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    file = write(
        tmp_path, "num_layers: 3\nswiglu: true\nno_load_optim: true\nsave: out\nsave_interval: 5\n"
    )
    argv = f"--num-layers 4 --no-swiglu --config={file} --load-optim"
    argv += " --save unset --save-interval unset"
    assert to_flat(cli.read_config(argv.split())) == to_flat(RunConfig()) | {"num_layers": 4}


def test_the_whole_configuration_survives_a_file(tmp_path):
    odd = {key: another_value(option) for key, option in options().items()}
    odd |= {"load_hf": None, "use_checkpoint_args": False}  # they read a folder
    odd = from_flat(odd | {"lr": 1 / 3, "save": "null", "preset": "bert-base"})
    for config in (RunConfig(), odd):
        assert cli.read_config(["--config", write(tmp_path, to_yaml(config))]) == config
        assert from_flat(to_flat(config)) == config
        assert list(yaml.safe_load(to_yaml(config))) == list(options())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_layer: 3", "unknown 'num_layer' num_layers"),
        ("model:\n  num_layers: 3", "unknown 'model'"),
        ("num_layers: 3\nnum_layers: 4", "'num_layers' twice"),
        ("num_layers: 3\nnum-layers: 4", "'num_layers' and 'num-layers' are the same"),
        (
            "tp: 3\ntensor_model_parallel_size: 4",
            "'tp' and 'tensor_model_parallel_size' are the same",
        ),
        ("num_layers: '3'", "'3' whole number"),
        ("num_layers: true", "true whole number"),
        ("num_layers: null", "null whole number"),
        ("num_layers: 3.0", "3.0 whole number"),
        ("swiglu: 'yes'", "'yes' true or false"),
        ("lr: true", "true number"),
        ("save: 3", "3 text"),
        ("split: [1, 2]", "[1, 2] text"),
        ("normalization: rmsnorm", "rmsnorm RMSNorm"),
        ("3: 4", "unknown 3"),
        ("- a\n- b", "list names"),
        ("just text", "text names"),
        ("a: [", "not YAML line"),
        ("num_layers: {a: 1}", "{a: 1} whole number"),
        ("num_layers: !!int '3'", "!!int whole number"),
        ("<<: {num_layers: 3}", "unknown '<<'"),
    ],
)
def test_a_mistake_in_a_file(tmp_path, text, words):
    file = write(tmp_path, text)
    (message,) = problems_of("--config", file)
    for word in (file, *words.split()):
        assert word in message


@pytest.mark.parametrize("key", [o.key for o in options().values() if o.kind is tuple])
def test_an_example_of_a_list_can_be_written(tmp_path, key):
    (message,) = problems_of("--config", write(tmp_path, key + ": [{embedding.*: freeze}]"))
    example = message.partition("for example ")[2]
    value = getattr(
        getattr(cli.read_config(["--config", write(tmp_path, example)]), options()[key].section),
        key,
    )
    assert value == (options()[key].usual or ("NAME",))


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in problems_of("--config", str(tmp_path / "absent.yaml"))[0]
    assert "directory" in problems_of("--config", str(tmp_path))[0]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    assert "not UTF-8" in problems_of("--config", str(tmp_path / "binary"))[0]
    assert cli.read_config(["--config", write(tmp_path, "# nothing\n")]) == RunConfig()


def test_from_flat_raises_with_every_problem():
    with pytest.raises(ConfigError, match="num_layer'.*hidden_size: 'a'"):
        from_flat({"num_layer": 1, "hidden_size": "a"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # Numbers that YAML 1.1 reads as others.
        ("seed: 0123", "seed: 0123 (83 in YAML 1.1) is not a whole number"),
        ("seed: -010", "seed: -010 (-8 in YAML 1.1) is not"),
        ("seed: 0x10", "seed: 0x10 (16 in YAML 1.1) is not"),
        ("seed: 0b11", "seed: 0b11 (3 in YAML 1.1) is not"),
        ("seed: 0o17", "seed: 0o17 is not"),
        ("seed: 1:30", "seed: 1:30 (90 in YAML 1.1) is not"),
        ("seed: 1_000", "seed: 1_000 (1000 in YAML 1.1) is not"),
        ("seed: 2024-05-01", "seed: 2024-05-01 (2024-05-01 in YAML 1.1) is not"),
        ("lr: 0123", "lr: 0123 (83 in YAML 1.1) is not a number"),
        ("lr: 1_0.5", "lr: 1_0.5 (10.5 in YAML 1.1) is not"),
        ("lr: 1:30.5", "lr: 1:30.5 (90.5 in YAML 1.1) is not"),
        ("lr: .inf", "lr: .inf (inf in YAML 1.1) is not"),
        ("lr: .nan", "lr: .nan (nan in YAML 1.1) is not"),
        ("lr: nan", "lr: nan is not"),
        ("seed: yes", "seed: yes is not"),
        # Switches where text is meant.
        ("save: no", "save: no is not text"),
        ("wandb_exp_name: off", "wandb_exp_name: off is not text"),
        ("data_path: [on, corpus]", "data_path: [on, corpus] is not text"),
        ("data_path: [~, corpus]", "data_path: [~, corpus] is not text"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks_is_a_mistake(tmp_path, text, words):
    (message,) = problems_of("--config", write(tmp_path, text))
    assert words in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # Text, which YAML 1.1 makes numbers and dates of.
        ("wandb_exp_name: 0123", "0123"),
        ("wandb_exp_name: 2024-05-01", "2024-05-01"),
        ("wandb_exp_name: 1:30", "1:30"),
        ("wandb_exp_name: 12e4567", "12e4567"),
        ("wandb_exp_name: 'no'", "no"),
        ("wandb_exp_name: &name x", "x"),
        ("profile: 10-12", "10-12"),
        ("data_path: [0.3, 0123, 0.7, 1:30]", ("0.3", "0123", "0.7", "1:30")),
        # Switches and numbers, in any of their forms.
        ("swiglu: yes", True),
        ("swiglu: On", True),
        ("exit_signal_handler: off", False),
        ("lr: 1e-5", 1e-5),
        ("lr: 1.0e-5", 1e-5),
        ("lr: .5", 0.5),
        ("lr: 3", 3.0),
        ("seed: +7", 7),
        ("save: ~", None),
        ("save:", None),
    ],
)
def test_what_is_clear_is_read(tmp_path, text, value):
    config = cli.read_config(["--config", write(tmp_path, text)])
    assert to_flat(config)[text.partition(":")[0]] == value


def test_texts_that_look_like_something_else_survive_a_file(tmp_path):
    for text in (
        "no",
        "0123",
        "1:30",
        "2024-05-01",
        "~",
        "null",
        "1_000",
        ".inf",
        "3",
        "1e5",
        "#x",
    ):
        config = from_flat({"save": text, "profile_ranks": [text, text]})
        assert cli.read_config(["--config", write(tmp_path, to_yaml(config))]) == config


def test_the_configuration_of_a_checkpoint():
    assert config_of_checkpoint(to_yaml(RunConfig())) == RunConfig()
    assert config_of_checkpoint("num_layers: 3\n") == from_flat({"num_layers": 3})
    with pytest.raises(ConfigError, match="unknown key 'layers'.*hidden_size: a is not"):
        config_of_checkpoint("layers: 3\nhidden_size: a\n")


def test_an_alias_that_would_grow_without_end_is_not_followed():
    lines = ["a: &a [x, x]"] + [f"{n}: &{n} [*{m}, *{m}]" for m, n in zip("abcdefgh", "bcdefghi")]
    _, problems = parse_yaml("\n".join(lines), "run.yaml")
    assert all("unknown key" in problem.message for problem in problems)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ('tp: "2"', "tp: 2, without quotes"),
        ("model:\n  num_layers: 2", "write its keys without it"),
        ("num_layers:\t2\n\tlr: 3", "spaces, not tabs"),
    ],
)
def test_the_fix_says_how_to_write_a_file_of_another_form(tmp_path, text, fix):
    (message,) = problems_of("--config", write(tmp_path, text))
    assert fix in message
