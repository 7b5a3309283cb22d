"""What the docs show runs, and what they list is all there is."""

import re
import subprocess
import sys
from pathlib import Path

from tests.layouts import LAYOUTS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_library_example_runs():
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(), re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=DOCS.parent)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[2]) for line in done.stdout.splitlines() if " loss " in line]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert "(4, 3, 16, 64)" in done.stdout


def test_the_table_of_layouts_lists_each_with_a_small_difference():
    rows = dict(re.findall(r"^\| (.+?) \| \d.* \| (\S+) \|$", (DOCS / "layouts.md").read_text(), re.MULTILINE))
    assert list(rows) == [layout.name for layout in LAYOUTS], "run python -m tests.layouts_table"
    assert all(float(difference) < 1e-9 for difference in rows.values())
