"""Every rule on its own: a sound configuration with one thing wrong gives one problem, whose fixes work. Pure."""

import hashlib
import itertools
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from megalite.config import cli, validate
from megalite.config.rules.files import FILE_RULES
from megalite.config.run import RunConfig, from_flat, options, to_flat, with_values
from megalite.data.indexed import DatasetInfo
from megalite.data.tokenizers import build_tokenizer, train_sentencepiece
from megalite.preprocess.indexed_writer import IndexedWriter
from tests.data.tokenizer_files import make_files

SOUND = {"mock_data": True, "vocab_size": 512, "train_iters": 10}

BERT = {"architecture": "bert"}

CASES = {
    # what is wrong: (changes of SOUND, ranks, words that the problem must have)
    "heads of hidden": (dict(hidden_size=770), 1, "--hidden-size 770 --num-attention-heads 12"),
    "groups of heads": (
        dict(num_query_groups=5),
        1,
        "--num-attention-heads 12 --num-query-groups 5",
    ),
    "odd rope": (dict(position_embedding_type="rope", kv_channels=63), 1, "rope 63"),
    "positions": (dict(seq_length=2048, max_position_embeddings=1024), 1, "2048 1024"),
    "heads of tp": (dict(tensor_model_parallel_size=8), 8, "--num-attention-heads 12 --tp 8"),
    "groups of tp": (
        dict(num_query_groups=3, tensor_model_parallel_size=4),
        4,
        "--num-query-groups 3 --tp 4",
    ),
    "ffn of tp": (
        dict(ffn_hidden_size=1002, tensor_model_parallel_size=4),
        4,
        "--ffn-hidden-size 1002 --tp 4",
    ),
    "sp alone": (dict(sequence_parallel=True), 2, "--tp is 1"),
    "sp alone, one rank": (dict(sequence_parallel=True), 1, "--tp is 1"),
    "sequence of tp": (
        dict(sequence_parallel=True, seq_length=1022, tensor_model_parallel_size=4),
        4,
        "1022 --tp 4",
    ),
    "stages": (dict(num_layers=4, pipeline_model_parallel_size=5), 5, "--pp 5 --num-layers 4"),
    "ranks": (
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        6,
        "6 ranks --tp 2 --pp 2",
    ),
    "one rank": (dict(tensor_model_parallel_size=4), 1, "1 rank cannot"),
    "replicas": (dict(check_replicas=5), 1, "--check-replicas 5 one rank"),
    "backend": (dict(device="cpu", distributed_backend="nccl"), 1, "nccl cpu"),
    "batch": (dict(global_batch_size=18, micro_batch_size=4), 3, "18 4 3 12"),
    "recompute forms": (
        dict(recompute_granularity="full", recompute_activations=True),
        1,
        "selective full",
    ),
    "recompute layers": (
        dict(recompute_granularity="full", recompute_num_layers=7, pipeline_model_parallel_size=2),
        2,
        "7 6 layers",
    ),
    "precisions": (dict(bf16=True, precision="fp64"), 1, "--bf16 fp64"),
    "min lr": (dict(min_lr=1e-3), 1, "--min-lr 0.001 --lr 0.0003"),
    "warm-up twice": (dict(lr_warmup_iters=2, lr_warmup_fraction=0.1), 1, "0.1 2"),
    "warm-up past decay": (dict(lr_warmup_iters=8, lr_decay_iters=5), 1, "8 5"),
    "warm-up past end": (
        dict(lr_warmup_iters=10, lr_decay_style="constant"),
        1,
        "--lr-warmup-iters 10",
    ),
    "fused attention with dropout": (
        dict(attention_backend="sdpa"),
        1,
        "sdpa --attention-dropout 0.1 --rng-scheme global",
    ),
    "fused softmax with streams": (
        dict(attention_backend="fused-softmax", rng_scheme="megatron"),
        1,
        "fused-softmax --attention-dropout 0.1 --rng-scheme megatron",
    ),
    "no length": (dict(train_iters=None), 1, "--train-iters --train-samples"),
    "two lengths": (dict(train_samples=20), 1, "20 10"),
    "samples of batch": (dict(train_iters=None, train_samples=99, global_batch_size=8), 1, "99 8"),
    "no data": (dict(mock_data=False), 1, "--data-path --mock-data"),
    "mock vocabulary": (dict(vocab_size=None), 1, "--vocab-size"),
    "mock vocabulary of one": (dict(vocab_size=1), 1, "--vocab-size 1"),
    "idle rotary base": (dict(rotary_base=5e5), 1, "--rotary-base 500000 rope"),
    "idle recompute method": (dict(recompute_method="block"), 1, "--recompute-method block full"),
    "idle recompute layers": (dict(recompute_num_layers=2), 1, "--recompute-num-layers 2 full"),
    "idle momentum": (dict(sgd_momentum=0.5), 1, "--sgd-momentum 0.5 sgd"),
    "idle beta": (dict(optimizer="sgd", adam_beta2=0.95), 1, "--adam-beta2 0.95 adam"),
    "idle min lr": (dict(lr_decay_style="constant", min_lr=1e-5), 1, "--min-lr 1e-05 constant"),
    "idle decay": (
        dict(lr_decay_style="constant", lr_decay_iters=5),
        1,
        "--lr-decay-iters 5 constant",
    ),
    "profile": (dict(profile="12-10"), 1, "--profile 12-10 ascending"),
    "profile words": (dict(profile="10"), 1, "--profile 10 first-last"),
    "profile twice": (dict(profile="2-5,4-6"), 1, "--profile 2-5,4-6 ascending"),
    "profile ranks": (
        dict(profile="2-5", profile_ranks=("0", "8", "x")),
        2,
        "--profile-ranks 8 x 0 to 1",
    ),
    "idle profile ranks": (dict(profile_ranks=("1",)), 2, "--profile-ranks 1 without --profile"),
    "idle profile folder": (dict(profile_dir="x"), 1, "--profile-dir x without --profile"),
    "idle name": (dict(wandb_exp_name="x"), 1, "--wandb-exp-name x without --wandb-project"),
    "idle watchdog": (
        dict(hang_timeout=900.0),
        1,
        "--hang-timeout 900 --distributed-timeout-minutes",
    ),
    "no time": (dict(hang_timeout=-1.0), 1, "--hang-timeout -1 at least 0"),
    "idle save interval": (dict(save_interval=5), 1, "--save-interval 5 without --save"),
    "idle keep last": (dict(keep_last=5), 1, "--keep-last 5 without --save"),
    "idle step": (dict(ckpt_step=0), 1, "--ckpt-step 0 without --load"),
    "idle finetune": (dict(finetune=True), 1, "--finetune without --load"),
    "idle no-load": (dict(no_load_optim=True), 1, "--no-load-optim without --load"),
    "idle no-load of streams": (
        dict(no_load_rng=True, load="unmade", save="unmade"),
        1,
        "--no-load-rng --rng-scheme global",
    ),
    "idle scheme": (
        dict(rng_scheme="megatron", hidden_dropout=0.0, attention_dropout=0.0),
        1,
        "megatron dropout",
    ),
    "idle model": (dict(tokenizer_model="x.model"), 1, "--tokenizer-model x.model"),
    "idle order": (dict(sample_order="megatron"), 1, "--sample-order megatron --mock-data"),
    "idle change of data": (dict(allow_data_change=True), 1, "--allow-data-change without --load"),
    "idle vocabulary": (
        dict(vocab_file="x.txt"),
        1,
        "--vocab-file x.txt GPT2BPETokenizer BertWordPieceCase",
    ),
    "idle merges": (dict(merge_file="x.txt"), 1, "--merge-file x.txt GPT2BPETokenizer"),
    "idle split": (dict(split="1,1,1"), 1, "--split 1,1,1 --mock-data"),
    "post-norm of a GPT": (dict(norm_placement="post"), 1, "--norm-placement post BERT"),
    "idle masks": (dict(mask_prob=0.2), 1, "--mask-prob 0.2 GPT"),
    "idle pairs": (dict(bert_pair="none"), 1, "--bert-pair none GPT"),
    "idle gelu": (dict(swiglu=True, gelu="erf"), 1, "--gelu erf --swiglu"),
    "idle order of a BERT": (
        BERT | dict(sample_order="megatron"),
        1,
        "--sample-order megatron BERT",
    ),
    "idle documents of a BERT": (BERT | dict(eod_mask_loss=True), 1, "--eod-mask-loss BERT"),
    "no room": (BERT | dict(seq_length=4), 1, "--seq-length 4"),
    "mock vocabulary of a BERT": (BERT | dict(vocab_size=5), 1, "--vocab-size 5 4 special"),
    "mask all": (BERT | dict(mask_prob=1.5), 1, "--mask-prob 1.5 at most 1"),
    "shorten all": (BERT | dict(short_seq_prob=-0.5), 1, "--short-seq-prob -0.5 at least 0"),
    "idle evaluations": (
        dict(eval_iters=20, eval_interval=0),
        1,
        "--eval-iters 20 --eval-interval 0",
    ),
    "idle evaluation interval": (
        dict(eval_iters=0, eval_interval=20),
        1,
        "--eval-interval 20 --eval-iters 0",
    ),
}


def fixed(
    config: RunConfig, world_size: int, problem: validate.Problem
) -> list[tuple[str, RunConfig, int]]:
    """(offer, configuration, ranks) for each offer of the fix that can be typed."""
    results = []
    for offer in problem.fix.split(", or "):
        if ranks := re.fullmatch(r"start (\d+) ranks", offer):
            results.append((offer, config, int(ranks[1])))
        elif left_out := re.fullmatch(r"leave out (--\S+)", offer):
            key = next(o.key for o in options().values() if left_out[1] in (o.flag, *o.aliases))
            results.append((offer, with_values(config, {key: options()[key].default}), world_size))
        elif re.match(r"--[a-z0-9-]+($| [^A-Z ]*$| \S+ --)", offer) and " of " not in offer:
            _, values, problems = cli.read_flags(offer.split())
            assert not problems, offer
            results.append((offer, with_values(config, values), world_size))
    return results


def assert_one_problem(
    config: RunConfig, world_size: int, words: str, least_offers: int = 1
) -> None:
    """There is one problem, it has these words, and every offer of its fix repairs it and causes no other."""
    problems = validate.check(config, world_size)
    assert len(problems) == 1, problems
    for word in words.split():
        assert word in problems[0].message, problems[0]
    offers = fixed(config, world_size, problems[0])
    assert len(offers) >= least_offers, problems[0]
    for offer, repaired, ranks in offers:
        assert validate.check(repaired, ranks) == [], offer


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
        "watchers_are_installed",
    }  # they need files, below, or that libraries are absent: tests/training/test_writers.py
    assert {rule.__name__ for rule in validate.PURE_RULES} <= seen | elsewhere


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
    assert [p.flags for p in problems] == [(key,)]


@pytest.mark.parametrize(
    "key", ["attention_dropout", "hidden_dropout", "adam_beta1", "lr_warmup_fraction"]
)
def test_a_fraction_must_be_below_one(key):
    problems = validate.check(from_flat(SOUND | {key: 1.0}), 1)
    assert len(problems) == 1 and "below 1" in problems[0].message


def test_no_combination_of_senseless_numbers_crashes():
    for pair in itertools.combinations(NUMBERS, 2):
        problems = validate.check(from_flat(SOUND | dict.fromkeys(pair, 0)), 3)
        reported = {flag for p in problems for flag in p.flags}
        must = {
            key
            for key in pair
            if any(p.flags == (key,) for p in validate.out_of_range(from_flat({key: 0})))
        }
        assert must <= reported


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


# Files --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a dataset `corpus` of 20 documents of 100 bytes, and `longer` of 200, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    for name, documents in (("corpus", 20), ("longer", 200)):
        sha256, tokens = build_tokenizer("ByteTokenizer").sha256, 100 * documents
        write_dataset(
            name, documents, DatasetInfo("ByteTokenizer", 257, 256, sha256, documents, tokens)
        )
    return tmp_path


def write_dataset(prefix: str, documents: int, info: DatasetInfo | None, dtype=np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for number in range(documents):
            writer.add_document(np.full(100, number, dtype))
        writer.finish(info)


def checkpoint(folder, *iterations: int, latest=None) -> None:
    """What the rules look at of a checkpoint folder."""
    for iteration in iterations:
        step = folder / f"iter_{iteration:07d}"
        step.mkdir(parents=True)
        (step / "index.json").write_text("{}")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(latest or iterations[-1]))


REAL = {
    "data_path": "corpus",
    "tokenizer_type": "ByteTokenizer",
    "train_iters": 10,
    "seq_length": 64,
}
QUIET = {"eval_interval": 0, "eval_iters": 0}


def real(**changes) -> RunConfig:
    return from_flat(REAL | {"split": "80,20,0"} | changes)


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
    "one document to evaluate": (dict(bert_pair="nsp", split="95,5,0"), "sentences valid: 1 next-sentence", 2),
    "nothing to evaluate": (dict(split="100,0,0"), "sentences valid: 0", 2),
    "no tokenizer": (dict(tokenizer_type=None, vocab_file=None, vocab_size=130), "no --tokenizer-type frame mask", 0),
    "no masks": (dict(tokenizer_type="ByteTokenizer", vocab_file=None), "ByteTokenizer no tokens frame mask", 0),
    "no such tokens": (
        dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="hf", vocab_file=None), "[MASK] BertWordPiece", 0
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A folder with the files of every kind of tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return folder, make_files(folder)


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
    """Documents of one sentence are sentences if they were split; of several, they are none if they were not."""
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
    """A tokenizer.json may have the tokens; if it is of WordPiece, it also tells which begin a word."""
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
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog " * 3] * 50), model_prefix="endless",
        vocab_size=29, eos_id=-1, minloglevel=3,
    )  # fmt: skip
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


@pytest.mark.parametrize("key", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_documents_that_nothing_ends(key, folder):
    info = DatasetInfo.read("corpus")
    for told, problems in ((False, 1), (True, 0), (None, 0)):
        write_dataset(f"told-{told}", 20, replace(info, append_eod=told))
        config = real(data_path=f"told-{told}")
        assert validate.check(config, 1) == []
        if problems:
            words = f"told-{told} --append-eod {options()[key].flag}"
            assert_one_problem(with_values(config, {key: True}), 1, words)
        else:
            assert validate.check(with_values(config, {key: True}), 1) == []


def test_damaged_data(folder):
    (folder / "corpus.bin").write_bytes((folder / "corpus.bin").read_bytes()[:-1])
    assert_one_problem(real(), 1, "corpus.bin 3999 4000", 0)
    (folder / "corpus.idx").write_bytes(b"MMIDIDX")
    assert_one_problem(real(), 1, "corpus.idx MMIDIDX", 0)


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
    checkpoint(folder / "torn", 10, latest=20)
    assert_one_problem(real(load="torn"), 1, "torn 20", 1)
    (folder / "torn" / "latest_checkpointed_iteration.txt").unlink()
    assert (
        validate.check(real(load="torn"), 1) == []
    )  # without the file, the highest iteration is the latest
    (folder / "torn" / "latest_checkpointed_iteration.txt").write_text("release")
    assert_one_problem(real(load="torn"), 1, "torn release", 1)
    (folder / "torn" / "iter_0000010").rename(folder / "torn" / "iter_0000010.replaced-1")
    (folder / "torn" / "latest_checkpointed_iteration.txt").write_text("10")
    assert validate.check(real(load="torn"), 1) == []


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


# What follows from what ---------------------------------------------------------------------------------------------


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
        train_iters=10, global_batch_size=8, ffn_hidden_size=2048, kv_channels=64, num_query_groups=12, vocab_size=257,
        max_position_embeddings=64, precision="bf16", bf16=False, recompute_granularity="selective",
        recompute_activations=False, lr_decay_iters=10, lr_warmup_iters=2, lr_warmup_fraction=None, train_samples=80,
    )  # fmt: skip
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
        "import sys; from megalite.config import validate, cli, estimate; from megalite.config.run import from_flat;"
        f"config = from_flat({REAL | {'split': '80,20,0', 'save': 'run', 'load': 'run'}!r});"
        "assert validate.check(config, 1) == [];"
        "print(estimate.summary(validate.resolve(config, 1), 1));"
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
        option for option in options().values() if option.key not in ("save", "metrics_file")
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
                assert problem.message not in after or "mended" in problem.fix, (problem, offer)
