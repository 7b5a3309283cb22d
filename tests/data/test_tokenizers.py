"""Tokenizers give back the text they were given, and say what is wrong with a model."""

import io
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from megalite.data.tokenizers import (
    TOKENIZER_FILES,
    ByteTokenizer,
    CheckedTokenizer,
    TokenizerError,
    TokenizerType,
    build_tokenizer,
    fast,
    train_sentencepiece,
)
from megalite.data.tokenizers.build import KINDS
from tests.data.tokenizer_files import SENTENCES, TEXTS, make_files, random_texts

sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def model_path(files):
    return Path(files["SentencePieceTokenizer"]["tokenizer_model"])


EXACT = [
    "ByteTokenizer",
    "SentencePieceTokenizer",
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
]
"""Kinds that give back any text."""
FAST = EXACT[1:]


@pytest.mark.parametrize("kind", EXACT)
def test_decoding_gives_back_the_text(kind, files):
    tokenizer = build_tokenizer(kind, **files[kind])
    assert (tokenizer.backend, tokenizer.why) == ("reference", "")
    ids = tokenizer.encode_batch(TEXTS).split()
    assert [tokenizer.decode(document) for document in ids] == TEXTS
    assert all(document.dtype == np.int32 for document in ids)
    flat = np.concatenate(ids)
    assert flat.min() >= 0 and flat.max() < tokenizer.vocab_size
    assert tokenizer.eod < tokenizer.vocab_size and tokenizer.eod not in flat
    assert tokenizer.decode([*ids[0].tolist(), tokenizer.eod]) == TEXTS[0]
    assert tokenizer.check(TEXTS) is None


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_what_holds_for_every_kind(files, backend):
    assert set(files) == set(get_args(TokenizerType)) == set(TOKENIZER_FILES) == set(KINDS)
    for kind, given in files.items():
        tokenizer = build_tokenizer(kind, **given, backend=backend)
        assert tokenizer.encode_batch([]).split() == []
        assert [len(ids) for ids in tokenizer.encode_batch(["", ""]).split()] == [0, 0]
        assert 0 <= tokenizer.eod < tokenizer.vocab_size and tokenizer.decode([tokenizer.eod]) == ""
        assert tokenizer.sha256 == build_tokenizer(kind, **given).sha256
        assert tokenizer.backend == (
            "fast" if backend == "auto" and kind in FAST else "reference"
        ), tokenizer.why
        assert bool(tokenizer.why) == (backend == "auto" and kind not in FAST)
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode_batch(["1 2", "half \ud800"])
    digests = [build_tokenizer(kind, **given).sha256 for kind, given in files.items()]
    assert len(set(digests)) == len(digests)


def test_digests_distinguish_models(model_path, tmp_path):
    other = tmp_path / "o.model"
    other.write_bytes(train_sentencepiece(TEXTS[:2] * 3, 321))
    digests = {
        build_tokenizer("SentencePieceTokenizer", str(path)).sha256 for path in (model_path, other)
    }
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
        sentence_iterator=iter(["some text to learn"]),
        model_writer=headless,
        vocab_size=20,
        model_type="bpe",
        eos_id=-1,
        minloglevel=3,
    )
    (tmp_path / "headless.model").write_bytes(headless.getvalue())
    for kind, model, message in (
        ("SentencePieceTokenizer", None, "needs --tokenizer-model"),
        ("SentencePieceTokenizer", str(tmp_path / "none.model"), "no such file"),
        ("SentencePieceTokenizer", str(tmp_path / "bad.model"), "not a SentencePiece model"),
        ("ByteTokenizer", str(model_path), "leave the flag out"),
        ("WordTokenizer", None, "known are SentencePieceTokenizer, GPT2BPETokenizer"),
    ):
        with pytest.raises(TokenizerError, match=message):
            build_tokenizer(kind, model)
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "headless.model"))
    with pytest.raises(
        TokenizerError, match=r"headless\.model: the model has no end-of-sentence piece"
    ):
        _ = tokenizer.eod


def test_a_missing_library_is_one_clear_line(monkeypatch, model_path):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match="pip install sentencepiece"):
        build_tokenizer("SentencePieceTokenizer", str(model_path))


# The fast backend
# ----------------------------------------------------------------------------------------


FAST_FILES = [
    *((kind, None) for kind in FAST),
    ("TikTokenizer", "r50k_base"),
    ("TikTokenizer", "o200k_base"),
]


@pytest.mark.parametrize(("kind", "encoding"), FAST_FILES)
def test_both_backends_give_the_same_ids(kind, encoding, files, model_path):
    pytest.importorskip("gigatoken")
    given = (
        {"tokenizer_model": str(model_path.with_name(f"{encoding}.tiktoken"))}
        if encoding
        else files[kind]
    )
    fast, reference = (
        build_tokenizer(kind, **given, backend=backend) for backend in ("fast", "reference")
    )
    assert (fast.backend, fast.vocab_size, fast.eod) == (
        "fast",
        reference.vocab_size,
        reference.eod,
    )
    texts = [*TEXTS, *random_texts(1, 1000)]
    got = fast.encode_batch(texts)
    expected = reference.encode_batch(texts)
    assert np.array_equal(got.lengths, expected.lengths) and np.array_equal(got.ids, expected.ids)
    fast.check(texts)
    assert [fast.decode(ids) for ids in got.split()] == [
        reference.decode(ids) for ids in got.split()
    ]


def test_the_fast_backend_forgets_words_before_they_fill_memory(model_path, monkeypatch):
    pytest.importorskip("gigatoken")
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(model_path), backend="fast")
    expected = tokenizer.encode_batch(TEXTS)
    loads = []
    load = tokenizer.reference.load_fast
    monkeypatch.setattr(
        tokenizer.reference, "load_fast", lambda library: loads.append(1) or load(library)
    )
    most = tokenizer._most_bytes
    for held, wanted in ((most, 0), (most + 1, 1), (most + 2, 1), (most + fast.CACHE_BYTES + 2, 2)):
        monkeypatch.setattr(fast, "resident_bytes", lambda held=held: held)
        assert np.array_equal(tokenizer.encode_batch(TEXTS).ids, expected.ids)
        assert len(loads) == wanted


def test_a_difference_is_shown(files):
    """Two models that share a vocabulary but not their merges differ somewhere, and check says
    where."""
    pytest.importorskip("gigatoken")
    good = files["GPT2BPETokenizer"]
    merges = Path(good["merge_file"])
    lines = merges.read_text(encoding="utf-8").splitlines()
    other = merges.with_name("other.txt")
    other.write_text("\n".join([lines[0], *lines[:0:-1]]), encoding="utf-8")
    tokenizer = build_tokenizer("GPT2BPETokenizer", **good)
    tokenizer.load_fast = build_tokenizer(
        "GPT2BPETokenizer", **good | {"merge_file": str(other)}
    ).load_fast
    with pytest.raises(
        TokenizerError, match=r"gigatoken: \[.*reference: \[.*--tokenizer-backend reference"
    ):
        CheckedTokenizer(tokenizer)


def test_backends_that_cannot_be(files, model_path, monkeypatch):
    unigram = str(model_path.with_name("unigram.model"))
    pytest.importorskip("gigatoken")
    for kind, given, words in (
        ("SentencePieceTokenizer", {"tokenizer_model": unigram}, "unigram"),
        ("ByteTokenizer", {}, "no such kind"),
        ("BertWordPieceCase", files["BertWordPieceCase"], 'Unsupported model type "WordPiece"'),
    ):
        with pytest.raises(TokenizerError, match=f"--tokenizer-backend fast, {kind}: .*{words}"):
            build_tokenizer(kind, **given, backend="fast")
        assert words in build_tokenizer(kind, **given, backend="auto").why
    with pytest.raises(
        TokenizerError, match="--tokenizer-backend slow: known are auto, reference, fast"
    ):
        build_tokenizer("ByteTokenizer", backend="slow")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    auto = build_tokenizer("GPT2BPETokenizer", **files["GPT2BPETokenizer"], backend="auto")
    assert auto.backend == "reference" and "pip install gigatoken" in auto.why


@pytest.mark.parametrize(
    "options",
    [
        {},  # a normaliser that takes letters with their marks
        {"normalization_rule_name": "identity"},
        {"user_defined_symbols": ["the", "Union"]},
        {"treat_whitespace_as_suffix": True},
        {"byte_fallback": False, "vocab_size": 100},
    ],
    ids=str,
)
def test_auto_never_changes_the_ids(options, tmp_path):
    """Whatever a model was trained with, auto takes the fast backend only where it gives the same
    ids."""
    pytest.importorskip("gigatoken")
    model = io.BytesIO()
    lines = [line for text in SENTENCES for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=3,
        **{"byte_fallback": True, "vocab_size": 380, **options},
    )
    path = tmp_path / "t.model"
    path.write_bytes(model.getvalue())
    auto = build_tokenizer("SentencePieceTokenizer", str(path), backend="auto")
    reference = build_tokenizer("SentencePieceTokenizer", str(path))
    texts = [*TEXTS, *random_texts(3, 500)]
    assert np.array_equal(auto.encode_batch(texts).ids, reference.encode_batch(texts).ids), auto.why


# Kinds
# ----------------------------------------------------------------------------------------


def test_gpt2_numbers_its_files_as_they_say(files):
    tokenizer = build_tokenizer("GPT2BPETokenizer", **files["GPT2BPETokenizer"])
    vocabulary = json.loads(
        Path(files["GPT2BPETokenizer"]["vocab_file"]).read_text(encoding="utf-8")
    )
    assert (
        tokenizer.vocab_size == len(vocabulary) == 330
        and tokenizer.eod == vocabulary["<|endoftext|>"] == 0
    )
    assert tokenizer.encode_batch(["!"]).ids.tolist() == [vocabulary["!"]]


def test_a_vocabulary_with_capitals_is_not_for_lowered_text(files):
    with pytest.raises(
        TokenizerError,
        match=r"\d+ of 130 pieces have capital letters, such as '.+', .* --lowercase",
    ):
        build_tokenizer(
            "BertWordPieceLowerCase", vocab_file=files["BertWordPieceCase"]["vocab_file"]
        )


@pytest.mark.parametrize("kind", ["BertWordPieceLowerCase", "BertWordPieceCase"])
def test_bert_agrees_with_transformers(kind, files):
    transformers = pytest.importorskip("transformers")
    path = files[kind]["vocab_file"]
    tokenizer = build_tokenizer(kind, **files[kind])
    pieces = Path(path).read_text(encoding="utf-8").splitlines()
    peer = transformers.BertTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        do_lower_case=tokenizer.lowercase,
    )
    texts = [text for text in random_texts(2, 300) if "[MASK]" not in text] + SENTENCES[:3]
    for text, ids in zip(texts, tokenizer.encode_batch(texts).split()):
        assert ids.tolist() == peer.encode(text, add_special_tokens=False), text
    tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert tokenizer.ids_of(tokens) == [pieces.index(token) for token in tokens]
    assert tokenizer.eod == pieces.index("[SEP]")
    assert tokenizer.starts_word.tolist() == [not piece.startswith("##") for piece in pieces]
    assert not tokenizer.starts_word.all()
    marked = tokenizer.encode_batch(["[MASK] [SEP]"]).ids
    assert not set(tokenizer.ids_of(["[MASK]", "[SEP]"])) & set(marked.tolist())


def test_bert_keeps_or_drops_case_and_accents(files):
    text = "Citizens café the"
    lower, cased = (
        build_tokenizer(kind, **files[kind])
        for kind in ("BertWordPieceLowerCase", "BertWordPieceCase")
    )
    assert lower.decode(lower.encode_batch([text]).ids) == "citizens cafe the"
    assert np.array_equal(lower.encode_batch([text]).ids, lower.encode_batch([text.upper()]).ids)
    assert not np.array_equal(cased.encode_batch(["the"]).ids, cased.encode_batch(["The"]).ids)


def test_the_end_of_document_of_a_tokenizer_json(files, tmp_path):
    source = Path(files["HuggingFaceTokenizer"]["tokenizer_model"])
    content = (source / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(source))
    vocabulary = {t["content"]: t["id"] for t in json.loads(content)["added_tokens"]}
    assert tokenizer.eod == vocabulary["<|user|>"]  # tokenizer_config.json says so
    alone = tmp_path / "tokenizer.json"
    alone.write_text(content, encoding="utf-8")
    unnamed = build_tokenizer("HuggingFaceTokenizer", str(alone))
    assert unnamed.eod == vocabulary["<|endoftext|>"] and unnamed.sha256 == tokenizer.sha256
    long = "the state of the Union " * 10
    assert (
        unnamed.decode(unnamed.encode_batch([long]).ids) == long
    )  # neither cut to 8 ids nor put in a template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(TokenizerError, match="no token ends documents: <none>"):
        _ = unnamed.eod


def test_null_tokenizer():
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=50)
    assert (tokenizer.vocab_size, tokenizer.eod) == (50, 49)
    assert [ids.tolist() for ids in tokenizer.encode_batch(["0 7  48\n3", ""]).split()] == [
        [0, 7, 48, 3],
        [],
    ]
    assert tokenizer.decode([0, 7, 49]) == "0 7"
    for text in ("1 50", "1 -1", "1 x", "1.5", "\u0661", "9" * 5000):
        with pytest.raises(TokenizerError, match="no id from 0 to 49"):
            tokenizer.encode_batch([text])


def test_every_wrong_flag_is_reported_at_once(files, tmp_path):
    absent = str(tmp_path / "absent")
    with pytest.raises(TokenizerError) as raised:
        build_tokenizer("GPT2BPETokenizer", tokenizer_model="x", vocab_file=absent)
    for part in (
        "--tokenizer-model x: GPT2BPETokenizer does not read it",
        f"{absent}: no such",
        "needs --merge-file",
    ):
        assert part in str(raised.value)
    with pytest.raises(TokenizerError, match="NullTokenizer needs --vocab-size"):
        build_tokenizer("NullTokenizer")


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("GPT2BPETokenizer", "a.json", b"[", "no byte-level BPE vocabulary"),
        (
            "GPT2BPETokenizer",
            "a.json",
            b'{"a": 0}',
            "no byte-level BPE vocabulary|255 of the 256 bytes",
        ),
        ("BertWordPieceCase", "a.txt", b"[PAD]\n[UNK]\nthe\n", r"lacks \[CLS\] \[SEP\] \[MASK\]"),
        ("BertWordPieceCase", "a.txt", b"\xff\n", "not UTF-8"),
        ("HuggingFaceTokenizer", "tokenizer.json", b"{}", "no tokenizer.json"),
        ("TikTokenizer", "mine.tiktoken", b"", "give --tiktoken-pattern, one of r50k_base"),
        ("TikTokenizer", "r50k_base.tiktoken", b"not ranks", "not a file of ranks"),
        ("TikTokenizer", "r50k_base.tiktoken", b"YQ== 0\n", "not a file of ranks"),
    ],
)
def test_files_that_are_no_tokenizer(kind, name, content, message, files, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    field = TOKENIZER_FILES[kind][0]
    with pytest.raises(TokenizerError, match=message) as raised:
        build_tokenizer(kind, **files[kind] | {field: str(path)})
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "library"),
    [
        ("GPT2BPETokenizer", "tokenizers"),
        ("BertWordPieceCase", "tokenizers"),
        ("TikTokenizer", "tiktoken"),
    ],
)
def test_other_missing_libraries(kind, library, files, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        TokenizerError, match=f"{kind} needs the {library} library: pip install {library}"
    ):
        build_tokenizer(kind, **files[kind])
