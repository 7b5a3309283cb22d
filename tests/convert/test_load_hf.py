"""--load-hf: what it fills in, what contradicts it, and that a checkpoint is resumed before it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megalite.config import validate
from megalite.config.cli import read_config
from megalite.config.problem import ConfigError
from megalite.config.run import from_flat
from megalite.config.summary import summary_lines
from megalite.config.validate import chosen, resolve
from tests.convert.published_models import SEQUENCE
from tests.data.tokenizer_files import make_files
from tests.runs import ALONE, Run, console_of, sound
from tests.test_readme import environment

ROOT = Path(__file__).resolve().parents[2]

SHORT = {
    "mock_data": True,
    "train_iters": 2,
    "global_batch_size": 2,
    "seq_length": SEQUENCE,
    "eval_interval": 0,
    "eval_iters": 0,
    "device": "cpu",
    "metrics_file": "metrics.jsonl",
}


def problems_of(*words: str, architecture: str = "gpt") -> list[str]:
    """What a command line is refused for."""
    try:
        config = read_config([*map(str, words), "--mock-data", "--train-iters", "2"], architecture)
    except ConfigError as error:
        return [f"{problem.message} | {problem.fix}" for problem in error.problems]
    return [f"{p.message} | {p.fix}" for p in validate.check(config, 1)]


def test_the_shape_is_filled_in(published):
    config = read_config(["--load-hf", str(published["llama 3.1"]), "--mock-data"], "gpt")
    model = config.model
    assert (model.num_layers, model.hidden_size, model.query_groups) == (3, 32, 2)
    assert (model.vocab_size, model.ffn, model.rope_scaling) == (61, 48, "llama3")
    assert model.seq_length == 32, "no longer than the model's positions"
    assert (model.hidden_dropout, model.attention_dropout) == (0.0, 0.0)


def test_every_contradiction_is_an_error(published):
    folder = published["llama 2"]
    found = problems_of(
        "--load-hf", folder, "--num-layers", 5, "--vocab-size", 100, "--no-swiglu", "--preset",
        "gpt2",
    )  # fmt: skip
    assert len(found) == 4
    assert "--num-layers 5, but the model in" in found[1] + found[2] + found[3]
    assert any("has num_layers 3 | leave out --num-layers" in text for text in found)
    assert "both say what the model is" in found[0]
    assert problems_of("--load-hf", folder, "--num-layers", 3, "--hidden-dropout", 0.1) == []
    rope = problems_of("--load-hf", folder, "--max-position-embeddings", 64)
    assert rope == [], "RoPE has no table: the number is a limit"
    window = problems_of("--load-hf", published["mistral"], "--max-position-embeddings", 32)
    assert len(window) == 1 and "has max_position_embeddings 24" in window[0]


def test_the_program_must_be_that_of_the_model(published):
    (problem,) = problems_of("--load-hf", published["bert"])
    assert "--load-hf" in problem and "pretrain_bert.py" in problem
    (problem,) = problems_of(
        "--load-hf", published["bert, masked only"], "--bert-pair", "sop", architecture="bert"
    )
    assert "has bert_pair none | leave out --bert-pair" in problem


def test_what_the_folder_lacks_is_reported_before_anything(published, tmp_path):
    (absent,) = problems_of("--load-hf", tmp_path / "none")
    assert "there is no such folder" in absent
    (file,) = problems_of("--load-hf", published["llama 2"] / "config.json")
    assert f"config.json is a file | --load-hf {published['llama 2']}" in file
    folder = shutil.copytree(published["llama 2"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    found = problems_of("--load-hf", folder)
    assert len(found) == 2 and all("is missing" in text for text in found)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_act": "relu", "attention_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    found = problems_of("--load-hf", folder)
    assert len(found) == 2 and "hidden_act is 'relu'" in found[0] + found[1]


def test_the_tokenizer_is_the_folder_s(published, tmp_path):
    files = make_files(tmp_path)
    folder = shutil.copytree(published["gpt2"], tmp_path / "copy")
    shutil.copy(files["GPT2BPETokenizer"]["vocab_file"], folder)
    shutil.copy(files["GPT2BPETokenizer"]["merge_file"], folder)
    config = from_flat({"load_hf": str(folder), "data_path": ["any"]})
    assert config.data.tokenizer_type == "GPT2BPETokenizer"
    assert config.data.vocab_file == str(folder / "vocab.json")
    shutil.copy(tmp_path / "hf" / "tokenizer.json", folder)
    config = from_flat({"load_hf": str(folder), "data_path": ["any"]})
    assert config.data.tokenizer_model == str(folder / "tokenizer.json")
    given = from_flat(
        {"load_hf": str(folder), "data_path": ["any"], "tokenizer_type": "ByteTokenizer"}
    )
    assert (given.data.tokenizer_type, given.data.tokenizer_model) == ("ByteTokenizer", None)


def test_the_summary_needs_no_flags_of_the_model(published):
    flat = {"load_hf": str(published["qwen3"]), **SHORT}
    config = resolve(from_flat(flat), 1)
    assert set(chosen(config, 1)) == {*SHORT, "load_hf"} - {"micro_batch_size"}
    text = "\n".join(summary_lines(config, 1))
    assert "starts from" in text and "GPT, 3 layers, hidden 32" in text


def test_the_folder_is_kept_with_its_whole_path(published, monkeypatch):
    """So a checkpoint can be converted back from anywhere."""
    folder = published["mistral"]
    monkeypatch.chdir(folder.parent)
    config = resolve(from_flat({"load_hf": folder.name, **SHORT}), 1)
    assert config.checkpoint.load_hf == str(folder)
    assert resolve(config, 1) == config


def test_load_without_a_checkpoint_is_the_first_run(published, tmp_path):
    """The same command starts from --load-hf and then resumes, as a job script needs, even where
    the folder's weights are gone."""
    folder = shutil.copytree(published["gpt2"], tmp_path / "hf")
    flags = {**SHORT, "load_hf": str(folder), "save": "saved", "load": "saved"}
    first = console_of(ALONE, sound(flags, 1, tmp_path), tmp_path)
    assert f"weights of the GPT2LMHeadModel in {folder}" in first
    (folder / "model.safetensors").unlink()
    longer = sound({**flags, "train_iters": 3}, 1, tmp_path)
    second = console_of(ALONE, longer, tmp_path)
    assert "resumed from saved/iter_0000002" in second
    assert Run(second, tmp_path).iterations == [1, 2, 3]
    assert "weights of the" not in second


def test_another_load_makes_it_idle(published, tmp_path, monkeypatch):
    flags = ("--load", "elsewhere", "--save", "here", "--load-hf", published["gpt2"])
    assert any("--load-hf" in text and "has no effect" in text for text in problems_of(*flags))


def test_heads_that_are_not_there_start_from_the_seed(published, tmp_path):
    """A BertModel has no heads; its encoder and pooler are those of the BertForPreTraining."""
    from transformers import BertModel

    BertModel.from_pretrained(published["bert"]).save_pretrained(tmp_path / "hf")
    flags = {**SHORT, "architecture": "bert", "load_hf": str(tmp_path / "hf"), "train_iters": 1}
    console = console_of(ALONE, sound(flags, 1, tmp_path), tmp_path)
    assert "a BertModel has no mlm_head.* pair_head.*: these start from the seed" in console


def test_heads_that_the_run_does_not_have_are_not_reported(published, tmp_path):
    """A BertForMaskedLM has no pair head, and --bert-pair none wants none."""
    flags = {**SHORT, "architecture": "bert", "load_hf": str(published["bert, masked only"])}
    config = sound({**flags, "train_iters": 1}, 1, tmp_path)
    assert config.bert.bert_pair == "none"
    console = console_of(ALONE, config, tmp_path)
    assert "weights of the BertForMaskedLM" in console and "start from the seed" not in console


NO_SEQUENCE = "leave out --seq-length"
ONE_RANK = "leave out --tensor-model-parallel-size"
FIXES = (
    ("mistral", "--seq-length 32", 1, [NO_SEQUENCE]),
    ("gpt2", "--seq-length 64", 1, [NO_SEQUENCE]),
    ("llama 3.1", "--seq-length 64", 1, [NO_SEQUENCE, "--max-position-embeddings 64"]),
    ("llama 3.1", "--tp 3", 3, [ONE_RANK]),
    ("llama 3.1", "--tp 4", 4, ["--tp 2", ONE_RANK]),
    ("gpt2", "--pp 4", 4, ["--pp 2", "leave out --pipeline-model-parallel-size"]),
)
"""(model, flags, ranks, offers): what does not fit its folder."""


@pytest.mark.parametrize(("name", "flags", "ranks", "offers"), FIXES)
def test_fixes_are_those_that_the_folder_allows(published, name, flags, ranks, offers):
    """Each is typed in place of what does not fit, and is sound."""
    common = ["--load-hf", str(published[name]), "--mock-data", "--train-iters", "2"]
    problems = validate.check(read_config([*common, *flags.split()], "gpt"), ranks)
    assert problems
    for problem in problems:
        assert problem.fix.split(", or ") == offers
    for offer in offers:
        words = [] if offer.startswith("leave out") else offer.split()
        given = [] if "max-position" not in offer else flags.split()
        repaired = read_config([*common, *words, *given], "gpt")
        assert validate.check(repaired, ranks) == [], offer


def test_another_epsilon_is_no_fix(published, tmp_path):
    """--load holds a model of another epsilon, which the folder does not have."""
    folder = shutil.copytree(published["llama 2"], tmp_path / "hf")
    flags = {**SHORT, "load_hf": str(folder), "save": "saved", "load": "saved", "train_iters": 1}
    console_of(ALONE, sound(flags, 1, tmp_path), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    saved = str(tmp_path / "saved")
    words = ["--load-hf", str(folder), "--load", saved, "--save", saved, "--seq-length", "16"]
    (problem,) = problems_of(*words, "--global-batch-size", 2, "--device", "cpu")
    message, fix = problem.split(" | ")
    assert "has norm_epsilon 1e-06, this run has 0.001" in message
    assert fix == "--allow-model-change"


def test_a_tokenizer_larger_than_the_vocabulary(published, tmp_path):
    folder = shutil.copytree(published["llama 2"], tmp_path / "copy")
    make_files(tmp_path)
    shutil.copy(tmp_path / "hf" / "tokenizer.json", folder)
    words = ("--load-hf", folder, "--data-path", "none", "--train-iters", "2", "--split", "1,0,0")
    config = read_config([*map(str, words)], "gpt")
    found = [p for p in validate.check(config, 1) if "entries of the tokenizer" in p.message]
    (problem,) = found
    assert f"the vocabulary of --load-hf {folder}, 61, is less than the" in problem.message
    assert problem.fix == "the tokenizer that the model was trained with"


def test_all_problems_at_once(published, tmp_path):
    """Contradictions, flags that do not fit each other, and tensors."""
    folder = shutil.copytree(published["llama 2"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    run = subprocess.run(
        [sys.executable, ROOT / "pretrain_gpt.py", "--load-hf", folder, "--num-layers", "5",
         "--seq-length", "64", "--mock-data", "--train-iters", "2"],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert run.returncode == 2
    printed = " ".join(run.stderr.split())
    assert "3 problems" in printed
    for words in ("--num-layers 5, but the model", "--seq-length 64 is longer", "norm.weight is m"):
        assert words in printed, printed
    # A config.json that leaves the shapes known.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"odd_key": 3, "pretraining_tp": 2}))
    found = problems_of("--load-hf", folder)
    assert len(found) == 3
    for words in ("config.json: odd_key is 3", "config.json: pretraining_tp is 2", "norm.weight"):
        assert any(words in text for text in found), found
    # One that does not, and a file that is no safetensors file.
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": None}))
    (folder / "model.safetensors").write_bytes(b"none")
    found = problems_of("--load-hf", folder)
    assert len(found) == 2 and "hidden_size is missing" in found[0]
    assert "no safetensors file" in found[1]


def test_a_folder_of_another_format(published, tmp_path):
    flags = {**SHORT, "load_hf": str(published["gpt2"]), "save": str(tmp_path / "saved")}
    console_of(ALONE, sound({**flags, "train_iters": 1}, 1, tmp_path), tmp_path)
    for folder in (tmp_path / "saved", tmp_path / "saved" / "iter_0000001"):
        (problem,) = problems_of("--load-hf", folder)
        assert "holds checkpoints of megalite" in problem
        assert f"--pretrained-checkpoint {folder}" in problem.split(" | ")[1]
    (tmp_path / "old/iter_0000100/mp_rank_00").mkdir(parents=True)
    (problem,) = problems_of("--load-hf", tmp_path / "old")
    assert "holds checkpoints of Megatron-LM" in problem and "--from megatron" in problem


def test_a_base_model_without_an_output_layer(published, tmp_path):
    """What helps is said, and does."""
    from transformers import LlamaModel

    LlamaModel.from_pretrained(published["llama 2"]).save_pretrained(tmp_path / "hf")
    (problem,) = problems_of("--load-hf", tmp_path / "hf")
    assert "lm_head.weight is missing: a LlamaModel has no output layer" in problem
    assert "save the model as a LlamaForCausalLM" in problem
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    tied = config | {"tie_word_embeddings": True}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(tied))
    assert problems_of("--load-hf", tmp_path / "hf") == []


def test_positions_may_change_up_to_the_window(published, tmp_path):
    """Also where the window is as long as the positions, which limits nothing by itself."""
    folder = shutil.copytree(published["mistral"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 32}))
    assert problems_of("--load-hf", folder, "--max-position-embeddings", 16) == []
    (problem,) = problems_of("--load-hf", folder, "--max-position-embeddings", 64)
    assert "has max_position_embeddings 32" in problem
