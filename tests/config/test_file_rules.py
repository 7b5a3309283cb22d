"""Every rule that looks at files, on its own: one thing wrong gives one problem, whose fixes
work."""

import hashlib
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megalite.config import validate
from megalite.config.rules.files import FILE_RULES
from megalite.config.run import from_flat, options, with_values
from megalite.config.summary import summary_lines
from megalite.data.indexed import DatasetInfo
from megalite.data.tokenizers import build_tokenizer, train_sentencepiece
from megalite.preprocess.indexed_writer import IndexedWriter
from tests.config.validation import (
    BERT,
    QUIET,
    SOUND,
    assert_one_problem,
    checkpoint,
    real,
    write_dataset,
)


def test_sound_files(folder):
    assert validate.check(real(), 1) == []
    assert (
        validate.check(real(save="new", load="new", save_interval=5, metrics_file="m.jsonl"), 1)
        == []
    )


BPE = dict(
    tokenizer_type="GPT2BPETokenizer",
    vocab_file="vocab.json",
    merge_file="merges.txt",
    data_path="plain",
)  # of the folder with tokenizers
HF = dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="hf", data_path="plain")

FILE_CASES = {
    "both sources": (
        dict(mock_data=True, split="969,30,1", vocab_size=257),
        "corpus --mock-data",
        2,
    ),
    "no such data": (dict(data_path="corpsu"), "corpsu.bin corpsu.idx", 1),
    "suffix in prefix": (dict(data_path="corpus.bin"), "corpus.bin.idx", 1),
    "no vocabulary": (dict(tokenizer_type=None), "--vocab-size --tokenizer-type", 0),
    "no such source": (dict(data_path=["1", "corpus", "2", "corpsu"]), "corpsu.bin corpsu.idx", 0),
    "no blend": (dict(data_path=["corpus", "corpus"]), "--data-path 'corpus' weight", 0),
    "twice in a blend": (dict(data_path=["1", "corpus", "2", "corpus"]), "corpus twice", 0),
    "blend in the order of megatron": (
        dict(data_path=["1", "corpus", "2", "longer"], sample_order="megatron"),
        "--sample-order --data-path 2",
        1,
    ),
    "no data to evaluate": (
        dict(data_path=None, train_data_path="corpus", split="969,30,1"),
        "valid",
        1,
    ),
    "little data to evaluate": (
        dict(valid_data_path="corpus", data_path="longer", seq_length=2500),
        "valid 2000",
        2,
    ),
    "idle path": (
        dict(train_data_path="corpus", valid_data_path="longer", split="969,30,1"),
        "--data-path corpus --train-data-path",
        1,
    ),
    "validation on training data": (
        dict(train_data_path="./corpus"),
        "./corpus --train-data-path --data-path",
        1,
    ),
    "validation on all": (
        dict(valid_data_path="corpus"),
        "corpus --data-path --valid-data-path",
        1,
    ),
    "idle validation": (
        dict(valid_data_path="longer", eval_iters=0, eval_interval=0),
        "--valid-data-path",
        1,
    ),
    "malformed split": (dict(split="a,b"), "--split a,b", 1),
    "no share to train": (dict(split="0,1,0"), "0,1,0", 1),
    "no share to evaluate": (dict(split="1,0,0"), "1,0,0 valid 0", 2),
    "empty split": (dict(split="999,1"), "valid 0 20", 1),
    "short split": (dict(seq_length=1000), "valid 400 1001", 1),
    "small vocabulary": (dict(vocab_size=200), "200 257", 2),
    "small vocabulary, no tokenizer": (dict(vocab_size=200, tokenizer_type=None), "200 257", 1),
    "no model named": (dict(tokenizer_type="SentencePieceTokenizer"), "--tokenizer-model", 0),
    "no merges named": (BPE | dict(merge_file=None), "--merge-file", 0),
    "no size of ids": (
        dict(tokenizer_type="NullTokenizer", data_path="plain"),
        "NullTokenizer --vocab-size",
        1,
    ),
    "misspelt vocabulary": (
        BPE | dict(vocab_file="vocba.json"),
        "--vocab-file vocba.json: no such file",
        1,
    ),
    "wrong merges": (
        BPE | dict(merge_file="vocab.json"),
        "--merge-file vocab.json: no byte-level BPE",
        0,
    ),
    "a folder without tokenizer": (
        HF | dict(tokenizer_model="."),
        "tokenizer.json: no such file",
        0,
    ),
    "small vocabulary of files": (BPE | dict(vocab_size=329), "329 330", 2),
    "merges of no use": (
        HF | dict(merge_file="merges.txt"),
        "--merge-file merges.txt no effect",
        1,
    ),
    "idle model": (dict(tokenizer_model="x.model"), "--tokenizer-model x.model", 1),
    "idle mask": (
        dict(eod_mask_loss=True, tokenizer_type=None, vocab_size=257),
        "--eod-mask-loss",
        1,
    ),
    "idle positions": (
        dict(reset_position_ids=True, tokenizer_type=None, vocab_size=257),
        "--reset-position-ids",
        1,
    ),
    "idle segments": (
        dict(reset_attention_mask=True, tokenizer_type=None, vocab_size=257),
        "-attention-mask",
        1,
    ),
    "positions of no use": (
        dict(reset_position_ids=True, position_embedding_type="none"),
        "--reset-position-ids --position-embedding-type none",
        2,
    ),
}


BERT_FILES = BERT | dict(
    data_path="sentences",
    tokenizer_type="BertWordPieceCase",
    vocab_file="cased.txt",
    split="80,20,0",
)
BERT_FILE_CASES = {
    "one sentence a document": (dict(data_path="plain"), "plain --split-sentences", 1),
    "one document to evaluate": (
        dict(bert_pair="nsp", split="95,5,0"),
        "sentences valid: 1 next-sentence",
        2,
    ),
    "nothing to evaluate": (dict(split="100,0,0"), "sentences valid: 0", 2),
    "no tokenizer": (
        dict(tokenizer_type=None, vocab_file=None, vocab_size=130),
        "no --tokenizer-type frame mask",
        0,
    ),
    "no masks": (
        dict(tokenizer_type="ByteTokenizer", vocab_file=None),
        "ByteTokenizer no tokens frame mask",
        0,
    ),
    "no such tokens": (
        dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="hf", vocab_file=None),
        "[MASK] BertWordPiece",
        0,
    ),
}


@pytest.mark.parametrize("case", FILE_CASES)
def test_a_file_rule_alone(case, folder, tokenizers):
    changes, words, offers = FILE_CASES[case]
    if changes.get("data_path") == "plain":
        shutil.copytree(tokenizers[0], folder, dirs_exist_ok=True)
        write_dataset("plain", 20, None)
    assert_one_problem(real(**changes), 1, words, offers)


@pytest.mark.parametrize("case", BERT_FILE_CASES)
def test_a_file_rule_of_a_bert_alone(case, folder, tokenizers):
    changes, words, offers = BERT_FILE_CASES[case]
    shutil.copytree(tokenizers[0], folder, dirs_exist_ok=True)
    write_dataset("plain", 20, None)
    with IndexedWriter("sentences", np.uint16) as writer:
        writer.add_documents(*sentences_of(20))
        writer.finish(None)
    assert validate.check(real(**BERT_FILES), 1) == []
    assert_one_problem(real(**BERT_FILES | changes), 1, words, offers)


def test_what_the_description_says_of_sentences_counts(folder, tokenizers):
    """Documents of one sentence are sentences if they were split; of several, they are none if they
    were not."""
    shutil.copytree(tokenizers[0], folder, dirs_exist_ok=True)
    cased = build_tokenizer("BertWordPieceCase", vocab_file="cased.txt")
    info = DatasetInfo(
        "BertWordPieceCase", cased.vocab_size, cased.eod, cased.sha256, 20, 2000, True
    )
    write_dataset("plain", 20, info)
    assert validate.check(real(**BERT_FILES | {"data_path": "plain"}), 1) == []
    with IndexedWriter("sentences", np.uint16) as writer:
        writer.add_documents(*sentences_of(20))
        writer.finish(replace(info, tokens=200, sentences=False))
    assert_one_problem(real(**BERT_FILES), 1, "sentences without --split-sentences", 1)


def test_one_document_has_no_next_sentence_whatever_the_split(folder, tokenizers):
    shutil.copytree(tokenizers[0], folder, dirs_exist_ok=True)
    with IndexedWriter("sentences", np.uint16) as writer:
        writer.add_documents(*sentences_of(1))
        writer.finish(None)
    for split in ("100,0,0", "50,50,0"):
        for problem in validate.check(
            real(**BERT_FILES | {"split": split, "bert_pair": "nsp"} | QUIET), 1
        ):
            assert problem.fix == "more data"


def sentences_of(documents: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Ids, lengths of sentences and sentences of documents: each has two of 5 tokens."""
    ids = np.arange(10 * documents, dtype=np.uint16) % 97
    return ids.tobytes(), np.full(2 * documents, 5, np.int32), np.full(documents, 2, np.int32)


def test_whole_words_need_to_be_known(folder, tmp_path):
    """A tokenizer.json may have the tokens; if it is of WordPiece, it also tells which begin a
    word."""
    import tokenizers as library

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]")).save(
        str(tmp_path / "words.json")
    )
    library.Tokenizer(library.models.BPE(vocabulary, [], unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with IndexedWriter("sentences", np.uint16) as writer:
        writer.add_documents(*sentences_of(20))
        writer.finish(None)
    hf = dict(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model="tokenizer.json",
        vocab_file=None,
        vocab_size=97,
    )
    assert validate.check(real(**BERT_FILES | hf), 1) == []
    assert_one_problem(
        real(**BERT_FILES | hf, whole_word_mask=True),
        1,
        "--whole-word-mask HuggingFaceTokenizer",
        1,
    )
    assert (
        validate.check(
            real(**BERT_FILES | hf | {"tokenizer_model": "words.json"}, whole_word_mask=True), 1
        )
        == []
    )


@pytest.mark.parametrize("key", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_documents_of_mock_data_are_idle(key):
    config = from_flat(SOUND | {key: True, "tokenizer_type": "ByteTokenizer"})
    assert_one_problem(config, 1, f"{options()[key].flag} --mock-data")


@pytest.mark.parametrize("key", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_a_tokenizer_that_ends_no_document(key, folder):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog " * 3] * 50),
        model_prefix="endless",
        vocab_size=29,
        eos_id=-1,
        minloglevel=3,
    )
    config = real(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model="endless.model",
        data_path="endless",
    )
    write_dataset("endless", 20, None)
    assert validate.check(config, 1) == []
    assert_one_problem(
        with_values(config, {key: True}), 1, f"{options()[key].flag} end-of-document"
    )


def test_every_kind_of_tokenizer_is_sound(folder, tokenizers):
    write_dataset("plain", 20, None, np.int32)
    for kind, given in tokenizers[1].items():
        config = real(data_path="plain", tokenizer_type=kind, eod_mask_loss=True, **given)
        assert validate.check(config, 1) == [], kind
        resolved = validate.resolve(config, 1)
        assert resolved.model.vocab_size == build_tokenizer(kind, **given).vocab_size
        assert validate.check(resolved, 1) == [], kind


def test_the_vocabulary_of_a_preset_holds_the_tokenizers(folder, tokenizers):
    """A smaller tokenizer is mentioned, a larger one refused; null stands for the tokenizer's."""
    small = real(preset="smollm2-135m")
    assert validate.check(small, 1) == []
    resolved = validate.resolve(small, 1)
    assert resolved.model.vocab_size == 49152
    assert "vocabulary 49152 (the tokenizer has 257)" in "\n".join(summary_lines(resolved, 1))
    assert validate.resolve(real(preset="smollm2-135m", vocab_size=None), 1).model.vocab_size == 257

    write_dataset("plain", 20, None, np.int32)
    ranks = tokenizers[1]["TikTokenizer"] | {"tiktoken_pattern": "cl100k_base"}
    large = real(preset="llama-2-7b", tokenizer_type="TikTokenizer", data_path="plain", **ranks)
    assert_one_problem(large, 1, "--preset llama-2-7b, 32000, 100277")
    assert "leave out" not in validate.check(large, 1)[0].fix


@pytest.mark.parametrize("key", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_documents_that_nothing_ends(key, folder):
    info = DatasetInfo.read("corpus")
    for ended, problems in ((False, 1), (True, 0), (None, 0)):
        write_dataset(f"eod-{ended}", 20, replace(info, append_eod=ended))
        config = real(data_path=f"eod-{ended}")
        assert validate.check(config, 1) == []
        if problems:
            words = f"eod-{ended} --append-eod {options()[key].flag}"
            assert_one_problem(with_values(config, {key: True}), 1, words)
        else:
            assert validate.check(with_values(config, {key: True}), 1) == []


def test_a_link_without_a_target_is_named_with_its_target(folder):
    (folder / "linked.idx").symlink_to("/gone/corpus.idx")
    assert_one_problem(
        real(data_path="linked"), 1, "linked.bin linked.idx link to /gone/corpus.idx,", 0
    )
    (folder / "vocab.txt").symlink_to("gone.txt")
    tokenizer = {"tokenizer_type": "BertWordPieceCase", "vocab_file": "vocab.txt"}
    problems = validate.check(real(**tokenizer), 1)
    assert any("vocab.txt is a symbolic link to gone.txt" in p.message for p in problems)


def test_only_what_is_in_files_may_be_wrong_on_one_node_alone(folder):
    wrong = real(data_path="absent", tensor_model_parallel_size=5)
    assert {p.of_node: p.message.split()[0] for p in validate.check(wrong, 5)} == {
        False: "--ffn-hidden-size",
        True: "--data-path",
    }


def test_damaged_data(folder):
    (folder / "corpus.bin").write_bytes((folder / "corpus.bin").read_bytes()[:-1])
    assert_one_problem(real(), 1, "corpus.bin 3999 4000", 0)
    (folder / "corpus.idx").write_bytes(b"MMIDIDX")
    assert_one_problem(real(), 1, "corpus.idx MMIDIDX", 0)


def test_damaged_data_has_one_remedy(folder):
    (folder / "corpus.idx").write_bytes(b"MMIDIDX")
    (folder / "corpus.json").write_text("{}")
    problems = validate.check(real(), 1)
    assert len(problems) == 2
    for problem in problems:
        assert "preprocess_data.py" not in problem.message
        assert problem.fix == "make it with tools/preprocess_data.py"


def test_data_with_parsed_special_tokens_needs_the_flag(tokenizers, monkeypatch):
    monkeypatch.chdir(tokenizers[0])
    bpe = build_tokenizer("GPT2BPETokenizer", vocab_file="vocab.json", merge_file="merges.txt")
    made_by = ("GPT2BPETokenizer", bpe.vocab_size, bpe.eod, bpe.sha256)
    write_dataset("parsed", 20, DatasetInfo(*made_by, 20, 2000, parse_special_tokens=True))
    given = real(**BPE | {"data_path": "parsed"})
    (problem,) = validate.check(given, 1)
    assert "parsed was made with --parse-special-tokens" in problem.message
    assert problem.fix == "--parse-special-tokens"
    assert (
        validate.check(real(**BPE | {"data_path": "parsed", "parse_special_tokens": True}), 1) == []
    )


def test_ids_too_wide_for_the_file(folder):
    write_dataset("narrow", 20, None, np.uint8)
    assert_one_problem(real(data_path="narrow"), 1, "255 257", 0)


def test_tokenizer_against_data(folder):
    model = train_sentencepiece(["the quick brown fox jumps over the lazy dog " * 3] * 50, 300)
    (folder / "a.model").write_bytes(model)
    spm = dict(tokenizer_type="SentencePieceTokenizer", tokenizer_model="a.model")
    assert_one_problem(real(**spm), 1, "SentencePieceTokenizer ByteTokenizer", 0)
    write_dataset(
        "pieces",
        20,
        DatasetInfo("SentencePieceTokenizer", 300, 2, hashlib.sha256(model).hexdigest(), 20, 2000),
    )
    assert validate.check(real(**spm, data_path="pieces"), 1) == []
    write_dataset("others", 20, DatasetInfo("SentencePieceTokenizer", 300, 2, "0" * 64, 20, 2000))
    assert_one_problem(real(**spm, data_path="others"), 1, "a.model 300 000000000000", 0)
    assert_one_problem(
        real(**spm | dict(tokenizer_model="b.model", data_path="pieces")), 1, "b.model", 1
    )
    assert validate.resolve(real(**spm, data_path="pieces"), 1).model.vocab_size == 300


def test_nothing_to_load(folder):
    checkpoint(folder / "runs" / "first", 10)
    assert_one_problem(real(load="runs/frist"), 1, "runs/frist no folder", 2)
    (folder / "empty").mkdir()
    assert_one_problem(real(load="empty", save="out"), 1, "empty no checkpoints")
    assert_one_problem(real(load="out", save="out", finetune=True), 1, "out", 0)


def test_iterations_to_load(folder):
    checkpoint(folder / "run", 10, 20, 30)
    assert validate.check(real(load="run", save="run", ckpt_step=20), 1) == []
    assert_one_problem(real(load="run", ckpt_step=21), 1, "21 10, 20, 30", 2)
    both = real(load="run", save="run", ckpt_step=20, load_fallback=True)
    assert_one_problem(both, 1, "--load-fallback --ckpt-step")
    checkpoint(folder / "torn", 10, latest=20)
    assert_one_problem(real(load="torn"), 1, "torn 20", 1)
    assert validate.check(real(load="torn", load_fallback=True), 1) == []
    (folder / "torn" / "latest_checkpointed_iteration.txt").unlink()
    assert (
        validate.check(real(load="torn"), 1) == []
    )  # without the file, the highest iteration is the latest
    (folder / "torn" / "latest_checkpointed_iteration.txt").write_text("release")
    assert_one_problem(real(load="torn"), 1, "torn release", 1)
    assert validate.check(real(load="torn", load_fallback=True), 1) == []
    (folder / "torn" / "iter_0000010").rename(folder / "torn" / "iter_0000010.replaced-1")
    (folder / "torn" / "latest_checkpointed_iteration.txt").write_text("10")
    assert validate.check(real(load="torn"), 1) == []


def without_index(folder) -> None:
    """A checkpoint that has lost its index."""
    folder.mkdir()
    (folder / "weights-00000.safetensors").touch()


def test_the_latest_checkpoint_has_no_index(folder):
    """The file is named; what is offered is the nearest before it, not the newest or oldest."""
    for name in ("run", "gone"):
        checkpoint(folder / name, 10, 20, 50, latest=40)
    without_index(folder / "run" / "iter_0000040")
    for load, words, offer in (
        ("run", "run/iter_0000040/index.json is missing", "--ckpt-step 20, or --load-fallback"),
        ("gone", "gone/iter_0000040 does not exist", "--ckpt-step 20, or --load-fallback"),
        (
            "run/iter_0000040",
            "--load run/iter_0000040: its latest checkpoint cannot be read: run/iter_0000040/in",
            f"--load {folder}/run/iter_0000020",
        ),
    ):
        config = real(load=load, save="out")
        assert_one_problem(config, 1, words)
        (problem,) = validate.check(config, 1)
        assert words in problem.message and problem.fix.startswith(offer), problem
    assert_one_problem(real(load="run/iter_0000040", load_fallback=True), 1, "index.json")
    # Nothing before it.
    checkpoint(folder / "first", 50, latest=40)
    assert_one_problem(real(load="first", load_fallback=True), 1, "first/iter_0000040")
    without_index(folder / "iter_0000007")
    (problem,) = validate.check(real(load="iter_0000007", save="iter_0000007"), 1)
    assert "iter_0000007/index.json is missing" in problem.message
    assert problem.fix == "--load another folder"


def test_the_name_of_the_latest_is_damaged(folder):
    checkpoint(folder / "run", 10, 20, latest="\0")
    (problem,) = validate.check(real(load="run"), 1)
    assert "latest_checkpointed_iteration.txt should hold an iteration number" in problem.message
    assert problem.fix.startswith("--ckpt-step 20, or --load-fallback")


def test_the_folder_of_one_checkpoint_is_its_parent_at_that_step(folder):
    checkpoint(folder / "run", 10, 20)
    for path in ("run/iter_0000010", "run/iter_0000010/", str(folder / "run/iter_0000010")):
        assert validate.check(real(load=path, save="out"), 1) == []
        assert validate.check(real(load=path, save="run", ckpt_step=10), 1) == []
        assert_one_problem(real(load=path, save="out", ckpt_step=20), 1, f"20 {path} 10", 2)


def test_runs_stay_apart(folder):
    checkpoint(folder / "run", 10)
    assert validate.check(real(save="run", load="run"), 1) == []
    assert validate.check(real(save="run", dry_run=True), 1) == []
    assert_one_problem(real(save="run"), 1, "run 10", 2)
    assert_one_problem(real(save="run", load="run", finetune=True), 1, "run 10", 1)


def test_places_to_write(folder):
    (folder / "file").write_text("")
    (folder / "locked").mkdir()
    assert_one_problem(real(save="file"), 1, "--save file folder")
    assert_one_problem(real(save="file/run"), 1, "file/run")
    assert_one_problem(real(metrics_file="locked"), 1, "--metrics-file locked folder")


def test_traces_stay_apart(folder):
    (folder / "file").write_text("")
    (folder / "traces").mkdir()
    assert validate.check(real(trace="traces"), 1) == []
    assert_one_problem(real(trace="file"), 1, "--trace file folder")
    assert_one_problem(real(trace="file/traces"), 1, "file/traces")
    (folder / "traces" / "trace-rank-00001.json").write_text("")
    assert_one_problem(real(trace="traces"), 1, "--trace traces earlier")
    assert validate.check(real(trace="traces", dry_run=True), 1) == []


def test_every_file_rule_is_reported(folder):
    """The cases above reach every rule: here each is triggered by name."""
    checkpoint(folder / "run", 10)
    (folder / "file").write_text("")
    wrong = real(
        data_path="absent",
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model="absent",
        save="run",
    )
    more = real(load="absent", metrics_file=".", vocab_size=1)
    found = {
        rule.__name__ for rule in FILE_RULES for config in (wrong, more) for _ in rule(config, 1)
    }
    assert found >= {
        "data_files_are_sound",
        "tokenizer_fits",
        "checkpoint_is_there",
        "checkpoints_stay_apart",
    }
    assert "results_can_be_written" in found
