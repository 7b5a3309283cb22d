"""docs/huggingface.md: its commands run, its tables are those of the code."""

import json
import random
import re
import subprocess
from pathlib import Path

import pytest

from tests import huggingface_table
from tests.convert.published_models import GROUPED, LLAMA3, _make
from tests.runs import working_in
from tests.test_readme import environment

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/huggingface.md").read_text()
SMALLER = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--tp 2 --pp 2": "--tp 2",
    "--seq-length 4096": "--seq-length 16",
    "--global-batch-size 8": "--global-batch-size 2",
    "--lr-warmup-iters 10 --train-iters 1000 --save-interval 500": "--train-iters 2",
}
"""What the page says, and what is run in its place."""


def test_the_tables_are_those_of_the_code():
    assert PAGE.endswith(huggingface_table.markdown() + "\n"), (
        "run python -m tests.huggingface_table into the end of docs/huggingface.md"
    )


def test_the_commands_run(tmp_path):
    """From a published folder through training on two ranks to a folder that transformers
    loads and samples from."""
    pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer

    script = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S))
    for shown, smaller in SMALLER.items():
        assert script.count(shown) == 1, shown
        script = script.replace(shown, smaller)
    for name in ("pretrain_gpt.py", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    draw = random.Random(3)
    words = ["".join(draw.choices("aeioulmnrst", k=draw.randint(2, 8))) for _ in range(300)]
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(60)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    folder = tmp_path / "Llama-3.1-8B"
    sizes = {**GROUPED, "vocab_size": 320, "rope_parameters": LLAMA3, "num_hidden_layers": 2}
    _make("LlamaForCausalLM", sizes).save_pretrained(folder)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|end_of_text|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment() | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert f"weights of the LlamaForCausalLM in {tmp_path}/Llama-3.1-8B" in run.stdout
    assert "iteration 2/2" in run.stdout
    config = json.loads((tmp_path / "my-llama/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["rope_parameters"]["rope_type"] == "llama3"
    assert (tmp_path / "one-file/model.safetensors").exists()
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    with working_in(tmp_path):
        scope: dict = {}
        exec(example, scope)
    assert scope["qkv"].shape == (2, 4, 8, 32) and scope["rows"].shape == (4, 32)
