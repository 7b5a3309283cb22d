"""What README.md says is run: the walk-through by hand, with smaller numbers, and the command whose
output it shows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BY_HAND = re.search(r"^## The same by hand$(.*?)^## ", README, re.M | re.S).group(1)
SMALLER = {
    "train_iters": 4,
    "lr_warmup_iters": 1,
    "eval_interval": 2,
    "eval_iters": 1,
    "log_interval": 1,
}


def environment() -> dict[str, str]:
    """As after `source .venv/bin/activate`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


def smaller(script: str) -> str:
    """The script with the numbers of SMALLER where the README's are for 500 iterations."""
    for flag, number in {"--exit-interval": 2, "--resumed-at": 2, "--max-new-tokens": 20}.items():
        script, count = re.subn(rf"{flag} \d+", f"{flag} {number}", script)
        assert count == 1, f"README.md uses {flag} {count} times"
    return script


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> tuple[Path, str]:
    """Runs the bash blocks of the walk-through in a folder of its own: (the folder, what they
    printed)."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", BY_HAND, re.M | re.S)
    assert len(blocks) == 5
    folder = tmp_path_factory.mktemp("by-hand")
    for name in ("pretrain_gpt.py", "tools"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples/quickstart", folder / "examples/quickstart")
    config = folder / "examples/quickstart/gpt.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | SMALLER))
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", smaller("".join(blocks))],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:]
    return folder / "runs/quickstart", run.stdout


def test_by_hand_stops_resumes_and_ends(by_hand):
    folder, output = by_hand
    assert (folder / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "4"
    assert "resumed from runs/quickstart/checkpoints/iter_0000002 at iteration 2" in output
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["iteration"] for line in lines if "validation_loss" in line] == [2, 4]


def test_by_hand_plots_and_samples(by_hand):
    folder, output = by_hand
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "The people of the United States" in output[output.rindex("loss.png") :]


@pytest.mark.parametrize(("program", "status"), [("pretrain_gpt", 2), ("pretrain_bert", 0)])
def test_what_is_shown_of_a_command_is_what_it_prints(program, status):
    """A block that begins with `$ ` shows the command and exactly what it prints: problems, or a
    summary."""
    command, shown = re.search(
        rf"^```\n\$ (python {program}\.py .*?)\n(.*?)^```$", README, re.M | re.S
    ).groups()
    run = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (run.returncode, (run.stdout + run.stderr).strip()) == (status, shown.strip())


def test_the_plot_and_the_walk_through_use_the_config_s_numbers():
    half = yaml.safe_load((ROOT / "examples/quickstart/gpt.yaml").read_text())["train_iters"] // 2
    assert re.findall(r"(?:--exit-interval|--resumed-at) (\d+)", BY_HAND) == [str(half), str(half)]


@pytest.mark.parametrize(
    "page", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/*.md")))]
)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    missing = [
        t for t in targets if "://" not in t and not (ROOT / page).parent.joinpath(t).exists()
    ]
    assert not missing
