"""Every rule on its own: a sound configuration with one thing wrong gives one problem, whose fixes
work. Pure."""

import itertools
import os
import random
import subprocess
import sys

import pytest

from megalite.config import cli, validate
from megalite.config.run import from_flat, keys_where, options, to_flat
from megalite.config.summary import keep_config, summary_lines
from megalite.config.yaml_file import to_yaml
from megalite.optim.schedule import Schedule
from tests.config.rule_cases import CASES, RAMP
from tests.config.validation import REAL, SOUND, assert_one_problem, fixed, real


@pytest.mark.parametrize("case", CASES)
def test_a_rule_alone(case):
    changes, world_size, words = CASES[case]
    assert validate.check(from_flat(SOUND), world_size) == []
    assert_one_problem(from_flat(SOUND | changes), world_size, words)


def test_every_rule_has_a_case():
    seen = set()
    for changes, world_size, _ in CASES.values():
        seen |= {name for name, _ in validate.failures(from_flat(SOUND | changes), world_size)}
    elsewhere = {
        "vocabulary_is_known",
        "tokenizer_is_whole",
        "split_is_readable",
        "megatron_order_is_possible",
        "tokens_can_be_masked",
        "libraries_are_installed",
        "apex_can_be_used",
        "deepspeed_is_there",
        "deepspeed_is_alone",
        "deepspeed_has_precision",
        "deepspeed_has_gradients",
    }  # they need files, below and in test_deepspeed_rules.py, or that libraries are absent
    rules = itertools.chain(*validate.RULES_OF.values())
    assert {rule.__name__ for rule in rules} <= seen | elsewhere


@pytest.mark.parametrize(
    ("case", "fix"),
    [
        ("a ramp past its end", "--rampup-batch-size 4 6 60, or leave out --rampup-batch-size"),
        (
            "a ramp that starts above its end",
            "--rampup-batch-size 8 4 60, or leave out --rampup-batch-size",
        ),
        (
            "a ramp whose words are all too large",
            "--rampup-batch-size 8 8 60, or leave out --rampup-batch-size",
        ),
        (
            "a ramp that no ranks can have, with samples",
            "--rampup-batch-size unset --train-samples 96",
        ),
        ("two units of a schedule", "--lr-warmup-iters 0 --lr-warmup-samples 2"),
    ],
)
def test_what_is_offered_can_be_typed(case, fix):
    changes, world_size, _ = CASES[case]
    (problem,) = validate.check(from_flat(SOUND | changes), world_size)
    assert problem.fix == fix


NUMBERS = [o.key for o in options().values() if o.kind in (int, float)]


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_below_its_range(key):
    problems = validate.check(from_flat(SOUND | {key: -2}), 1)
    assert len(problems) == 1 and f"{options()[key].flag} -2" in problems[0].message
    assert [
        validate.check(repaired, 1) for _, repaired, _ in fixed(from_flat(SOUND), 1, problems[0])
    ] == [[]]


@pytest.mark.parametrize("key", [o.key for o in options().values() if o.kind is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none(key, value):
    problems = validate.check(from_flat(SOUND | {key: value}), 1)
    assert [p.keys for p in problems] == [(key,)]


@pytest.mark.parametrize(
    "key", ["attention_dropout", "hidden_dropout", "adam_beta1", "lr_warmup_fraction"]
)
def test_a_fraction_must_be_below_one(key):
    problems = validate.check(from_flat(SOUND | {key: 1.0}), 1)
    assert len(problems) == 1 and "below 1" in problems[0].message


def test_no_combination_of_senseless_numbers_crashes():
    for pair in itertools.combinations(NUMBERS, 2):
        problems = validate.check(from_flat(SOUND | dict.fromkeys(pair, 0)), 3)
        reported = {flag for p in problems for flag in p.keys}
        must = {
            key
            for key in pair
            if any(p.keys == (key,) for p in validate.out_of_range(from_flat({key: 0})))
        }
        assert must <= reported


def test_every_number_has_bounds_and_every_needed_field_an_example():
    for option in options().values():
        field = option.field
        bounds = [
            b for b in (field.minimum, field.above, field.maximum, field.below) if b is not None
        ]
        assert (len(bounds) > 0) == (option.kind in (int, float)), option.key
        assert (field.minimum is None) != (field.above is None) or not bounds, option.key
        if bounds and option.usual is not None:
            assert field.contains(option.usual), option.key
        if option.kind is int:
            assert isinstance(field.minimum, int) and len(bounds) == 1, option.key


def test_what_changes_no_number_is_no_part_of_the_model_or_the_data():
    free = set(keys_where(lambda field: not field.changes_numbers))
    assert free.isdisjoint(keys_where(lambda field: field.defines_model))
    sections = {options()[key].section for key in free}
    assert sections == {"model", "parallel", "optimizer", "deepspeed", "checkpoint", "training"}
    assert {"seed", "rng_scheme", "train_iters", "finetune", "sequence_parallel"}.isdisjoint(free)


def test_what_defines_the_model_is_of_its_shape():
    keys = keys_where(lambda field: field.defines_model)
    assert {options()[key].section for key in keys} == {"model"}
    rest = {key for key, o in options().items() if o.section == "model"} - set(keys)
    assert rest == {
        "architecture",
        "preset",
        "seq_length",
        "make_vocab_size_divisible_by",
        "attention_dropout",
        "attention_backend",
        "norm_backend",
        "hidden_dropout",
        "init_method_std",
    }


def test_all_problems_at_once():
    flat = dict(
        num_attention_heads=12,
        num_layers=4,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=5,
    )
    problems = validate.check(from_flat(flat | {"micro_batch_size": 2, "global_batch_size": 7}), 1)
    text = cli.report(problems, "pretrain_gpt.py")
    for words in (
        "--num-attention-heads 12",
        "--pp 5",
        "--num-layers 4",
        "--global-batch-size 7",
        "1 rank",
        "no data",
    ):
        assert words in text
    assert "6 problems" in text and text.count("fix: ") == 6
    assert "--tp 6, or --tp 4, or --num-attention-heads 16" in text
    assert max(map(len, text.splitlines())) <= 100


# What follows from what
# ---------------------------------------------------------------------------------------------


def test_resolve_fills_in_what_follows(folder):
    given = dict(
        train_iters=None,
        train_samples=80,
        lr_warmup_fraction=0.25,
        bf16=True,
        recompute_activations=True,
    )
    config = real(**given, swiglu=True, num_attention_heads=12)
    resolved = validate.resolve(config, 8)
    flat = to_flat(resolved)
    expected = dict(
        train_iters=10,
        global_batch_size=8,
        ffn_hidden_size=2048,
        kv_channels=64,
        num_query_groups=12,
        vocab_size=257,
        max_position_embeddings=64,
        precision="bf16",
        bf16=False,
        min_lr=3e-5,
        recompute_granularity="selective",
        recompute_activations=False,
        lr_decay_iters=10,
        lr_warmup_iters=2,
        lr_warmup_fraction=None,
        train_samples=80,
        pipeline_schedule="1f1b",
        num_virtual_stages_per_pipeline_rank=1,
    )
    assert {key: flat[key] for key in expected} == expected
    untouched = set(flat) - set(expected)
    assert {key: flat[key] for key in untouched} == {key: to_flat(config)[key] for key in untouched}
    assert validate.resolve(resolved, 8) == resolved
    assert validate.check(resolved, 8) == []


@pytest.mark.parametrize("case", ["plain", "constant", "swiglu"])
def test_a_resolved_configuration_is_sound(case):
    changes = {
        "plain": {},
        "constant": dict(lr_decay_style="constant"),
        "swiglu": dict(swiglu=True),
    }[case]
    resolved = validate.resolve(from_flat(SOUND | changes), 4)
    assert validate.check(resolved, 4) == [] and validate.resolve(resolved, 4) == resolved


def test_checks_import_no_torch(folder):
    code = (
        "import sys; from megalite.config import validate, cli, summary; from "
        "megalite.config.run import from_flat;"
        f"config = from_flat({REAL | {'split': '80,20,0', 'save': 'run', 'load': 'run'}!r});"
        "assert validate.check(config, 1) == [];"
        "print(summary.summary_lines(validate.resolve(config, 1), 1));"
        "assert 'torch' not in sys.modules"
    )
    env = {"PYTHONPATH": str(cli.__file__).rsplit("/megalite/", 1)[0], "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout


def test_no_configuration_crashes_a_rule_and_every_offer_repairs_its_problem():
    draw = random.Random(0)
    pool = {
        int: [1, 2, 3, 4, 6, 8, 12, 0, 512, 7],
        float: [0.0, 0.1, 0.5, 1.0],
        str: ["9,1", "x"],
        bool: [True, False],
    }
    pool[tuple] = [["x"], ["1", "x", "2", "y"], ["x", "y"]]
    drawable = [
        option
        for option in options().values()
        if option.key not in ("save", "metrics_file", "load_hf")  # the last is a folder to read
    ]
    for _ in range(100):
        picked = draw.sample(drawable, draw.randint(1, 12))
        values = {o.key: draw.choice(o.choices or pool[o.kind]) for o in picked}
        if {"preset", "architecture"} <= set(values):
            del values["architecture"]  # a preset of the other architecture is no configuration
        config = from_flat(SOUND | values)
        world_size = draw.choice([1, 2, 3, 8, 12])
        for problem in validate.check(config, world_size):
            for offer, repaired, ranks in fixed(config, world_size, problem):
                after = [p.message for p in validate.check(repaired, ranks)]
                assert problem.message not in after or "once the other" in problem.fix, (
                    problem,
                    offer,
                )


def test_the_decay_ends_at_a_tenth_unless_it_is_said_otherwise():
    for given, lowest in (({}, 3e-5), ({"lr": 0.02}, 0.002), ({"min_lr": 0.0}, 0.0)):
        resolved = validate.resolve(from_flat(SOUND | given), 1)
        assert resolved.optimizer.min_lr == lowest == resolved.optimizer.lowest_lr
        assert resolved.schedule().learning_rate(10) == lowest
        unresolved = Schedule(from_flat(SOUND | given).optimizer, 10)
        assert unresolved.learning_rate(10) == lowest
    constant = validate.resolve(from_flat(SOUND | {"lr_decay_style": "constant"}), 1)
    assert constant.optimizer.min_lr is None


def test_what_was_chosen_makes_the_configuration_again():
    for given in (
        {},
        {"hidden_size": 96, "lr_warmup_fraction": 0.2, "bf16": True, "global_batch_size": 16},
        {"preset": "llama-3.1-8b", "rope_scaling": "none", "num_layers": 12, "vocab_size": 300},
        {"preset": "gpt2-xl", "recompute_activations": True, "min_lr": 0.0},
        {"train_iters": None, "train_samples": 80},
        {"train_iters": None, "train_tokens": 10**5, "lr_warmup_samples": 20},
        {"lr_warmup_samples": 0, "lr_warmup_fraction": 0.25, "lr_decay_style": "constant"},
        {"rampup_batch_size": ("4", "4", "20"), "global_batch_size": 16},
    ):
        resolved = validate.resolve(from_flat(SOUND | given), 4)
        values = validate.chosen(resolved, 4)
        assert validate.resolve(from_flat(values), 4) == resolved
        assert {"ffn_hidden_size", "kv_channels", "lr_decay_iters"}.isdisjoint(values)


def test_a_run_is_summed_up_in_twenty_lines(folder):
    flags = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, swiglu=True)
    flags |= dict(save="a-folder", save_interval=5, lr_warmup_iters=3, normalization="RMSNorm")
    config = validate.resolve(real(**flags), 8)
    lines = summary_lines(config, 8)
    assert len(lines) <= 20 and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for words in (
        "--swiglu",
        "corpus",
        "a-folder every 5",
        "8 = tensor 2 x pipeline 2 x data 2",
        "3e-05",
    ):
        assert words in text, words


def test_the_summary_says_what_flags_do_not_do_here():
    """Of ZeRO on one data rank, of a ramp, and of --decoupled-lr."""
    sharded = {"use_distributed_optimizer": True, "overlap_param_gather": True}
    rates = {"decoupled_lr": 2e-4, "lr_decay_style": "linear"}
    for world_size in (1, 2):
        config = validate.resolve(from_flat(SOUND | RAMP | sharded | rates), world_size)
        text = " ".join("\n".join(summary_lines(config, world_size)).split())
        idle = "with one data rank, no effect of --use-distributed-optimizer --overlap-param-gather"
        assert (idle in text) == (world_size == 1)
        assert f"{16 // world_size} for each data-parallel rank" in text
        assert "both at the full batch" in text
        assert "0.0002 for the rows of the vocabulary (--decoupled-lr), at least 2e-05" in text
    plain = "\n".join(summary_lines(validate.resolve(from_flat(SOUND), 1), 1))
    assert "data rank, no effect" not in plain and "full batch" not in plain


def test_a_kept_configuration_has_the_length_that_was_given(tmp_path):
    sampled = SOUND | {"train_iters": None, "train_samples": 12}
    for given, iterations in (
        (SOUND, 10),
        (sampled, None),
        (sampled | {"lr_decay_iters": 7}, None),
        (sampled | {"lr_decay_samples": 12}, None),
        (sampled | {"lr_warmup_samples": 4}, None),
    ):
        config = validate.resolve(from_flat(given), 1)
        path = keep_config(config, str(tmp_path)).rpartition(" ")[2]
        again = cli.read_config(["--config", path])
        assert again.training.train_iters == iterations
        assert validate.resolve(again, 1) == config


def test_the_configuration_is_kept_and_nothing_is_overwritten(tmp_path):
    one, other = from_flat({}), from_flat({"seed": 7})
    for config, name in ((one, "config.yaml"), (one, "config.yaml"), (other, "config-2.yaml")):
        assert keep_config(config, str(tmp_path)).endswith(str(tmp_path / name))
    assert (tmp_path / "config.yaml").read_text() == to_yaml(one)
    assert (tmp_path / "config-2.yaml").read_text() == to_yaml(other)
    assert "cannot be written" in keep_config(one, str(tmp_path / "config.yaml"))
    (tmp_path / "config-2.yaml").unlink()
    os.mkfifo(tmp_path / "config-2.yaml")
    assert keep_config(other, str(tmp_path)).endswith(str(tmp_path / "config-3.yaml"))
