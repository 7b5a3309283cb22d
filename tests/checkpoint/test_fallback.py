"""A damaged checkpoint is not loaded: the run ends and says so, or goes back to the one before, on
all ranks."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

from megalite.checkpoint.folder import CheckpointError, list_iterations
from megalite.config import cli
from megalite.training.pretrain import pretrain
from megalite.watch.watchdog import LostContact

FLAGS = """
    --num-layers 1 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --vocab-size 31
    --mock-data --micro-batch-size 1 --global-batch-size 2 --lr 0.01 --min-lr 0 --train-iters 6
    --eval-interval 0 --eval-iters 0 --device cpu --tp 2
""".split()


def train_on_rank(launch, flags: list[str]) -> tuple[str, str]:
    """(what was printed, why it ended early; an error of all is raised on the first of them)."""
    given, resolved = cli.parse_with_given([*FLAGS, *flags], launch=launch)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            pretrain(resolved, launch, given=given)
    except (CheckpointError, LostContact) as error:
        return printed.getvalue(), str(error)
    return printed.getvalue(), ""


def losses(path: Path) -> dict[int, float]:
    lines = map(json.loads, path.read_text().splitlines())
    return {line["iteration"]: line["loss"] for line in lines}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_all_ranks_go_back_to_the_same_checkpoint(pool, tmp_path):
    """In this layout, the file of rank 1 is read by rank 1 alone: rank 0 finds no damage."""
    saved = tmp_path / "saved"

    def train(*flags) -> list[tuple[str, str]]:
        return pool.run(train_on_rank, 2, list(map(str, flags)), timeout=60)

    metrics = tmp_path / "all.jsonl"
    train("--save", saved, "--save-interval", 2, "--metrics-file", metrics)
    expected = losses(metrics)
    latest = saved / "iter_0000006"
    file = latest / "weights-00001.safetensors"
    bytes_of_file = bytearray(file.read_bytes())
    bytes_of_file[-3] ^= 1
    file.write_bytes(bytes_of_file)
    before = content(latest)

    # Without the flag: an error on both ranks, which names the file, the tensor and the remedy.
    outcomes = train("--load", saved)
    assert all("training from" not in printed for printed, _ in outcomes)
    error = "".join(error for _, error in outcomes)
    assert "rank 1: " in error and "iter_0000006/weights-00001.safetensors: optimizer." in error
    assert "differ from their checksum" in error
    assert "--load-fallback goes back" in error and "holds 2, 4, 6" in error

    # With it: the checkpoint before it, and the numbers from there.
    metrics = tmp_path / "rest.jsonl"
    outcomes = train("--load", saved, "--load-fallback", "--metrics-file", metrics)
    printed, error = outcomes[0]
    assert not error and "weights-00001.safetensors: optimizer." in printed
    assert "going back to iter_0000004 (--load-fallback)" in printed
    assert f"resumed from {saved}/iter_0000004 at iteration 4" in printed
    assert losses(metrics) == {iteration: expected[iteration] for iteration in (5, 6)}
    assert content(latest) == before

    # Two are damaged (a pipe in place of an index, a missing file), and the name of the latest.
    (latest / "index.json").unlink()
    os.mkfifo(latest / "index.json")
    (saved / "iter_0000004" / "weights-00000.safetensors").unlink()
    (saved / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\x00")
    printed, error = train("--load", saved, "--load-fallback")[0]
    assert not error and f"resumed from {saved}/iter_0000002 at iteration 2" in printed
    assert "latest_checkpointed_iteration.txt should hold an iteration number" in printed
    assert "index.json is a pipe, device or socket instead of a file" in printed
    assert "weights-00000.safetensors is missing" in printed

    # None is whole.
    (saved / "iter_0000002" / "config.yaml").write_text("")
    error = "".join(error for _, error in train("--load", saved, "--load-fallback"))
    assert "config.yaml has 0 bytes instead of" in error
    assert "no whole checkpoint is left" in error


def damage(folder: Path) -> None:
    """Change the last byte of rank 1's file, which no rule looks at."""
    file = folder / "weights-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_does_not_fit_is_no_damage(pool, tmp_path):
    """--load-fallback does not go on to a third checkpoint when the second one does not fit."""
    saved = tmp_path / "saved"
    flags = ["--save", str(saved), "--load", str(saved), "--train-iters", "2"]
    pool.run(train_on_rank, 2, [*flags, "--save-interval", "1"], timeout=60)
    lion = ["--optimizer", "lion", "--no-load-optim", "--train-iters", "3"]
    pool.run(train_on_rank, 2, [*flags, *lion], timeout=60)
    damage(saved / "iter_0000003")
    flags = ["--load", str(saved), "--load-fallback", "--optimizer", "lion"]
    error = "".join(error for _, error in pool.run(train_on_rank, 2, flags))
    assert "going back to iter_0000002" in error
    assert "iter_0000002 holds the state of --optimizer adam" in error


def test_the_fallback_to_a_checkpoint_that_was_made_otherwise_is_refused(pool, tmp_path):
    """What is not given must be as it was there, too; what is given may differ."""
    saved = tmp_path / "saved"

    def train(*flags) -> tuple[str, str]:
        outcomes = pool.run(train_on_rank, 2, list(map(str, flags)), timeout=60)
        return outcomes[0][0], "".join(error for _, error in outcomes)

    resumable = ["--save", saved, "--load", saved]
    assert train(*resumable, "--clip-grad", 0.5, "--train-iters", 2, "--lr-decay-iters", 6)[1] == ""
    assert train(*resumable, "--clip-grad", 1, "--train-iters", 4, "--lr-decay-iters", 6)[1] == ""
    damage(saved / "iter_0000004")
    printed, error = train("--load", saved, "--load-fallback")
    assert "training from" not in printed and "going back to iter_0000002" in error
    made_with = f"{saved}/iter_0000002 was made with --clip-grad 0.5; this run does not give"
    assert made_with in error and "fix: --clip-grad 0.5" in error
    printed, error = train("--load", saved, "--load-fallback", "--clip-grad", 1)
    assert not error and "at iteration 2" in printed and "clip_grad 0.5 -> 1.0" in printed


def test_weights_to_start_from_fall_back_too(pool, tmp_path):
    """--pretrained-checkpoint, of which rank 1 finds the latest damaged."""
    saved = tmp_path / "saved"
    pool.run(train_on_rank, 2, ["--save", str(saved), "--save-interval", "3"], timeout=60)
    weights = saved / "iter_0000006" / "weights-00001.safetensors"
    weights.write_bytes(b"")
    flags = ["--pretrained-checkpoint", str(saved)]
    error = "".join(error for _, error in pool.run(train_on_rank, 2, flags))
    assert "rank 1: " in error and "weights-00001.safetensors has 0 bytes" in error
    assert f"--load-fallback goes back to the last whole one; --pretrained-checkpoint {saved}/" in (
        error
    )
    both = ["--save", str(tmp_path / "new"), "--load", str(tmp_path / "new"), "--load-fallback"]
    printed, error = pool.run(train_on_rank, 2, [*flags, *both], timeout=60)[0]
    assert not error and "going back to iter_0000003 (--load-fallback)" in printed
    assert f"weights from {saved}/iter_0000003; all else starts from scratch" in printed


def branch(pool, saved: Path) -> None:
    """Save 2, 4, 6 and 8; then, from 4 on and with another interval, 6 and 9. 9 is damaged."""

    def train(*more):
        given = ["--save", saved, "--load", saved, "--lr-decay-iters", 9, *more]
        printed, error = pool.run(train_on_rank, 1, [*map(str, given), "--tp", "1"], timeout=60)[0]
        assert not error, printed

    train("--save-interval", 2, "--train-iters", 8)
    train("--ckpt-step", 4, "--save-interval", 3, "--train-iters", 9)
    (saved / "iter_0000009" / "weights-00000.safetensors").write_bytes(b"")


def test_the_fallback_stays_on_the_branch_of_the_latest(pool, tmp_path):
    """2 4 6 8, resumed from 4: 6 (moved aside) and 9 of the new branch, 8 of the old one."""
    saved = tmp_path / "saved"
    branch(pool, saved)
    assert list_iterations(saved) == [2, 4, 6, 8, 9]
    history = json.loads((saved / "iter_0000009" / "state.json").read_text())["history"]
    assert history == [2, 4, 6]

    def resume(*flags) -> tuple[str, str]:
        given = ["--load", saved, "--load-fallback", "--lr-decay-iters", 9, "--train-iters", 9]
        given += ["--tp", 1, *flags]
        return pool.run(train_on_rank, 1, list(map(str, given)), timeout=60)[0]

    printed, error = resume()
    assert not error and "iter_0000006 at iteration 6" in printed
    assert "another branch" not in printed

    # Its own run is not known: all that are stored, and the note says so.
    state = saved / "iter_0000009" / "state.json"
    state.write_text("{")
    printed, error = resume()
    assert not error and "iter_0000008 at iteration 8" in printed
    assert "going back to iter_0000008 (--load-fallback), maybe of another branch" in printed

    # An earlier version wrote no history: all lower numbers, as if there were one branch.
    state.write_text(json.dumps({"iteration": 9}))
    printed, error = resume()
    assert not error and "iter_0000008 at iteration 8" in printed
    assert "another branch" not in printed
