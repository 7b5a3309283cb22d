"""tools/fill_mask.py, and loading a trained model into one process: what is found, and what is
refused."""

import re
import shutil
import sys

import pytest
import torch

from megalite.checkpoint.folder import CheckpointError
from megalite.data.config import DataConfig
from megalite.data.tokenizers import TokenizerError, checkpoint_data_config, train_wordpiece
from megalite.models.batch import Microbatch
from megalite.parallel.launch import LaunchInfo
from megalite.programs import fill_mask
from megalite.training.load_model import load_model
from tests.runs import console_of, sound

ALONE = LaunchInfo()
SHAPE = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=24,
    mock_data=True,
    train_iters=2,
    lr=1e-3,
    global_batch_size=4,
    device="cpu",
    save="saved",
    vocab_size=110,
)
BERT = SHAPE | {"architecture": "bert"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, pool):
    """A folder with a vocabulary, a BERT saved by 2x2x2 ranks, and a GPT."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "vocab.txt").write_bytes(
        train_wordpiece(["the state of the union is strong"] * 9, 43)
    )
    flags = BERT | dict(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
    )
    pool.run(console_of, 8, sound(flags, 8, folder / "bert"), folder / "bert")
    console_of(ALONE, sound(SHAPE, 1, folder / "gpt"), folder / "gpt")
    return folder


@pytest.fixture
def fill(made, monkeypatch, capsys):
    """The tool's output, or what it says where it must end with another status."""

    def run(*words: str, status: int = 0, load: str = "bert", vocabulary: bool = True) -> str:
        named = [
            "--tokenizer-type",
            "BertWordPieceLowerCase",
            "--vocab-file",
            str(made / "vocab.txt"),
        ]
        argv = [
            "--load",
            str(made / load / "saved"),
            "--device",
            "cpu",
            *(named if vocabulary else []),
            *words,
        ]
        monkeypatch.setattr(sys, "argv", ["fill_mask.py", *argv])
        found = 0
        try:
            fill_mask.main()
        except SystemExit as end:
            found = end.code
        printed = capsys.readouterr()
        assert found == status, printed
        return printed.out if status == 0 else printed.err

    return run


def test_blanks_are_filled_with_the_model_s_first_guesses(made, fill):
    printed = fill("--text", "the state of the [MASK] is [MASK]", "[MASK]", "--top", "3")
    lines = printed.splitlines()
    assert (
        lines[0] == "the state of the [MASK] is [MASK]" and lines[3] == "[MASK]" and len(lines) == 5
    )
    given = dict(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(made / "vocab.txt"))
    trained = load_model(made / "bert/saved", "bert", device="cpu", **given)
    (ids,) = trained.tokenizer.encode_batch(["the state of the"]).split()
    (between,) = trained.tokenizer.encode_batch(["is"]).split()
    cls, sep, mask = trained.tokenizer.ids_of(["[CLS]", "[SEP]", "[MASK]"])
    row = [cls, *ids, mask, *between, mask, sep]
    with torch.no_grad():
        logits = trained.model(None, Microbatch(torch.tensor([row])))[
            :, 0, : trained.tokenizer.vocab_size
        ]
    logits[:, trained.tokenizer.ids_of(["[CLS]", "[SEP]", "[MASK]", "[PAD]"])] = float("-inf")
    for line, place in zip(
        lines[1:3], [i for i, token in enumerate(row) if token == mask], strict=True
    ):
        shares, best = logits[place].double().softmax(-1).topk(3)
        wanted = [
            f"{trained.tokenizer.decode([i])} {s:.1%}"
            for i, s in zip(best.tolist(), shares.tolist())
        ]
        assert line.strip() == ", ".join(wanted)
    assert [float(share) for share in re.findall(r"([\d.]+)%", lines[1])] == sorted(
        map(float, re.findall(r"([\d.]+)%", lines[1])), reverse=True
    )


def test_special_tokens_are_no_answers(fill):
    """Of 43 entries, 4 frame and mask samples."""
    words = fill("--text", "[MASK]", "--top", "39").splitlines()[1].split(", ")
    assert len(words) == 39 and not any(
        token in word for token in ("[CLS]", "[SEP]", "[MASK]", "[PAD]") for word in words
    )
    assert all(word.strip()[0] not in "0123456789" for word in words), "no answer is empty"


def test_the_space_before_a_blank_is_not_a_token(made, fill, tmp_path):
    """Byte-level tokens hold the space before a word; what stands before a blank must not end in
    one of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [
        "<s>",
        "</s>",
        "<mask>",
        "<pad>",
        *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    ][:110]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    flags = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(tmp_path / "tokenizer.json"),
    ]
    spaced, joined = (
        fill("--text", text, *flags, vocabulary=False) for text in ("we are [MASK]", "we are[MASK]")
    )
    assert spaced.splitlines()[1] == joined.splitlines()[1]


def test_all_that_is_wrong_is_said(fill):
    said = fill("--text", "no blank", "none here", "--top", "0", status=2)
    assert (
        all(words in said for words in ("--top 0", "'no blank'", "'none here'"))
        and "3 problems" in said
    )
    assert "holds a GPT, not a BERT" in fill("--text", "[MASK]", status=1, load="gpt")
    assert "names no tokenizer" in fill("--text", "[MASK]", status=1, vocabulary=False)
    assert "no such folder" in fill("--text", "[MASK]", "--load", "nowhere", status=2)
    too_long = fill("--text", "[MASK]" * 40, status=1)
    assert "42 tokens, the model has 24 positions" in too_long


def test_a_trained_model_is_of_the_kind_that_is_asked_for(made):
    with pytest.raises(CheckpointError, match="holds a BERT, not a GPT"):
        load_model(made / "bert/saved", "gpt", device="cpu")
    with pytest.raises(TokenizerError, match="257 entries, the model only 110"):
        load_model(made / "gpt/saved", "gpt", device="cpu", tokenizer_type="ByteTokenizer")
    with pytest.raises(CheckpointError, match="iter_0000007 does not exist"):
        load_model(made / "gpt/saved", "gpt", step=7, device="cpu")


def test_the_tokenizer_of_a_checkpoint_is_found_from_any_folder(made, tmp_path, monkeypatch):
    """The run names it by a relative path. The whole folder may move, with the tokenizer in it."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copyfile(made / "vocab.txt", old / "vocab.txt")
    flags = BERT | dict(tokenizer_type="BertWordPieceLowerCase", vocab_file="vocab.txt")
    console_of(ALONE, sound(flags, 1, old), old)
    monkeypatch.chdir(tmp_path)
    assert load_model("old/saved", "bert", device="cpu").config.data.vocab_file == str(
        old / "vocab.txt"
    )
    old.rename(new)
    assert load_model("new/saved", "bert", device="cpu").tokenizer.vocab_size == 43
    (new / "vocab.txt").rename(new / "saved/vocab.txt")
    assert load_model("new/saved", "bert", device="cpu").tokenizer.vocab_size == 43
    (new / "saved/vocab.txt").unlink()
    with pytest.raises(TokenizerError, match=r"names the tokenizer's file .*give --vocab-file"):
        load_model("new/saved", "bert", device="cpu")


def test_a_checkpoint_of_before_has_a_relative_path(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig(tokenizer_type="BertWordPieceLowerCase", vocab_file="v/vocab.txt")
    folder = tmp_path / "run/saved/iter_0000002"
    with pytest.raises(TokenizerError, match=r"v/vocab\.txt, relative to the folder that its run"):
        checkpoint_data_config(data, {}, folder)
    given = {"vocab_file": "other.txt", "tokenizer_type": None}
    assert checkpoint_data_config(data, given, folder).vocab_file == "other.txt"
    (tmp_path / "run/v").mkdir(parents=True)
    (tmp_path / "run/v/vocab.txt").touch()
    found = checkpoint_data_config(data, {}, folder).vocab_file
    assert found == str(tmp_path / "run/v/vocab.txt")
    (tmp_path / "v").mkdir()
    (tmp_path / "v/vocab.txt").touch()
    assert checkpoint_data_config(data, {}, folder).vocab_file == "v/vocab.txt"
