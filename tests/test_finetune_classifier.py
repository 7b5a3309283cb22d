"""tools/finetune_classifier.py and tools/classify.py: what they learn, what they keep, and what
they refuse."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.load import Checkpoint
from megalite.data.classification import (
    Columns,
    Example,
    classes_of,
    frame,
    hold_out,
    read_examples,
)
from megalite.data.masking import SpecialIds
from megalite.data.tokenizers import ByteTokenizer, train_wordpiece
from megalite.parallel.launch import LaunchInfo
from megalite.programs import classify, finetune_classifier
from tests.runs import console_of, sound

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the a of to in and boat river house stone garden window letter morning road paper".split()
MARKS = {"glad": ("good", "fine", "lovely"), "sad": ("bad", "poor", "awful")}
TASK = {"--lr": "3e-3", "--epochs": "4", "--batch-size": "16", "--device": "cpu"}
SHAPE = dict(
    architecture="bert",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=24,
    mock_data=True,
    train_iters=2,
    global_batch_size=4,
    micro_batch_size=2,
    device="cpu",
    save="saved",
    lr=1e-3,
)


def marked(draw: random.Random, label: str) -> str:
    """Some words, one of which tells the label."""
    words = draw.choices(WORDS, k=draw.randint(3, 9))
    words.insert(draw.randrange(len(words)), draw.choice(MARKS[label]))
    return " ".join(words)


def task(count: int, seed: int) -> list[dict]:
    """Texts that a word of theirs gives away, two of three of them sad; the other text of a pair
    says nothing."""
    draw = random.Random(seed)
    labels = [draw.choice(("sad", "sad", "glad")) for _ in range(count)]
    return [
        {
            "text": marked(draw, label),
            "label": label,
            "other": marked(draw, draw.choice(("sad", "glad"))),
        }
        for label in labels
    ]


def write(path: Path, rows: list[dict]) -> Path:
    """The rows as a .tsv or .jsonl file."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        lines = ["\t".join(row) for row in [list(rows[0]), *(row.values() for row in rows)]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, pool) -> Path:
    """A folder with the task, a vocabulary, and checkpoints of two tiny BERTs: `pairs` of 2x2
    ranks, `none` of one."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("classifier")
    write(folder / "train.tsv", task(200, 1))
    write(folder / "train.jsonl", task(200, 1))
    write(folder / "valid.tsv", task(100, 2))
    vocabulary = train_wordpiece([row["text"] for row in task(200, 1)], 100)
    (folder / "vocab.txt").write_bytes(vocabulary)
    flags = SHAPE | dict(
        vocab_size=110, tensor_model_parallel_size=2, pipeline_model_parallel_size=2
    )
    pool.run(console_of, 4, sound(flags, 4, folder / "pairs"), folder / "pairs")
    alone = LaunchInfo()
    flags = SHAPE | dict(vocab_size=110, bert_pair="none")
    console_of(alone, sound(flags, 1, folder / "none"), folder / "none")
    return folder


def flags_of(made: Path, more: dict) -> list[str]:
    """Flags of a run on the task; None leaves one out."""
    flags = {
        "--load": made / "pairs/saved",
        "--train": made / "train.tsv",
        "--valid": made / "valid.tsv",
        "--tokenizer-type": "BertWordPieceCase",
        "--vocab-file": made / "vocab.txt",
    }
    flags |= TASK | more
    return [
        str(word)
        for flag, value in flags.items()
        if value is not None
        for word in (flag, value)
        if word != ""
    ]


@pytest.fixture
def run(made, monkeypatch, capsys):
    """The tool on the task: what it prints. It must end with this status, and say why if that is
    not 0."""

    def run(more: dict, status: int = 0, tool=finetune_classifier) -> str:
        words = (
            flags_of(made, more)
            if tool is finetune_classifier
            else [str(word) for pair in more.items() for word in pair]
        )
        monkeypatch.setattr(sys, "argv", [tool.__file__, *words])
        found = 0
        try:
            tool.main()
        except SystemExit as end:
            found = end.code
        printed = capsys.readouterr()
        assert found == status, printed
        return printed.out if status == 0 else printed.err

    return run


def accuracy_of(printed: str) -> tuple[float, float]:
    """(accuracy, baseline) of the last line on the validation."""
    found = re.search(
        r"^accuracy (\S+) on 100 .* class of the training data: (\S+)$", printed, re.MULTILINE
    )
    return float(found[1]), float(found[2])


def epochs_of(printed: str) -> list[list[float]]:
    """Training loss, validation loss, accuracy, baseline of each epoch."""
    pattern = r"^epoch \d+/\d+ \| training loss (\S+) \| validation loss (\S+) \| accuracy (\S+) \| baseline (\S+)$"  # noqa: E501
    return [
        [float(number) for number in line] for line in re.findall(pattern, printed, re.MULTILINE)
    ]


def test_it_learns_saves_and_predicts(made, run, tmp_path):
    printed = run({"--save": tmp_path / "new/classifier"})
    accuracy, baseline = accuracy_of(printed)
    sad = sum(row["label"] == "sad" for row in task(100, 2)) / 100
    assert baseline == pytest.approx(sad, abs=1e-4) and accuracy > 0.95
    epochs = epochs_of(printed)
    assert (
        len(epochs) == 4
        and epochs[-1][0] < epochs[0][0] / 2
        and epochs[-1][2:] == [accuracy, baseline]
    )
    assert (
        "200 training examples, 0 of them cut to 24 tokens" in printed
        and "2 classes: glad, sad" in printed
    )
    # The folder may move, and the vocabulary with it.
    (tmp_path / "new/classifier").rename(tmp_path / "moved")
    flags = {
        "--classifier": tmp_path / "moved",
        "--input": made / "valid.tsv",
        "--device": "cpu",
        "--batch-size": 7,
    }
    printed = run(
        flags | {"--output": tmp_path / "out.jsonl", "--label-key": "label"}, tool=classify
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = [line["label"] == row["label"] for line, row in zip(lines, task(100, 2), strict=True)]
    assert sum(right) / 100 == accuracy and f"accuracy {accuracy:.4f}" in printed
    assert all(0.5 <= line["probability"] <= 1 for line in lines)
    # Padding to other lengths changes nothing.
    run(flags | {"--output": tmp_path / "one.jsonl", "--batch-size": 1}, tool=classify)
    alone = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [a["probability"] for a in alone] == pytest.approx(
        [line["probability"] for line in lines], abs=1e-5
    )
    assert "out.jsonl exists" in run(flags | {"--output": tmp_path / "out.jsonl"}, 2, classify)
    (tmp_path / "moved/vocab.txt").write_text((made / "vocab.txt").read_text() + "more\n")
    assert "not the one that the classifier was trained" in run(
        flags | {"--output": tmp_path / "x.jsonl"}, 1, classify
    )
    (tmp_path / "moved/classifier.json").write_text("{")
    assert "no classifier that" in run(flags | {"--output": tmp_path / "x.jsonl"}, 1, classify)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "moved",
        "new",
        "one.jsonl",
        "out.jsonl",
    ]


def test_a_seed_repeats_its_numbers_and_jsonl_gives_the_same(made, run):
    few = {"--epochs": 1}
    first = epochs_of(run(few))
    torch.manual_seed(5)
    assert epochs_of(run(few)) == first
    assert epochs_of(run(few | {"--train": made / "train.jsonl"})) == first
    assert epochs_of(run(few | {"--seed": 2})) != first


def test_of_a_pair_the_model_can_tell_which_text_is_which(run):
    """Both texts have a mark; that of one of them decides."""
    printed = run({"--pair-key": "text", "--text-key": "other", "--epochs": 10, "--seq-length": 23})
    accuracy, baseline = accuracy_of(printed)
    assert accuracy > baseline + 0.15
    swapped = epochs_of(
        run({"--pair-key": "other", "--text-key": "text", "--epochs": 1, "--seq-length": 23})
    )
    assert swapped[0] != epochs_of(printed)[0]


def test_weights_are_the_checkpoints_and_a_frozen_encoder_stays(made, run, tmp_path):
    with Checkpoint.open(made / "pairs/saved") as checkpoint:
        stored = {name: checkpoint.read(name) for name in checkpoint.names}
    for flag, folder in (("--freeze-encoder", "frozen"), ("--no-freeze-encoder", "free")):
        run({flag: "", "--epochs": 1, "--save": tmp_path / folder, "--weight-decay": 0})
        weights = load_file(tmp_path / folder / "classifier.safetensors")
        assert not [
            name for name in weights if name.startswith(("mlm_head", "pair_head", "output"))
        ]
        same = {
            name for name in weights if name in stored and torch.equal(weights[name], stored[name])
        }
        encoder = {name for name in weights if not name.startswith(("classifier", "pooler"))}
        assert weights.keys() - stored.keys() == {"classifier.weight", "classifier.bias"}
        assert same == (encoder if folder == "frozen" else set())


def test_a_checkpoint_without_a_pooler_gets_a_new_one(made, run):
    printed = run({"--load": made / "none/saved", "--train": made / "train.tsv"})
    assert "--bert-pair none and has no pooler: a new one is trained" in printed
    accuracy, baseline = accuracy_of(printed)
    assert accuracy > baseline + 0.2


def test_a_share_for_validation_is_chosen_by_the_seed_alone():
    examples = [Example(str(i), None, "x") for i in range(50)]
    train, valid = hold_out(examples, 0.1, seed=3)
    assert len(valid) == 5 and sorted(train + valid) == sorted(examples)
    assert hold_out(examples, 0.1, seed=3) == (train, valid)
    assert hold_out(examples, 0.1, seed=4) != (train, valid)
    assert valid != examples[:5] and valid != examples[-5:]


def test_a_share_for_validation_in_a_run(run):
    printed = run({"--valid": None, "--valid-share": 0.25, "--epochs": 1})
    assert "150 training examples" in printed and "50 validation examples" in printed
    assert "--valid-share 0.001 of 200 examples is 0" in run(
        {"--valid": None, "--valid-share": 0.001}, 1
    )


def test_frames():
    """Of bytes, so that ids can be read."""
    special = SpecialIds(cls=1, sep=2, mask=3, pad=0)
    pairs = [
        Example("abcdef", "gh", "y"),
        Example("ab", "cdefgh", "x"),
        Example("abcde", "fghij", "x"),
        Example("a", "b", "x"),
    ]
    rows = frame(pairs, ByteTokenizer(), special, 8, ["x", "y"])
    shown = ["".join({1: "<", 2: ">"}.get(i, chr(i)) for i in row) for row in rows.tokens]
    assert shown == ["<abc>gh>", "<ab>cde>", "<abc>fg>", "<a>b>"]
    assert rows.labels.tolist() == [1, 0, 0, 0] and rows.cut == 3
    batch = rows.batch([3, 1])
    assert batch["tokens"].tolist() == [[1, 97, 2, 98, 2, 0, 0, 0], [1, 97, 98, 2, 99, 100, 101, 2]]
    assert batch["token_types"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8]
    single = frame(
        [Example("abcdefgh", None, None), Example("a", None, None)],
        ByteTokenizer(),
        special,
        6,
        None,
    )
    assert [row.tolist() for row in single.tokens] == [
        [1, 97, 98, 99, 100, 2],
        [1, 97, 2],
    ] and single.cut == 1
    assert single.labels is None and single.batch([0, 1])["token_types"].sum() == 0


def test_classes_are_sorted_numbers_by_value():
    assert classes_of([Example("", None, label) for label in ("10", "9", "-1", "9")]) == [
        "-1",
        "9",
        "10",
    ]
    assert classes_of([Example("", None, label) for label in ("10", "9", "a")]) == ["10", "9", "a"]


def read(path: Path, content: str | bytes, quoting="csv"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(str(path), Columns("text", None, "label"), quoting)


def test_quotes_of_tsv(tmp_path):
    content = (
        '\ufefflabel\ttext\tid\r\n1\t"a\tb ""c"""\t7\r\n2\t"two\nlines"\t8\n3\tan "inner" one\t9\n'
    )
    examples, problems = read(tmp_path / "a.tsv", content)
    assert not problems
    assert [(e.text, e.label) for e in examples] == [
        ('a\tb "c"', "1"),
        ("two\nlines", "2"),
        ('an "inner" one', "3"),
    ]
    content = 'label\ttext\n1\t"open\n2\tclosed" again\n3\t"open\n4\t"\n'
    examples, problems = read(tmp_path / "a.tsv", content)
    assert [e.label for e in examples] == []
    assert "lines 2 to 3: " in problems[0] and "--quoting none" in problems[0]
    assert "lines 4 to 5: a field in quotes that holds a line break and a tab" in problems[1]
    examples, problems = read(tmp_path / "a.tsv", content, "none")
    assert [e.text for e in examples] == ['"open', 'closed" again', '"open', '"'] and not problems


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}',
            "line 2: no key 'label'; keys here: text",
        ),
        ("a.jsonl", '{"text": " ", "label": ""}', "line 1: 'text' is empty; 'label' is empty"),
        (
            "a.jsonl",
            '{"text": 3, "label": true}',
            "'text' is int, not text; 'label' is bool, not text or a whole",
        ),
        ("a.jsonl", "\n", "line 1: the line is empty"),
        ("a.jsonl", '{"text": "a"', "line 1: invalid JSON: Expecting ',' delimiter at column 13"),
        ("a.jsonl", "[" * 100_000, "line 1: JSON that cannot be read"),
        ("a.jsonl", "[1]", "line 1: a JSON object is needed, not list"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', "line 1: 'text': half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff", "label": 1}', "line 1: not UTF-8: byte 0xff at column 11"),
        ("a.jsonl", "", "no examples"),
        ("a.tsv", "text\tlabel\n", "no examples"),
        (
            "a.tsv",
            "text\tlabel\na\t1\n\xe9\xe9\t1\nb\n".encode("latin1"),
            "line 3: not UTF-8: byte 0xe9 at column 1",
        ),
        ("a.tsv", "text\tlabel\na\t1\tx\n", "line 2: 3 columns; the header has 2 columns"),
        ("a.tsv", "text\tlabel\na\t1\n\n", "line 3: the line is empty; the header has 2 columns"),
        ("a.tsv", "text\tlabel\na\t\n", "line 2: 'label' is empty"),
        ("a.tsv", "Text,label\na,1\n", "line 1: no column 'text', no column 'label' in the header"),
        ("a.tsv", "text\ttext\tlabel\na\tb\t1\n", "line 1: 2 columns 'text' in the header"),
    ],
)
def test_bad_lines(tmp_path, name, content, complaint):
    _, problems = read(tmp_path / name, content)
    assert any(complaint in problem for problem in problems), problems
    assert all(problem.startswith(str(tmp_path / name)) for problem in problems)


def test_all_that_is_wrong_with_the_files_is_said_at_once(made, run, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [{"text": "a", "label": 1}] + [{"text": ""}] * 12)
    other = write(tmp_path / "other.jsonl", [{"label": 1}])
    said = run(
        {
            "--train": bad,
            "--valid": other,
            "--seq-length": 25,
            "--tokenizer-type": None,
            "--vocab-file": None,
        },
        1,
    )
    assert "--seq-length 25: the model has 24 positions; use 24 or less" in said
    assert "names no tokenizer" in said and "line 2: 'text' is empty; no key 'label'" in said
    assert said.count("line ") == 8 and "and 5 more" in said
    said = run(
        {
            "--train": write(tmp_path / "train.tsv", [{"text": "a", "label": "good"}] * 2),
            "--epochs": 1,
        },
        1,
    )
    assert "needs two classes, all labels are 'good'" in said
    odd = write(tmp_path / "odd.jsonl", [{"text": "a", "label": x} for x in ("sad", "odd", "new")])
    said = run({"--valid": odd}, 1)
    for label in ("odd", "new"):
        assert (
            f"label {label!r} is in the validation data but not in the training data, which has "
            "glad, sad" in said
        )


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"--ckpt-step": 7}, "iter_0000007 does not exist"),
        ({"--load": "."}, "holds no checkpoint"),
        ({"--seq-length": 2}, "--seq-length 2: use 3 or more"),
        ({"--seq-length": 4, "--pair-key": "other"}, "--seq-length 4: use 5 or more"),
        ({"--vocab-file": "absent.txt"}, "--vocab-file absent.txt: no such file"),
        ({"--lr": 1e38, "--weight-decay": 0}, "use a lower --lr"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_message(run, more, complaint):
    assert complaint in run(more, 1)


def test_wrong_flags_and_files_are_said_before_torch_is_loaded(made, tmp_path):
    """As a user runs it."""
    wrong = {
        "--load": "absent",
        "--train": "absent.csv",
        "--valid-share": 1.5,
        "--epochs": 0,
        "--batch-size": 0,
        "--lr": 0.0,
        "--weight-decay": -1.0,
        "--warmup-fraction": 1.0,
        "--dropout": 1.0,
        "--save": made,
    }
    said = [f"{flag} {value}" for flag, value in wrong.items()]
    said += [
        "give one of --valid FILE and --valid-share",
        "must differ: they are text, text",
        "ends in .tsv or .jsonl",
    ]
    bad = write(tmp_path / "a.jsonl", [{"text": "a"}])
    tool = ROOT / "tools/finetune_classifier.py"
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        f"runpy.run_path({str(tool)!r}, run_name='__main__')"
    )
    for flags, status, wanted in (
        (wrong | {"--label-key": "text"}, 2, said),
        ({"--train": bad}, 1, [f"{bad}, line 1: no key 'label'"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *flags_of(made, flags)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (status, "False\n"), done.stderr
        assert [text for text in wanted if text not in done.stderr] == []
