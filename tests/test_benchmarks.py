"""The benchmarks of training and of pipeline schedules against peers: their processes, their
tables, and what they say of a peer that is missing or fails."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS / "peers"))

sys.path.insert(0, str(BENCHMARKS))

import checkpoint_index  # noqa: E402
import compare  # noqa: E402
import pipeline  # noqa: E402
import training  # noqa: E402
from rank import Shape  # noqa: E402

from megalite.parallel.layout import ParallelLayout  # noqa: E402


def test_a_row_of_what_is_installed(capsys):
    shape = Shape(layers=1, hidden=64, heads=4, seq=32, vocab=512)
    results = compare.run_row("single", Path(sys.executable), {"torch": "2"}, shape, rounds=2)
    rounds = {who: len(measured) for who, measured in results.items()}
    assert rounds == {
        "megalite": 2,
        "plain PyTorch": 2,
        "Hugging Face GPT-2": 0,
        "Megatron-core": 0,
        "matrix products": 2,
    }
    lines = compare.lines_of("single", shape, results, sequence_flops=1e9)
    ours, plain, hugging_face, megatron = [line.strip("| ").split(" | ") for line in lines]
    tokens = compare.ROWS["single"].steps * 4 * 32
    rates = sorted(tokens / m.seconds for m in results["plain PyTorch"])
    assert plain[:3] == ["single", "plain PyTorch", f"{sum(rates) / 2:.0f}"]
    assert ours[0] == "single" and all(float(number) > 0 for number in ours[2:5])
    assert hugging_face[2] == megatron[2] == "not installed"
    said = capsys.readouterr().err
    assert "Megatron-core: no megatron-core; `make benchmark-peers` installs it" in said


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--peers --steps 3", "--steps has no effect with --peers"),
        ("--peers --no-clip", "--no-clip has no effect with --peers"),
        ("--peers --dropout 0.1", "--dropout has no effect with --peers"),
        ("--rows tp2", "--rows has no effect without --peers"),
        ("--peer-python python", "--peer-python has no effect without --peers"),
        ("--profile tp2 --rounds 3", "--rounds has no effect with --profile"),
        ("--peers --rows tp3", "--rows: no tp3; there are single, dp2"),
    ],
)
def test_flags_without_effect_are_refused(monkeypatch, capsys, flags, problem):
    monkeypatch.setattr(sys, "argv", ["training.py", *flags.split()])
    with pytest.raises(SystemExit):
        training.read_flags()
    assert problem in capsys.readouterr().err


def test_the_peak_is_the_sum_over_ranks():
    """Two ranks at 1 step per second each, one of which begins when the other has ended."""
    one = compare.Measurement(2.0, 2.0, steps_per_second=2.0, rss_mib=1.0, loss=None)
    shape = Shape(layers=1, seq=32, micro_batch=1)
    results = {"megalite": [one], "matrix products": [one]}
    # 4 sequences in 2 s, each of half of a product's FLOPs, of a peak of 2 products per second.
    (line,) = compare.lines_of("tp2", shape, results, sequence_flops=compare.MATMUL_FLOPS / 2)
    assert line.split(" | ")[5] == "50%"


def test_a_python_that_is_not_there_names_the_command():
    command = [BENCHMARKS / "training.py", "--peers", "--peer-python", "/nowhere"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "/nowhere" in done.stderr and "`make benchmark-peers`" in done.stderr


def test_a_rank_that_fails_is_reported_with_its_last_words():
    with compare.Contender("a peer", [sys.executable, "-c", "raise SystemExit('why')"], 2) as peer:
        with pytest.raises(compare.ContenderFailed, match=r"a peer failed:\nwhy"):
            peer.measure(1)


def test_every_benchmark_can_be_started():
    """In one process: each is loaded, without being run."""
    scripts = sorted(map(str, BENCHMARKS.glob("*.py")))
    code = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    runpy.run_path(path, run_name='loaded')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sums_of_two_ranks():
    import collectives

    command = [sys.executable, collectives.__file__, "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| all-")]
    assert done.returncode == 0 and len(rows) == len(collectives.SIZES), done.stderr


def test_the_index_of_many_ranks(tmp_path):
    """That of 8 ranks of a small model, by the benchmark's own steps."""
    layout = ParallelLayout(tensor=2, data=2, pipeline=2)
    found = {}
    for side in (checkpoint_index.pickled, checkpoint_index.written, checkpoint_index.opened):
        found |= side("tiny", layout, str(tmp_path))
    # Embedding, positions, final norm; attention, MLP and two norms of four layers: 2 each.
    assert found["tensors"] == 4 * (2 + 2 + 4 * (4 + 4 + 4))
    assert found["boxes"] > found["tensors"]
    # A rank's own file; the weights that data rank 0 has, and those that tensor rank 0 has.
    assert found["files opened by a rank, same layout"] == 4


def cells(line: str) -> list[str]:
    """Of a line of a table in Markdown."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_of(*flags: str) -> dict[str, list[str]]:
    """What the benchmark of pipelines prints for each schedule."""
    command = [sys.executable, pipeline.__file__, *flags, "--small"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [cells(line) for line in done.stdout.splitlines() if line.startswith("|")]
    table = {name: values for name, *values in rows[2:]}
    assert list(table) == list(pipeline.SCHEDULES)
    return table


@pytest.mark.parametrize("ranks", ["2", "4"])
def test_steps_beside_their_simulation(ranks):
    """On a machine of two cores, by the clock and by CPU time."""
    table = table_of("predicted", "--ranks", ranks)
    for measured, simulated, ratio, bubble, *_ in table.values():
        assert float(measured) > 0 and float(simulated) > 0 and float(bubble.strip("%")) > 0
        # A timeline has what its step has, and the step takes time between actions, too.
        assert 0.2 < float(ratio.split()[0]) < 20
    assert table["1f1b"][4:] == ["1.00 (1.00 .. 1.00)"] * 2


def test_the_engine_beside_the_same_without_it():
    table = table_of("overhead", "--ranks", "2")
    assert [values[0] for values in table.values()] == ["16", "16", "32", "24", "48"]
    for _, engine, bare, _, torch, *cpu in table.values():
        assert all(float(spent) > 0 for spent in (engine, bare, torch, cpu[0], cpu[1], cpu[3]))


def test_schedules_of_what_is_installed():
    flags = pipeline.read_flags(["peers", "--small"])
    python = Path(sys.executable)
    results = pipeline.measure_peers(python, {"torch": "2"}, pipeline.SMALL, flags)
    rows = [cells(line) for line in pipeline.peer_table(results, tokens=512)[2:]]
    assert {row[0] for row in rows} == set(pipeline.SCHEDULES)
    for schedule, name, rate, *_ in rows:
        if name.startswith("Megatron"):
            assert rate == "not installed"
        else:
            assert float(rate) > 0, (schedule, name)
    (taken,) = results["megalite", "zb-v"]
    (theirs,) = results["torch", "zb-v"]
    (row,) = [row for row in rows if row[1] == "torch ZBVZeroBubble"]
    assert row[2] == f"{512 / theirs.seconds:.0f}"
    assert row[4].startswith(f"{theirs.seconds / taken.seconds:.2f} ")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("predicted --ranks 1", "predicted needs --ranks 2 or more"),
        ("overhead --peer-python python", "--peer-python has no effect with overhead"),
    ],
)
def test_what_pipelines_cannot_be_measured_with(capsys, flags, problem):
    with pytest.raises(SystemExit):
        pipeline.read_flags(flags.split())
    assert problem in capsys.readouterr().err
