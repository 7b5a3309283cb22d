"""tools/inspect_checkpoint.py, on real checkpoints of two layouts."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from megalite.checkpoint import inspection
from megalite.programs.inspect_checkpoint import main
from tests.checkpoint.helpers import cut, part, save, whole

NAME = "layers.0.mlp.up.weight"
VALUES = torch.arange(24.0).reshape(4, 6)


@pytest.fixture
def inspect(monkeypatch, capsys):
    """Runs the tool: (status, what it printed, without frames, its errors)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        return status, " ".join(printed.out.replace("│", " ").split()), printed.err

    return run


def saved(root, tensor, *, dim=0, more=()):
    """A checkpoint of one tensor, its moment, and others."""
    boxes = cut(tuple(tensor.shape), dim, 2)
    shards = [part(NAME, tensor, box) for box in boxes]
    shards.append(whole(f"optimizer.exp_avg.{NAME}", tensor.double()))
    state = {"iteration": 7, "seed": 5, "layout": {"tensor": 2, "data": 3}, "data": {"a": {}}}
    return save(root, 7, *shards, *more, state=state)


def test_it_shows_what_a_checkpoint_holds(inspect, tmp_path):
    saved(tmp_path, VALUES)
    status, shown, errors = inspect(tmp_path, "--tensors", "--verify")
    assert (status, errors) == (0, "")
    for text in (
        "iter_0000007",
        "iteration 7",
        "written by megalite",
        "format version 2",
        "layout tensor 2, data 3",
        "seed 5",
        "configuration --lr 0.1",
        "weights 1 24 96 B float32",
        "optimizer.exp_avg 1 24 192 B float64",
        f"{NAME} float32 [4, 6] in 2 boxes",
        "verified: all 3 files",
    ):
        assert text in shown, text
    status, shown, _ = inspect(tmp_path, "--json")
    facts = json.loads(shown)
    assert (status, facts["iteration"], facts["groups"]["weights"]["bytes"]) == (0, 7, 96)
    assert (facts["verified"], facts["problems"]) == (False, [])
    facts = json.loads(inspect(tmp_path, "--json", "--verify")[1])
    assert (facts["verified"], facts["problems"]) == (True, [])


def test_it_shows_a_damaged_checkpoint_as_far_as_it_can(inspect, tmp_path):
    folder = saved(tmp_path, VALUES)
    file = folder / "weights-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    content[-192 - 96 - 1] ^= 0  # the header stays
    file.write_bytes(content)
    (folder / "config.yaml").unlink()
    assert inspect(tmp_path)[0] == 1
    status, shown, errors = inspect(tmp_path, "--verify")
    assert status == 1 and "weights 1 24 96 B" in shown and "verified" not in shown
    assert f"weights-00000.safetensors: {NAME}" in errors and "differ from their check" in errors
    facts = json.loads(inspect(tmp_path, "--verify", "--json")[1])
    assert facts["verified"] and "differ from their check" in "".join(facts["problems"])
    assert "config.yaml is missing" in errors
    # Without an index, the headers of the files tell what is there.
    (folder / "index.json").unlink()
    status, shown, errors = inspect(folder, "--verify")
    assert status == 1 and "weights 2 24 96 B float32" in shown
    assert "index.json is missing" in errors


def test_the_latest_has_no_index(inspect, tmp_path):
    """The file is named, and the nearest checkpoint before it."""
    root = tmp_path / "run"
    for iteration in (5, 7, 9):
        save(root, iteration, whole(NAME, VALUES))
    (root / "iter_0000009" / "index.json").unlink()
    lost = f"{root}/iter_0000009/index.json is missing; {root} holds iter_0000005, iter_0000007, "
    lost += f"of which {root}/iter_0000007 is the nearest before it"
    for arguments in (
        [root],
        ["--diff", root, root / "iter_0000007"],
        ["--diff", root / "iter_0000009", root / "iter_0000007"],
    ):
        status, _, errors = inspect(*arguments)
        assert status == 1 and lost in errors, errors
    assert inspect("--diff", root / "iter_0000005", root / "iter_0000007")[0] == 0


def test_differences_of_two_layouts(inspect, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "COMPARED_ELEMENTS", 5)
    one, other, third = (tmp_path / name for name in ("one", "other", "third"))
    saved(one, VALUES, more=[whole("a", torch.ones(2)), whole("n", torch.tensor(torch.nan))])
    saved(
        other, VALUES, dim=1, more=[whole("a", torch.ones(2)), whole("n", torch.tensor(torch.nan))]
    )
    status, shown, errors = inspect("--diff", one, other)
    assert (status, shown, errors) == (0, "0 of 4 tensors differ, 4 are equal", "")
    changed = VALUES.clone()
    changed[2, 1] = -3  # 13
    changed[0, 0] = 0.5  # 0
    saved(third, changed, more=[whole("a", torch.ones(3)), whole("c", torch.ones(1))])
    status, shown, _ = inspect("--diff", one, third)
    assert status == 1
    for text in (
        f"{NAME}: 2 elements differ, by up to 16, relative 1.23",
        "a: shapes (2,) and (3,)",
        "c: only in",
        "n: only in",
        "5 of 5 tensors differ, 0 are equal",
    ):
        assert text in shown, shown


def test_arguments_that_do_not_fit(inspect, tmp_path):
    for arguments, text in (
        (["--diff", "a"], "2 folder(s)"),
        (["a", "b"], "1 folder(s)"),
        (["--diff", "a", "b", "--verify"], "--verify has no effect"),
    ):
        status, _, errors = inspect(*arguments)
        assert status == 2 and text in errors
    status, _, errors = inspect(tmp_path)
    assert status == 1 and "holds no checkpoint" in errors


def test_the_commands_and_the_example_of_the_docs(inspect, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    for iteration in (100, 200):
        save(tmp_path / "SAVE", iteration, whole(NAME, torch.ones(1024, 256)))
    (script,) = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    for line in script.splitlines():
        arguments = shlex.split(line, comments=True)
        assert arguments[:2] == ["python", "tools/inspect_checkpoint.py"]
        status, shown, errors = inspect(*arguments[2:])
        assert (status, errors) == (0, "") and shown, line
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    found = {}
    exec(example, found)
    assert found["rows"].shape == (4, 256) and found["weight"].shape == (1024, 256)
