"""A run that was replaced writes no checkpoint any more, wherever it was interrupted."""

import pytest
import torch

from megalite.checkpoint.fence import CONTINUE_FILE, Claim
from megalite.checkpoint.folder import CheckpointError, latest_iteration, list_iterations
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from tests.checkpoint.helpers import ALONE, whole


def save(root, iteration: int, claim: Claim | None, value: float = 1.0, meanwhile=lambda: None) -> None:
    """Write a checkpoint; `meanwhile` runs while its tensors are written."""

    def pieces():
        yield whole("w", torch.full((2,), value))
        meanwhile()

    write(root, iteration, pieces(), {}, {}, "", ALONE, claim=claim)


def test_the_latest_claim_counts(tmp_path):
    first = Claim.take(tmp_path / "c")
    save(tmp_path / "c", 1, first)
    second = Claim.take(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"now belongs to another run \(process \d+ on .*was replaced"):
        save(tmp_path / "c", 2, first)
    save(tmp_path / "c", 2, second, 2.0)
    assert list_iterations(tmp_path / "c") == [1, 2]


def test_a_run_that_is_replaced_in_the_middle_of_a_save(tmp_path):
    """Its successor saves the same iteration meanwhile; that one stays."""
    first, taken = Claim.take(tmp_path), []

    def replace():
        taken.append(Claim.take(tmp_path))
        save(tmp_path, 1, taken[0], 2.0)

    with pytest.raises(CheckpointError):
        save(tmp_path, 1, first, 1.0, meanwhile=replace)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.verify()
        assert checkpoint.read("w").tolist() == [2.0, 2.0]
    assert [path.name for path in tmp_path.glob(".iter*")] == []


def test_a_draft_that_passed_its_last_look_is_gone_when_it_is_renamed(tmp_path, monkeypatch):
    """The claim changes hands between the check and the rename."""
    first = Claim.take(tmp_path)
    looks = []

    def check_and_be_replaced(claim):
        looks.append(claim)
        if len(looks) == 2:  # the one before the rename
            Claim.take(tmp_path)

    monkeypatch.setattr(Claim, "check", check_and_be_replaced)
    with pytest.raises(CheckpointError, match="No such file"):
        save(tmp_path, 1, first)
    assert latest_iteration(tmp_path) is None


def test_a_claim_clears_the_mark_of_a_run_that_stopped(tmp_path):
    Claim.take(tmp_path).ask_to_be_continued("stopped at iteration 3: SIGUSR1")
    assert (tmp_path / CONTINUE_FILE).read_text() == "stopped at iteration 3: SIGUSR1\n"
    Claim.take(tmp_path)
    assert not (tmp_path / CONTINUE_FILE).exists()


def test_an_owner_that_cannot_be_read_is_refused(tmp_path):
    claim = Claim.take(tmp_path)
    (tmp_path / "owner.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"owner\.json cannot be read"):
        save(tmp_path, 1, claim)
