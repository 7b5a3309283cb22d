"""What two runs must have in common, and in what they must differ: the vocabulary of test_flags."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.runs import Run

Check = Callable[[Any, Any], None]
"""Asserts on what was observed without and with the flag."""


def near(value):
    """Equal but for rounding in fp32."""
    return pytest.approx(value, rel=1e-5)


def losses_from(step: int) -> Check:
    """Training is the same up to its step number `step`, whose loss is the first that differs."""

    def check(before: Run, after: Run):
        assert after.losses[: step - 1] == near(before.losses[: step - 1])
        assert after.losses[step - 1] != near(before.losses[step - 1])

    return check


def rates(*expected: float) -> Check:
    """The learning rates are these; losses differ right after the first rate that does."""

    def check(before: Run, after: Run):
        assert after.column("learning_rate") == pytest.approx(expected, abs=1e-12)
        different = [
            a != near(b)
            for a, b in zip(after.column("learning_rate"), before.column("learning_rate"))
        ]
        losses_from(different.index(True) + 2)(before, after)

    return check


def prints(*texts: str) -> Check:
    """These lines are on the console, and were not."""

    def check(before: Run, after: Run):
        for text in texts:
            assert text in after.lines
            assert text not in before.lines

    return check


def leaves_out(text: str) -> Check:
    """No line with this text is printed any more."""

    def check(before: Run, after: Run):
        assert text in before.console
        assert text not in after.console

    return check


def more_parameters(number: int) -> Check:
    """The whole model has this many parameters more."""

    def check(before: Run, after: Run):
        numbers = [
            int(re.search(r"([\d,]+) parameters", r.console)[1].replace(",", ""))
            for r in (before, after)
        ]
        assert numbers[1] - numbers[0] == number

    return check


def has(**values: Any) -> Check:
    """The fields have these values, and had not all of them."""

    def check(before: dict, after: dict):
        assert {key: after[key] for key in values} == values != {key: before[key] for key in values}

    return check


def becomes(attribute: str, value: Any) -> Check:
    """An attribute of the run has this value, and had another."""

    def check(before: Run, after: Run):
        assert getattr(after, attribute) == value != getattr(before, attribute)

    return check


def column(name: str, *values: float) -> Check:
    """The metrics have these values, and had others."""

    def check(before: Run, after: Run):
        assert after.column(name) == list(values) != before.column(name)

    return check


def reported(name: str) -> Check:
    """The metrics have this quantity for every iteration, and had not."""

    def check(before: Run, after: Run):
        assert len(after.column(name)) == len(after.iterations) and not before.column(name)

    return check


def same_losses(before: Run, after: Run) -> None:
    assert after.losses == near(before.losses)


def other_rounding(before: Run, after: Run) -> None:
    assert after.losses != before.losses
    assert after.losses == pytest.approx(before.losses, rel=0.01)


def slightly_other_losses(before: Run, after: Run) -> None:
    """Other numbers in fp64, that are nearly the same."""
    assert after.losses == pytest.approx(before.losses, rel=0.01)
    assert after.losses[0] != pytest.approx(before.losses[0], rel=1e-9)


def same_dry_loss(before: Run, after: Run) -> None:
    assert before.lines[-1].endswith("nothing was saved") and after.lines[-1] == before.lines[-1]


def same_first_norm(before: Run, after: Run) -> None:
    assert after.column("grad_norm")[0] == near(before.column("grad_norm")[0])


def other_validation(before: Run, after: Run) -> None:
    assert after.validated == before.validated
    assert after.column("validation_loss")[0] != near(before.column("validation_loss")[0])


def goes_on_from(iteration: int) -> Check:
    """The run is the rest of the other one, from an iteration on, to the bit."""

    def check(before: Run, after: Run):
        assert before.iterations[0] <= iteration < after.iterations[0]
        assert after.metrics == [
            entry for entry in before.metrics if entry["iteration"] > iteration
        ]

    return check


def reports(*iterations: int) -> Check:
    """The console has a line for these iterations."""

    def check(before: Run, after: Run):
        shown = [
            [int(n) for n in re.findall(r"iteration +(\d+)/\d+", run.console)]
            for run in (before, after)
        ]
        assert shown[1] == list(iterations) != shown[0]

    return check


def stops_at(iteration: int, reason: str) -> Check:
    def check(before: Run, after: Run):
        assert after.iterations[-1] == iteration < before.iterations[-1]
        assert f"stopped at iteration {iteration}: {reason}" in after.lines

    return check


def less_is_kept(before: dict, after: dict) -> None:
    """Fewer bytes are kept for the backward, and the gradient is the same to the bit."""
    assert after["bytes"] < before["bytes"]
    assert torch.equal(after["gradient"], before["gradient"])


def more_is_kept(before: dict, after: dict) -> None:
    less_is_kept(after, before)


def from_to(before: Any, after: Any) -> Check:
    """The observation was exactly this, and is exactly that."""

    def check(was: Any, now: Any):
        assert (was, now) == (before, after)

    return check


def shape(name: str, *sizes: int) -> Check:
    """A dry run tells this shape of a parameter."""
    return prints(f"{name} {list(sizes)}")


def says(*words: str, instead_of: str = "") -> Check:
    """One of these is said, and none was: something else was, if given."""

    def check(before: Any, after: Any):
        before, after = (getattr(seen, "console", seen) for seen in (before, after))
        assert any(word in after for word in words), after
        assert instead_of in before and not any(word in before for word in words), before

    return check


def lists(start: str) -> Check:
    """The run left a file whose path begins so, and left none."""

    def check(before: Run, after: Run):
        assert any(path.startswith(start) for path in after.files), after.files
        assert not any(path.startswith(start) for path in before.files)

    return check


def named(name: str) -> Check:
    """The name is this one, and was none."""

    def check(before: str, after: str):
        assert (before, after) == ("", name)

    return check
