"""Tokenizers give back the text they were given, and say what is wrong with a model."""

import io
import sys

import numpy as np
import pytest

from megalite.data.tokenizers import ByteTokenizer, TokenizerError, build_tokenizer, train_sentencepiece

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [
    "Fellow citizens of the Senate,\n\nand of the House:  I lay before you\tthe state of the Union.\r\n",
    "  leading, trailing and   inner spaces  ",
    "",
    "\n\n\n",
    "naïve café — 你好 😀 \u200b \x00\x01\x7f",
    "</s> <s> <unk> <pad> <0x0A>",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(train_sentencepiece(TEXTS[:2] * 3, 320))
    return path


@pytest.mark.parametrize("kind", ["ByteTokenizer", "SentencePieceTokenizer"])
def test_decoding_gives_back_the_text(kind, model_path):
    tokenizer = build_tokenizer(kind, str(model_path) if kind == "SentencePieceTokenizer" else None)
    ids = tokenizer.encode_batch(TEXTS).split()
    assert [tokenizer.decode(document) for document in ids] == TEXTS
    assert all(document.dtype == np.int32 for document in ids)
    flat = np.concatenate(ids)
    assert flat.min() >= 0 and flat.max() < tokenizer.vocab_size
    assert tokenizer.eod < tokenizer.vocab_size and tokenizer.eod not in flat
    assert tokenizer.decode([*ids[0].tolist(), tokenizer.eod]) == TEXTS[0]
    assert tokenizer.encode_batch([]).split() == []
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_batch(["half \ud800"])


def test_training_is_deterministic_and_has_the_ids_it_promises(model_path):
    again = train_sentencepiece(TEXTS[:2] * 3, 320)
    assert again == model_path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=again)
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, 3)
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(model_path))
    assert (tokenizer.vocab_size, tokenizer.eod) == (320, 2)


def test_digests_tell_models_apart(model_path, tmp_path):
    other = tmp_path / "o.model"
    other.write_bytes(train_sentencepiece(TEXTS[:2] * 3, 321))
    digests = {build_tokenizer("SentencePieceTokenizer", str(path)).sha256 for path in (model_path, other)}
    assert len(digests | {ByteTokenizer.sha256}) == 3


def test_byte_tokenizer():
    tokenizer = build_tokenizer("ByteTokenizer")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode_batch(["aé"]).ids.tolist() == [97, 195, 169]
    assert tokenizer.decode(np.array([97, 256, 195])) == "a\ufffd"


def test_unusable_models(tmp_path, model_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    headless = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to learn"]), model_writer=headless, vocab_size=20, model_type="bpe",
        eos_id=-1, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "headless.model").write_bytes(headless.getvalue())
    for kind, model, message in (
        ("SentencePieceTokenizer", None, "needs --tokenizer-model"),
        ("SentencePieceTokenizer", str(tmp_path / "none.model"), "no such file"),
        ("SentencePieceTokenizer", str(tmp_path / "bad.model"), "not a SentencePiece model"),
        ("ByteTokenizer", str(model_path), "leave the flag out"),
        ("WordTokenizer", None, "known are"),
    ):
        with pytest.raises(TokenizerError, match=message):
            build_tokenizer(kind, model)
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "headless.model"))
    with pytest.raises(TokenizerError, match=r"headless\.model: the model has no end-of-sentence piece"):
        _ = tokenizer.eod


def test_a_missing_library_is_one_clear_line(monkeypatch, model_path):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match="pip install sentencepiece"):
        build_tokenizer("SentencePieceTokenizer", str(model_path))


def broken_source():
    yield "some text"
    raise OSError("disk on fire")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "error", "message"),
    [
        (["too little text"], 9000, TokenizerError, r"--vocab-size 9000 does not fit this text: .*<= \d+"),
        (["too little text"], 100, TokenizerError, r"--vocab-size 100 does not fit this text: .*required_chars"),
        ([], 300, TokenizerError, "input is empty"),
        (["\n", ""], 300, TokenizerError, "input is empty"),
        (broken_source(), 300, OSError, "disk on fire"),
    ],
)
def test_training_errors(texts, vocab_size, error, message):
    with pytest.raises(error, match=message):
        train_sentencepiece(texts, vocab_size)
