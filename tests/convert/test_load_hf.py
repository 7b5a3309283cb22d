"""--load-hf: what it fills in, what contradicts it, and that a checkpoint is resumed before it."""

import json
import shutil

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
    assert "config.json" in problems_of("--load-hf", tmp_path / "none")[0]
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
    assert "a BertModel has no mlm_head.* pair_head.* output.*: these start from the seed" in (
        console
    )
