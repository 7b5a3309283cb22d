"""tools/convert_checkpoint.py: there and back bit for bit, without a word of transformers, one
tensor in memory at a time, and nothing half-valid after a kill."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.load import Checkpoint
from megalite.data.tokenizers import build_tokenizer
from megalite.programs import convert_checkpoint
from megalite.training.load_model import load_model
from megalite.training.state import _load_optimizer
from tests.convert.published_models import GROUPED, MODELS, _make, load, their_logits
from tests.data.tokenizer_files import TEXTS, make_files
from tests.runs import ALONE, console_of, sound

ROOT = Path(__file__).resolve().parents[2]
TRAINED = {
    "mock_data": True,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "vocab_size": 400,
    "train_iters": 2,
    "global_batch_size": 2,
    "eval_interval": 0,
    "eval_iters": 0,
    "device": "cpu",
}
LLAMA = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "num_query_groups": 2,
}


HF_TO_HF = ("--from", "hf", "--to", "hf", "--load")


def convert(monkeypatch, *arguments) -> None:
    """Run the program in this process."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    convert_checkpoint.main()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder of Hugging Face."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(published, tmp_path, monkeypatch, name):
    """Every tensor bit for bit, config.json equal, files of the size asked for."""
    hf = published[name]
    there = tmp_path / "megalite"
    back = tmp_path / "back"
    convert(monkeypatch, "--from", "hf", "--to", "megalite", "--load", hf, "--save", there)
    flags = ("--from", "megalite", "--to", "hf", "--load", there, "--save", back)
    convert(monkeypatch, *flags, "--max-shard-size", "20KB")
    before = tensors_in(hf)
    after = tensors_in(back)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    assert json.loads((back / "config.json").read_text()) == json.loads(
        (hf / "config.json").read_text()
    )
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 1
    assert {path.name for path in files} == {
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    }
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert torch.equal(their_logits(back), their_logits(hf))
    assert {path.name for path in tmp_path.iterdir()} == {"megalite", "back"}, "no draft is left"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of runs of two iterations: a GPT-2 in bf16 with a tokenizer, a Llama, a BERT."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = make_files(folder)["GPT2BPETokenizer"]
    tokenizer = {"tokenizer_type": "GPT2BPETokenizer", **tokenizer}
    runs = {
        "gpt2": {**tokenizer, "precision": "bf16"},
        "llama": LLAMA,
        "bert": {
            "architecture": "bert",
            "norm_placement": "post",
            "gelu": "erf",
            "bert_pair": "nsp",
        },
    }
    for name, flags in runs.items():
        config = sound({**TRAINED, **flags, "save": str(folder / name)}, 1, folder)
        console_of(ALONE, config, folder)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_what_was_trained_here_loads_without_a_word(trained, tmp_path, monkeypatch, name):
    """AutoConfig and the class that config.json names warn of nothing; fp32 comes from the master
    weights."""
    save = tmp_path / "hf"
    flags = ("--from", "megalite", "--to", "hf", "--load", trained / name, "--save", save)
    convert(monkeypatch, *flags, "--dtype", "fp32")
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    from transformers.utils import logging as theirs

    logger = theirs.get_logger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = load(save)
    finally:
        logger.removeHandler(handler)
    assert not records, [record.getMessage() for record in records]
    assert model.dtype == torch.float32
    stored = Checkpoint.open(trained / name)
    weight = (
        next(
            key
            for key in ("optimizer.master.", "")
            if f"{key}layers.0.mlp.down.weight" in stored.names
        )
        + "layers.0.mlp.down.weight"
    )
    key = {
        "gpt2": "transformer.h.0.mlp.c_proj.weight",
        "llama": "model.layers.0.mlp.down_proj.weight",
        "bert": "bert.encoder.layer.0.output.dense.weight",
    }[name]
    found = model.state_dict()[key]
    assert torch.equal(found.t() if name == "gpt2" else found, stored.read(weight))


def test_a_run_goes_on_from_what_was_converted(published, tmp_path, monkeypatch):
    """--load of a converted checkpoint with --finetune, from the loss that --load-hf starts at."""
    there = tmp_path / "there"
    convert(
        monkeypatch,
        "--from",
        "hf",
        "--to",
        "megalite",
        "--load",
        published["qwen2"],
        "--save",
        there,
    )
    common = {"mock_data": True, "seq_length": 16, "train_iters": 1, "device": "cpu"}
    hf = sound({**common, "load_hf": str(published["qwen2"])}, 1, tmp_path)
    first = console_of(ALONE, hf, tmp_path)
    keys = (
        "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size "
        "max_position_embeddings position_embedding_type rotary_base normalization norm_epsilon "
        "swiglu disable_bias_linear add_qkv_bias untie_embeddings_and_output_weights vocab_size "
        "hidden_dropout attention_dropout"
    ).split()
    shape = {key: getattr(hf.model, key) for key in keys}
    own = sound({**common, **shape, "load": str(there), "finetune": True}, 1, tmp_path)
    second = console_of(ALONE, own, tmp_path)
    loss = re.compile(r"\| (loss \S+)")
    assert loss.search(first)[1] == loss.search(second)[1]


def test_a_published_folder_that_is_gone_is_reported(published, tmp_path, monkeypatch, capsys):
    """Back from a run's checkpoint, once its --load-hf is gone: its files are kept in --save."""
    folder = shutil.copytree(published["mistral"], tmp_path / "hf")
    common = {"mock_data": True, "seq_length": 16, "train_iters": 1, "device": "cpu"}
    run = sound({**common, "load_hf": "hf", "save": "saved"}, 1, tmp_path)
    console = console_of(ALONE, run, tmp_path)
    assert f"kept in saved: config.json, generation_config.json of {folder}" in console
    flags = ("--from", "megalite", "--to", "hf", "--load", tmp_path / "saved", "--save")
    convert(monkeypatch, *flags, tmp_path / "found")
    assert "as MistralForCausalLM" in capsys.readouterr().out
    shutil.rmtree(folder)
    convert(monkeypatch, *flags, tmp_path / "kept")
    assert "as MistralForCausalLM" in capsys.readouterr().out
    (tmp_path / "saved" / "config.json").unlink()
    convert(monkeypatch, *flags, tmp_path / "lost")
    line = f"{folder}/config.json is not there: written as LlamaForCausalLM"
    assert line in capsys.readouterr().out


def test_other_positions_keep_what_was_published(tmp_path, monkeypatch):
    """A run that changes --max-position-embeddings: ids and generation settings stay, of the
    folder in which the run started, and so does its tokenizer."""
    folder = tmp_path / "hf"
    make_files(tmp_path)  # in the same folder
    model = _make("LlamaForCausalLM", {**GROUPED, "vocab_size": 512})
    model.config.bos_token_id = 3
    model.config.eos_token_id = [5, 7]
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    flags = {"load_hf": str(folder), "save": "saved", "seq_length": 16, "train_iters": 1}
    flags |= {"mock_data": True, "device": "cpu", "max_position_embeddings": 64}
    flags |= {"tokenizer_type": "HuggingFaceTokenizer"}
    flags |= {"tokenizer_model": str(folder / "tokenizer.json")}
    tokenizer = (folder / "tokenizer.json").read_bytes()
    console_of(ALONE, sound(flags, 1, tmp_path), tmp_path)
    shutil.rmtree(folder)
    command = ("--from", "megalite", "--to", "hf", "--load", tmp_path / "saved", "--save")
    convert(monkeypatch, *command, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, [5, 7])
    assert config["max_position_embeddings"] == 64
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["do_sample"]) == (0.25, True)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == tokenizer


def test_a_missing_or_damaged_tokenizer_is_reported(published, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(published["llama 2"], tmp_path / "hf")
    flags = ("--from", "hf", "--to", "megalite", "--load", folder, "--save")
    convert(monkeypatch, *flags, tmp_path / "none")
    assert f"without a tokenizer: {folder}" in capsys.readouterr().out
    (folder / "tokenizer.json").write_text("{")
    convert(monkeypatch, *flags, tmp_path / "damaged")
    assert "the tokenizer cannot be used: " in capsys.readouterr().out


def test_tokenizers_travel_both_ways(trained, tmp_path, monkeypatch):
    """AutoTokenizer gives the ids of the run's tokenizer; back here, the kept files are found even
    after a move."""
    from transformers import AutoTokenizer

    hf = tmp_path / "hf"
    back = tmp_path / "back"
    convert(
        monkeypatch, "--from", "megalite", "--to", "hf", "--load", trained / "gpt2", "--save", hf
    )
    convert(monkeypatch, "--from", "hf", "--to", "megalite", "--load", hf, "--save", back)
    moved = back.rename(tmp_path / "moved")
    ours = load_model(trained / "gpt2", "gpt", device="cpu").tokenizer
    again = load_model(moved, "gpt", device="cpu").tokenizer
    theirs = AutoTokenizer.from_pretrained(hf)
    for text in ("aei oul\n\n  mnrst", "naïve — 你好 😀", "<|endoftext|>"):
        ids = ours.encode_batch([text]).ids.tolist()
        assert again.encode_batch([text]).ids.tolist() == ids
        if "endoftext" not in text:
            assert theirs(text)["input_ids"] == ids
    assert theirs.eos_token_id == ours.eod == again.eod
    generation = json.loads((hf / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ours.eod


KINDS = (
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "HuggingFaceTokenizer",
    "TikTokenizer",
)


@pytest.mark.parametrize("kind", KINDS)
def test_autotokenizer_gives_the_ids_of_every_kind(tmp_path, kind):
    """Of texts without special tokens, whose ids transformers takes by default."""
    transformers = pytest.importorskip("transformers")
    tokenizer = build_tokenizer(kind, **make_files(tmp_path)[kind])
    # As transformers writes it: text in place of the fixture's object.
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "<|user|>"}')
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in tokenizer.huggingface_files().items():
        (folder / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        if not re.search(r"<\S+>|\[MASK\]", text):
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ids == tokenizer.encode_batch([text]).ids.tolist(), repr(text)
    if kind.startswith("BertWordPiece"):
        framed = theirs("state of the union", "Senate")
        assert [framed["input_ids"][0], framed["input_ids"][-1]] == [
            theirs.cls_token_id,
            theirs.sep_token_id,
        ]
        assert framed["token_type_ids"][-1] == 1
    assert theirs.eos_token_id == tokenizer.eod or theirs.sep_token_id == tokenizer.eod


def test_types_of_numbers(published, tmp_path, monkeypatch):
    """bf16 rounds each number once; what is beyond fp16 is refused and nothing is left."""
    hf = published["gpt2"]
    save = tmp_path / "half"
    convert(
        monkeypatch,
        "--from",
        "hf",
        "--to",
        "safetensors",
        "--load",
        hf,
        "--save",
        save,
        "--dtype",
        "bf16",
    )
    found = load_file(save / "model.safetensors")
    theirs = tensors_in(hf)
    assert torch.equal(
        found["layers.1.mlp.up.weight"], theirs["transformer.h.1.mlp.c_fc.weight"].t().bfloat16()
    )
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_bytes((hf / "config.json").read_bytes())
    theirs["transformer.ln_f.bias"][3] = 70000.0
    save_file(
        {name: value.contiguous() for name, value in theirs.items()}, large / "model.safetensors"
    )
    with pytest.raises(SystemExit):
        convert(monkeypatch, *HF_TO_HF, large, "--save", tmp_path / "none", "--dtype", "fp16")
    assert not (tmp_path / "none").exists()


def test_problems_are_all_reported_before_anything(published, tmp_path, monkeypatch, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        sizes = ("--max-shard-size", "large", "--ckpt-step", "3")
        formats = ("--from", "hf", "--to", "megalite")
        convert(monkeypatch, *formats, "--load", tmp_path / "absent", "--save", full, *sizes)
    assert stopped.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    for words in ("there is no such folder", "nothing is overwritten", "no size", "--ckpt-step is"):
        assert words in printed
    assert (full / "file").read_text() == "mine"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(SystemExit):
        convert(monkeypatch, *HF_TO_HF, published["gpt2"], "--save", tmp_path / "new")
    assert "will need" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def refused(monkeypatch, capsys, *arguments) -> str:
    """What the program prints when it refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        convert(monkeypatch, *arguments)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_flags_and_tensors_are_reported_at_once(published, trained, tmp_path, monkeypatch, capsys):
    """Every problem but those that only weights show."""
    folder = shutil.copytree(published["llama 2"], tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    flags = ("--save", tmp_path / "new", "--max-shard-size", "large")
    printed = refused(monkeypatch, capsys, *HF_TO_HF, folder, *flags)
    assert "2 problems" in printed and "no size" in printed
    assert "model.norm.weight is missing" in printed
    # A file beside the weights.
    shutil.copy(published["llama 2"] / "model.safetensors", folder)
    (folder / "generation_config.json").write_text("{")
    printed = refused(monkeypatch, capsys, *HF_TO_HF, folder, *flags)
    assert "2 problems" in printed and "generation_config.json is damaged" in printed
    # A model that the architecture cannot express, and too little room.
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    command = ("--from", "megalite", "--to", "hf", "--load", trained / "gpt2", *flags)
    printed = refused(monkeypatch, capsys, *command, "--hf-model-type", "llama")
    assert "3 problems" in printed and "will need" in printed
    assert "llama: position_embedding_type is learned_absolute" in printed
    assert not (tmp_path / "new").exists()


def test_the_right_from_is_said(published, trained, tmp_path, monkeypatch, capsys):
    converted = tmp_path / "converted"
    convert(monkeypatch, "--from", "hf", "--to", "megalite", "--load", published["gpt2"],
            "--save", converted)  # fmt: skip
    megatron = tmp_path / "megatron"
    (megatron / "iter_0000100/mp_rank_00_000").mkdir(parents=True)
    (megatron / "latest_checkpointed_iteration.txt").write_text("100")
    core = tmp_path / "core"
    core.mkdir()
    (core / ".metadata").touch()
    for folder, right in (
        (published["gpt2"], "hf"), (converted, "megalite"), (trained / "llama", "megalite"),
        (megatron, "megatron"), (core, "megatron"),
    ):  # fmt: skip
        for wrong in {"hf", "megatron", "megalite"} - {right}:
            flags = ("--from", wrong, "--to", "safetensors", "--save", tmp_path / "new")
            printed = refused(monkeypatch, capsys, *flags, "--load", folder)
            assert "1 problem" in printed and printed.endswith(f": --from {right}"), printed
    both = shutil.copytree(published["gpt2"], tmp_path / "both")
    shutil.copytree(converted / "iter_0000000", both / "iter_0000000")
    for named in ("hf", "megalite"):
        convert(monkeypatch, "--from", named, "--to", "safetensors", "--load", both,
                "--save", tmp_path / named)  # fmt: skip
    command = ("--from", "hf", "--to", "hf", "--save", tmp_path / "new", "--load")
    printed = refused(monkeypatch, capsys, *command, published["gpt2"] / "model.safetensors")
    assert printed.endswith(f"--load {published['gpt2']}")


def test_a_tokenizer_larger_than_the_model_is_refused(published, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(published["llama 2"], tmp_path / "hf")
    (tmp_path / "files").mkdir()
    make_files(tmp_path / "files")
    shutil.copy(tmp_path / "files" / "hf" / "tokenizer.json", folder)
    with_it = ("--from", "hf", "--to", "megalite", "--load", folder, "--save", tmp_path / "new")
    printed = refused(monkeypatch, capsys, *with_it)
    assert re.search(r"the tokenizer has \d+ entries, the model in \S+ 61: ", printed), printed
    (folder / "tokenizer.json").unlink()
    convert(monkeypatch, *with_it)
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("where", ["file/new", "closed/new"])
def test_a_place_where_nothing_can_be_written(published, tmp_path, monkeypatch, capsys, where):
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    real = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: real(path, mode) and Path(path).name != "closed"
    )  # root may write anywhere
    printed = refused(monkeypatch, capsys, *HF_TO_HF, published["gpt2"], "--save", tmp_path / where)
    words = "is a file, not a folder" if where == "file/new" else "nothing can be written in"
    assert "1 problem" in printed and words in printed


def test_a_way_through_a_folder_that_is_not_there(published, tmp_path, monkeypatch, capsys):
    """`absent/../taken` is `taken`, once `absent` is made for the draft."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    save = tmp_path / "absent" / ".." / "taken"
    printed = refused(monkeypatch, capsys, *HF_TO_HF, published["gpt2"], "--save", save)
    assert "exists already" in printed and not (tmp_path / "absent").exists()


def test_what_has_no_place_in_an_architecture_is_refused(trained, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        convert(
            monkeypatch,
            "--from",
            "megalite",
            "--to",
            "hf",
            "--load",
            trained / "gpt2",
            "--save",
            tmp_path / "new",
            "--hf-model-type",
            "llama",
        )
    assert stopped.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "llama: position_embedding_type is learned_absolute" in printed


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """A model of 40 equal layers: numpy's and Python's memory stays below a few of its largest
    tensors."""
    from tests.convert.published_models import GPT2_SIZES, _make

    sizes = {**GPT2_SIZES, "n_embd": 64, "n_layer": 40}
    _make("GPT2LMHeadModel", sizes).save_pretrained(tmp_path / "hf")
    largest = 4 * 64 * 64 * 4
    tracemalloc.start()
    convert(
        monkeypatch,
        "--from",
        "hf",
        "--to",
        "safetensors",
        "--load",
        tmp_path / "hf",
        "--save",
        tmp_path / "out",
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert total > 100 * largest
    assert peak < total / 4


STOP = """
import os, pathlib, time

calls = 0
real = os.fsync


def fsync(descriptor):
    global calls
    calls += 1
    if calls == int(os.environ["STOP_AT"]):
        pathlib.Path(os.environ["STOPPED"]).touch()
        time.sleep(600)
    real(descriptor)


os.fsync = fsync
"""
"""Stops the process where it flushes a file for the n-th time."""


@pytest.mark.parametrize(("to", "moment"), [("hf", 1), ("megalite", 3)])
def test_a_kill_leaves_nothing_half_valid(published, tmp_path, to, moment):
    """SIGKILL when the weights are written, or two files later; --save is then absent, and the
    next conversion works."""
    save = tmp_path / "out"
    command = [sys.executable, ROOT / "tools/convert_checkpoint.py", "--from", "hf", "--to", to]
    command += ["--load", published["gpt2"], "--save", save]
    (tmp_path / "sitecustomize.py").write_text(STOP)
    draft = tmp_path / ".out.converting"
    stopped = tmp_path / "stopped"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    environment |= {"STOP_AT": str(moment), "STOPPED": str(stopped)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not stopped.exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not save.exists() and draft.exists()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert save.is_dir() and not draft.exists()


def test_weights_alone_say_where_they_came_from():
    """A converted checkpoint was never saved with --no-save-optim."""
    state = {"optimizer": None, "converted_from": "hf there"}
    checkpoint = SimpleNamespace(state=state, folder="here")
    with pytest.raises(CheckpointError, match="weights alone .converted from hf there.: use --fin"):
        _load_optimizer(checkpoint, None, None)
