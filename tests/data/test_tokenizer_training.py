"""Training a tokenizer: the same texts give the same files, and errors name their cause."""

import subprocess
import sys

import pytest

from megalite.data.tokenizers import (
    TokenizerError,
    build_tokenizer,
    train_bpe,
    train_sentencepiece,
    train_wordpiece,
)
from tests.data.tokenizer_files import SENTENCES

sentencepiece = pytest.importorskip("sentencepiece")


def test_training_is_deterministic_and_has_the_documented_ids(tmp_path):
    model_path = tmp_path / "t.model"
    model_path.write_bytes(train_sentencepiece(SENTENCES, 330))
    again = train_sentencepiece(SENTENCES, 330)
    assert again == model_path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=again)
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (
        0,
        1,
        2,
        3,
    )
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(model_path))
    assert (tokenizer.vocab_size, tokenizer.eod) == (330, 2)


def broken_source():
    yield "some text"
    raise OSError("disk on fire")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "error", "message"),
    [
        (
            ["too little text"],
            9000,
            TokenizerError,
            r"--vocab-size 9000 does not fit this text: .*<= \d+",
        ),
        (
            ["too little text"],
            100,
            TokenizerError,
            r"--vocab-size 100 does not fit this text: .*required_chars",
        ),
        ([], 300, TokenizerError, "input is empty"),
        (["\n", ""], 300, TokenizerError, "input is empty"),
        (broken_source(), 300, OSError, "disk on fire"),
    ],
)
def test_training_errors(texts, vocab_size, error, message):
    with pytest.raises(error, match=message):
        train_sentencepiece(texts, vocab_size)


def test_training_in_other_processes_gives_the_same(tmp_path):
    """Hash tables have another order in each process; the vocabularies must not."""
    code = (
        "import hashlib, random; from megalite.data.tokenizers import train_bpe, train_wordpiece;"
        "draw = random.Random(1);"
        "texts = [''.join(draw.choices('abcdefghijABCé,.!你好 ', k=40)) for _ in range(300)];"
        "results = [*train_bpe(texts, 400), train_wordpiece(texts, 200), train_wordpiece(texts, "
        "200, True)];"
        "print([hashlib.sha256(result).hexdigest() for result in results])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        for _ in range(3)
    ]
    assert runs[0].stdout and len({run.stdout for run in runs}) == 1, runs[0].stderr


@pytest.mark.parametrize("train", [train_bpe, train_wordpiece])
def test_training_errors_of_other_kinds(train):
    with pytest.raises(TokenizerError, match="--vocab-size 5000 does not fit this text: it gives"):
        train(SENTENCES, 5000)
    with pytest.raises(TokenizerError, match="--vocab-size 20 does not fit this text"):
        train(SENTENCES, 20)
    with pytest.raises(OSError, match="disk on fire"):
        train(broken_source(), 300)
