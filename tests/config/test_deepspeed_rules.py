"""The rules of --deepspeed, also where DeepSpeed is not installed: one thing wrong gives one
problem, whose fixes work. Pure."""

import json
from importlib.machinery import ModuleSpec

import pytest

from megalite.config import validate
from megalite.config.run import from_flat
from megalite.config.summary import deepspeed_settings, keep_config, summary_lines
from megalite.deepspeed import settings
from tests.config.validation import SOUND, assert_one_problem

USED = {**SOUND, "deepspeed": True, "deepspeed_config": "ds.json"}
FP16 = {"fp16": True, "device": "cuda"}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A sound file in the working folder, and DeepSpeed as if it were installed."""
    monkeypatch.chdir(tmp_path)
    found = ModuleSpec("deepspeed", None)
    monkeypatch.setattr("megalite.config.rules.deepspeed.find_spec", lambda name: found)
    write({})


def write(document: dict, **zero) -> None:
    section = {"zero_optimization": {"stage": 2, **zero}}
    with open("ds.json", "w", encoding="utf-8") as file:
        json.dump(section | document, file)


CASES = {
    # what is wrong: (changes of USED, ranks, words that the problem must have)
    "no file": (dict(deepspeed_config=None), 1, "--deepspeed needs --deepspeed-config"),
    "pipeline": (dict(pipeline_model_parallel_size=2), 2, "--pp 2 --deepspeed modules"),
    "ZeRO-1": (dict(use_distributed_optimizer=True), 2, "--use-distributed-optimizer"),
    "overlap": (dict(overlap_grad_reduce=True), 2, "--overlap-grad-reduce --deepspeed"),
    "fp64": (dict(precision="fp64"), 1, "--precision fp64 --deepspeed"),
    "fp16 on a CPU": (dict(fp16=True, device="cpu"), 1, "fp16 --device cpu GPUs"),
    "Muon": (dict(optimizer="muon"), 1, "--optimizer muon matrices"),
    "frozen": (dict(parameter_groups=["layers.* freeze"]), 1, "--parameter-groups freezes"),
    "norms of layers": (dict(log_norms_per_layer=True), 1, "--log-norms-per-layer gradients"),
    "norm of weights": (dict(log_params_norm=True), 1, "--log-params-norm"),
    "zeros": (dict(log_num_zeros_in_grad=True), 1, "--log-num-zeros-in-grad gradients"),
    "norms of steps": (
        dict(skip_grad_norm_above=3.0, max_bad_steps=9),
        1,
        "--skip-grad-norm-above 3 after",
    ),
    "communication": (dict(log_communication=True), 2, "--log-communication"),
    "no such file": (dict(deepspeed_config="no.json"), 1, "--deepspeed-config no.json"),
    "file alone": (dict(deepspeed=False), 1, "--deepspeed-config ds.json no effect"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_alone(case):
    changes, world_size, words = CASES[case]
    assert validate.check(from_flat(USED), world_size) == []
    assert_one_problem(from_flat(USED | changes), world_size, words, least_offers=0)


def test_apex_is_not_for_deepspeed():
    problems = validate.check(from_flat(USED | {"optimizer_backend": "apex"}), 1)
    assert "--deepspeed, which takes torch's" in problems[-1].message


def test_each_flag_of_our_own_sharding_is_refused():
    flags = dict(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        ddp_bucket_size=1000,
    )
    problems = validate.check(from_flat(USED | flags), 2)
    assert [p.keys[0] for p in problems] == list(flags)


FILES = {
    # what is wrong: (contents beside the section of ZeRO, flags, words of the problem and its fix)
    "train_batch_size": (
        {"train_batch_size": 16},
        {},
        '"train_batch_size": 16 --global-batch-size 8',
    ),
    "micro": ({"train_micro_batch_size_per_gpu": 2}, {}, "2 --micro-batch-size 1"),
    "accumulation": ({"gradient_accumulation_steps": 2}, {}, "2 8 2 = 4"),
    "clipping": ({"gradient_clipping": 0.5}, {}, "0.5 --clip-grad 1"),
    "no clipping": ({"gradient_clipping": 1.0}, {"clip_grad": 0.0}, "1.0 --clip-grad 0"),
    "bf16": ({"bf16": {"enabled": True}}, {}, "bf16.enabled true --precision fp32"),
    "not bf16": ({"bf16": {"enabled": False}}, {"bf16": True}, "false --precision bf16"),
    "1 is not true": ({"bf16": {"enabled": 1}}, {"bf16": True}, "bf16.enabled 1 true"),
    "fp16": ({"fp16": {"enabled": True}}, {}, "fp16.enabled true --precision fp32"),
    "scale": ({"fp16": {"enabled": True, "initial_scale_power": 16}}, FP16, "16 4.29497e+09 32"),
    "window": ({"fp16": {"loss_scale_window": 500}}, FP16, "500 --loss-scale-window 1000"),
    "constant": ({"fp16": {"loss_scale": 128}}, FP16, "128 no --loss-scale"),
    "power of two": (
        {"fp16": {"initial_scale_power": 16}},
        FP16,
        "but the flags say 32.0 or --initial-loss-scale 65536",
    ),
    "quoted number": (
        {"train_batch_size": "8"},
        {},
        'says "train_batch_size": "8", which must be a number without quotation marks',
    ),
    "true is no number": ({"gradient_clipping": True}, {}, "true, which must be a number"),
    "untested": (
        {"zero_allow_untested_optimizer": False},
        {"optimizer": "lion"},
        "untested false, but --optimizer lion needs true",
    ),
    "optimizer": ({"optimizer": {"type": "Adam"}}, {}, "optimizer --lr"),
    "scheduler": ({"scheduler": {}}, {}, "scheduler --lr-decay-style"),
    "misspelt": ({"gradient_cliping": 1.0}, {}, "gradient_cliping passed leave"),
    "misspelt inside": ({"bf16": {"enable": False}}, {}, "bf16.enable passed"),
    "tensor parallel": ({"tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel --tp"),
    "parameters' type": ({"data_types": {"param_dtype": "bf16"}}, {}, "data_types.param_dtype"),
    "no ZeRO": ({"zero_optimization": {"stage": 0}}, {}, "stage is 0 1"),
    "no section": ({"zero_optimization": "auto"}, {}, "no number for zero_optimization.stage"),
    "null section": ({"zero_optimization": None}, {}, "no number for zero_optimization.stage"),
    "stage true": ({"zero_optimization": {"stage": True}}, {}, "stage is true"),
    "stage in quotes": ({"zero_optimization": {"stage": "2"}}, {}, 'stage is "2"'),
    "stage left open": ({"zero_optimization": {"stage": "auto"}}, {}, "no number for stage"),
    "bf16 as a value": ({"bf16": True}, {}, '"bf16": true must be an object: {"enabled":'),
    "types as a value": (
        {"data_types": "fp32"},
        {},
        '"fp32" must be an object {"grad_accum_dtype"',
    ),
    "ZeRO as a value": ({"zero_optimization": 2}, {}, "2 must be an object"),
    "sums": ({"communication_data_type": "fp17"}, {}, '"fp17" must be one of "fp32", "bf16"'),
    "accumulation in": ({"data_types": {"grad_accum_dtype": 1}}, {}, "grad_accum_dtype must one"),
    "level": ({"log_level": "chatty"}, {}, '"chatty" must be one of "debug",'),
    "times": ({"wall_clock_breakdown": "yes"}, {}, '"yes" must be true or false'),
    "steps": ({"steps_per_print": 0}, {}, "0 must be whole number of at least 1"),
    "names": ({"comms_logger": {"prof_ops": "all"}}, {}, '"all" must be a list of names'),
}


@pytest.mark.parametrize("case", FILES)
def test_what_the_file_must_not_say(case):
    document, flags, words = FILES[case]
    config = from_flat({**USED, "global_batch_size": 8, **flags})
    write({})
    assert validate.check(config, 2) == []
    write(document)
    (problem,) = validate.check(config, 2)
    for word in words.split():
        assert word in problem.message + problem.fix, problem
    assert "ds.json" in problem.message


ZERO = {
    "offload to NVMe": ({"offload_optimizer": {"device": "nvme"}}, "nvme cpu memory"),
    "part of an offload": ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio"),
    "weights that are whole": ({"offload_param": {"device": "cpu"}}, "offload_param stage 2 3"),
    "size in words": ({"reduce_bucket_size": "big"}, 'reduce_bucket_size": "big" must whole'),
    "negative size": ({"reduce_bucket_size": -5}, "-5 must be a whole number of at least 1"),
    "true size": ({"sub_group_size": True}, "true must be a whole number of at least 0"),
    "half a weight": ({"stage3_max_live_parameters": 0.5}, "0.5 must be a whole number"),
    "overlap in words": ({"overlap_comm": "yes"}, 'overlap_comm": "yes" must be true or false'),
    "offload in a word": ({"offload_optimizer": "cpu"}, '"cpu" must be an object {"device":'),
    "pinned": ({"offload_optimizer": {"device": "cpu", "pin_memory": 1}}, "1 must be true"),
    "quantized": ({"zero_quantized_weights": True}, "zero_quantized_weights passed"),
}


@pytest.mark.parametrize("case", ZERO)
def test_what_the_section_of_zero_must_not_say(case):
    section, words = ZERO[case]
    write({}, **section)
    (problem,) = validate.check(from_flat(USED), 2)
    for word in words.split():
        assert word in problem.message + problem.fix, problem


UNREADABLE = {
    # contents: words of the problem
    "{": "Expecting property name",
    "[]": "has no JSON object",
    '{"bf16": {}, "bf16": {}}': '"bf16" is given twice',
    "": "ds.json is empty",
    '{"bf16": {}, // ours': "JSON has no comments: line 1",
    '{"gradient_clipping": NaN}': "JSON has no NaN",
}


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_file_that_is_no_object(text):
    with open("ds.json", "w", encoding="utf-8") as file:
        file.write(text)
    (problem,) = validate.check(from_flat(USED), 1)
    assert "--deepspeed-config ds.json" in problem.message
    assert UNREADABLE[text] in problem.message


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, words in (("no.json", "No such file"), ("folder", "Is a directory")):
        (problem,) = validate.check(from_flat(USED | {"deepspeed_config": name}), 1)
        assert problem.message.startswith(f"--deepspeed-config {name}: {words}"), problem
        assert "Errno" not in problem.message and problem.message.count(name) == 1


def test_a_byte_order_mark_is_no_text():
    with open("ds.json", "w", encoding="utf-8-sig") as file:
        json.dump({"zero_optimization": {"stage": 2}}, file)
    assert validate.check(from_flat(USED), 1) == []


def test_wrong_values_are_reported_all_at_once():
    write({"log_level": "chatty", "bf16": True, "gradient_clipping": "1"}, overlap_comm="yes")
    assert len(validate.check(from_flat(USED), 1)) == 4


def test_the_loss_scale_of_a_shared_file_matters_in_fp16_alone():
    scale = {"loss_scale": 0, "initial_scale_power": 16, "hysteresis": 9, "min_loss_scale": 4}
    for enabled in ("auto", False):
        write({"fp16": {"enabled": enabled, "loss_scale_window": "auto", **scale}})
        for flags in ({}, {"bf16": True}):
            assert validate.check(from_flat(USED | flags), 1) == []
            assert given(USED | flags)["fp16"] == {"enabled": False}
    write({"fp16": {"enabled": "auto", **scale}})
    problems = validate.check(from_flat(USED | FP16), 1)
    offers = [problem.fix.rpartition(", or ")[2] for problem in problems]
    assert offers == ["--initial-loss-scale 65536", "--hysteresis 9", "--min-loss-scale 4"]
    write({"fp16": {"loss_scale": 128, "initial_scale_power": 1e9}})
    constant, first = validate.check(from_flat(USED | FP16), 1)
    assert constant.fix.endswith("or --loss-scale 128") and first.fix.endswith("in ds.json")


def given(flat: dict) -> dict:
    return deepspeed_settings(validate.resolve(from_flat(flat), 1), 1)


def test_what_has_no_effect_or_is_null_is_left_out():
    plain = given(USED)
    write(
        {"bf16": None, "fp16": None, "data_types": None, "log_level": None},
        offload_optimizer=None,
        offload_param=None,
        overlap_comm=None,
        stage3_gather_16bit_weights_on_model_save=True,
    )
    assert validate.check(from_flat(USED), 1) == []
    assert given(USED) == plain


def test_sizes_may_have_an_exponent():
    write({}, reduce_bucket_size=5e8, allgather_bucket_size=2e8, sub_group_size=1e9)
    assert validate.check(from_flat(USED), 1) == []


def test_fp16_on_a_cpu_is_repaired_by_the_flag_that_was_typed():
    for flags, offer in (
        ({"fp16": True}, "--bf16 in place of --fp16"),
        ({"precision": "fp16"}, "--precision bf16 in place of --precision fp16"),
    ):
        (problem,) = validate.check(from_flat(USED | flags | {"device": "cpu"}), 1)
        assert problem.fix.startswith(offer)


def test_a_copy_of_the_file_is_kept_with_the_configuration(tmp_path):
    save = tmp_path / "save"
    save.mkdir()
    config = validate.resolve(from_flat(USED), 1)
    for stage, end in ((2, ""), (2, ""), (3, "-2"), (2, "")):
        write({}, stage=stage)
        line = keep_config(config, str(save))
        assert f"{save}/config{end}.yaml" in line and line.endswith(f"{save}/ds{end}.json")
    names = ["config-2.yaml", "config.yaml", "ds-2.json", "ds.json"]
    assert sorted(path.name for path in save.iterdir()) == names
    assert '"stage": 3' in (save / "ds-2.json").read_text()
    assert '"stage": 2' in (save / "ds.json").read_text()


def test_settings_are_facts_of_their_own():
    facts = dict(settings.flattened(given(USED)))
    assert facts["zero_optimization.stage"] == 2 and facts["train_batch_size"] == 1


def test_a_fix_takes_the_files_value():
    write({"gradient_clipping": 0.5})
    (problem,) = validate.check(from_flat(USED), 1)
    assert '"gradient_clipping": 1.0 or "auto" in ds.json, or --clip-grad 0.5' in problem.fix


def test_equal_and_automatic_values_are_sound():
    write(
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False},
        },
        reduce_bucket_size="auto",
    )
    config = from_flat({**USED, "global_batch_size": 8, "bf16": True})
    assert validate.check(config, 2) == []
    resolved = validate.resolve(config, 2)
    ours = settings.owned(resolved.optimizer, 1, 8, 2)
    assert settings.for_engine(settings.read("ds.json"), ours) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setattr("megalite.config.rules.deepspeed.find_spec", lambda name: None)
    (problem,) = validate.check(from_flat(USED), 1)
    assert "pip install 'megalite[deepspeed]'" in problem.fix


def test_replicas_that_stage_3_does_not_have():
    write({}, stage=3)
    checked = USED | {"check_replicas": 5}
    assert_one_problem(from_flat(checked), 2, "--check-replicas 5 stage 3")
    assert validate.check(from_flat(checked | {"tensor_model_parallel_size": 2}), 2) == []


def test_the_summary_says_what_is_offloaded_and_how_much_memory_stays():
    def memory(stage: int, **zero) -> str:
        write({}, stage=stage, **zero)
        lines = summary_lines(validate.resolve(from_flat(USED), 4), 4)
        text = "\n".join(lines)
        assert f"ZeRO stage {stage}" in text
        assert f'"stage": {stage}' in " ".join(text.split())
        assert ("optimizer on the CPU" in text) == bool(zero)
        return float(text.split("fullest: ")[1].split()[0])

    sizes = [memory(1), memory(2), memory(3), memory(3, offload_optimizer={"device": "cpu"})]
    # Bytes a parameter in fp32: 4 + 4 + 12 / 4, 4 + 1 + 12 / 4, 1 + 1 + 12 / 4, 1 + 1.
    assert [size / sizes[3] for size in sizes] == pytest.approx([5.5, 4, 2.5, 1], rel=0.01)
