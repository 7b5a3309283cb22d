"""The main program as a user runs it: processes, launchers, files, and reports of failures."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megalite.checkpoint.folder import latest_iteration
from megalite.checkpoint.load import Checkpoint
from megalite.preprocess.indexed_writer import IndexedWriter
from megalite.programs import pretrain_gpt
from megalite.training.failures import explain

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = str(ROOT / "pretrain_gpt.py")
MODEL = """
    --mock-data --vocab-size 61 --num-layers 2 --hidden-size 16 --num-attention-heads 4
    --seq-length 16 --device cpu --attention-dropout 0 --hidden-dropout 0 --global-batch-size 4
    --lr 0.05 --eval-interval 0 --log-interval 1
""".split()


def start(*command: str | Path, **variables: str | int) -> subprocess.Popen:
    """Start Python with these arguments and environment variables."""
    launcher = re.compile(r"SLURM_|(MASTER_(ADDR|PORT)|(LOCAL_)?(RANK|WORLD_SIZE))$")
    environment = {k: v for k, v in os.environ.items() if not launcher.match(k)} | {
        "OMP_NUM_THREADS": "1"
    }
    environment |= {name: str(value) for name, value in variables.items()}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=pipe, stderr=pipe, text=True, env=environment
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit status, output, errors) of a process."""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def as_srun(rank: int, port: int) -> dict:
    """The variables that srun gives rank `rank` of two on one node."""
    return dict(
        SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID=0, SLURM_JOB_ID=7, SLURM_STEP_ID=0,
        SLURM_NTASKS=2, SLURM_STEP_NUM_TASKS=2, SLURM_STEP_TASKS_PER_NODE=2,
        SLURM_STEP_NODELIST="localhost", MASTER_PORT=port,
    )  # fmt: skip


def on_two_ranks(*flags: str | Path) -> list[tuple[int, str, str]]:
    """Run the main program as two ranks of srun."""
    port = free_port()
    return [
        ended(p) for p in [start(PROGRAM, *MODEL, *flags, **as_srun(rank, port)) for rank in (0, 1)]
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


# Without torch ----------------------------------------------------------------------------------

WITHOUT_TORCH = f"""
import runpy, sys
sys.argv = [{PROGRAM!r}, *sys.argv[1:]]
try:
    runpy.run_path({PROGRAM!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules, "torch was loaded"
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_all_problems_of_a_configuration_are_reported_at_once_without_torch(rank):
    """12 heads on 8 tensor ranks, 5 stages of 4 layers, an odd batch: each once, with fixes."""
    flags = "--num-attention-heads 12 --hidden-size 768 --num-layers 4 --tp 8 --pp 5".split()
    batch = "--global-batch-size 31 --micro-batch-size 2".split()
    data = "--mock-data --vocab-size 512 --train-iters 10".split()
    launch = dict(RANK=rank, WORLD_SIZE=80, LOCAL_RANK=rank, MASTER_ADDR="localhost", MASTER_PORT=1)
    status, output, errors = ended(start("-c", WITHOUT_TORCH, *flags, *batch, *data, **launch))
    assert status == 2 and output == ""
    if rank:
        assert errors == ""
        return
    message = " ".join(errors.split())
    assert "3 problems" in message and message.count("fix: ") == 3
    for problem in ("--num-attention-heads 12", "--pp 5", "--global-batch-size 31"):
        assert problem in message
    assert "--tp 4" in message and "--pp 2" in message and "--global-batch-size 32" in message


def test_help_is_readable():
    status, output, errors = ended(start("-c", WITHOUT_TORCH, "--help", COLUMNS=100))
    assert status == 0 and errors == ""
    assert output.startswith("Pretrain a GPT") and "torchrun" in output
    assert "--tensor-model-parallel-size" in output and "data options" in output
    assert max(map(len, output.splitlines())) <= 100


# Whole runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_file(tmp_path_factory) -> Path:
    """A run of one process whose flags stand in a file, all but one."""
    folder = tmp_path_factory.mktemp("file")
    flags = [*MODEL, "--train-samples", "12", "--metrics-file", str(folder / "metrics.jsonl")]
    text, names = "", [i for i, flag in enumerate(flags) if flag.startswith("--")]
    for at, end in zip(names, [*names[1:], len(flags)]):
        text += f"{flags[at].lstrip('-')}: {' '.join(flags[at + 1 : end]) or 'true'}\n"
    (folder / "gpt.yaml").write_text(text)
    status, output, errors = ended(start(PROGRAM, "--config", folder / "gpt.yaml", "--lr", "0.01"))
    assert status == 0, errors
    (folder / "output").write_text(output)
    return folder


def test_a_file_of_flags_with_one_overridden(from_file):
    output = (from_file / "output").read_text()
    assert "learning rate 0.01," in output and "hidden 16," in output
    assert "one process, no launcher" in output


def test_train_samples_give_the_length(from_file):
    entries = [json.loads(line) for line in (from_file / "metrics.jsonl").read_text().splitlines()]
    assert [entry["consumed_samples"] for entry in entries] == [4, 8, 12]
    assert "all 3 iterations are done" in (from_file / "output").read_text()


def test_two_ranks_of_srun_train_as_one_process_does(tmp_path, from_file):
    metrics = tmp_path / "metrics.jsonl"
    ends = on_two_ranks("--train-samples", "12", "--lr", "0.01", "--metrics-file", metrics)
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "gloo, launched by srun; layout dp=2 x tp=1 x pp=1" in ends[0][1] and ends[1][1] == ""
    assert losses(metrics) == pytest.approx(losses(from_file / "metrics.jsonl"), rel=1e-5)


def test_a_dry_run_by_torchrun(tmp_path):
    flags = ["--tp", "2", "--sp", "--train-iters", "5", "--dry-run", "--save", tmp_path / "saved"]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    status, output, errors = ended(start(*torchrun, PROGRAM, *MODEL, *flags))
    assert status == 0, errors
    assert (
        "launched by torchrun" in output
        and "rank 1 (stage 0, data 0, tensor 1): layers 0-1, peak" in output
    )
    assert re.search(r"layers\.1\.mlp\.up\.weight \[32, 16\]", output)
    assert "loss 4.1" in output and "nothing was saved" in output
    assert list(tmp_path.iterdir()) == []


# When something goes wrong ----------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_all_ranks(tmp_path):
    """The message once for all ranks and without a traceback; what was saved before is whole."""
    ends = on_two_ranks(
        "--lr", "1e30", "--train-iters", "5", "--save", tmp_path / "saved", "--save-interval", "1"
    )
    errors = "".join(errors for _, _, errors in ends)
    assert [status for status, _, _ in ends] == [1, 1], errors
    assert re.fullmatch(
        r"pretrain_gpt\.py: rank [01]: iteration 2: the gradient norm is nan\. [^\n]+\n", errors
    ), errors
    assert latest_iteration(tmp_path / "saved") == 1
    with Checkpoint.open(tmp_path / "saved") as checkpoint:
        checkpoint.verify()
        assert checkpoint.read("final_norm.weight").isfinite().all()


def test_an_error_of_one_rank_is_reported_by_it_and_by_one_that_loses_contact(tmp_path):
    """Each data-parallel rank reads a sample; rank 0's has an id outside the vocabulary."""
    with IndexedWriter(tmp_path / "bad", np.uint16) as writer:
        writer.add_document(np.array([1] * 40 + [60000] * 24))
        writer.finish()
    data = [
        "--no-mock-data",
        "--data-path",
        tmp_path / "bad",
        "--split",
        "1",
        "--global-batch-size",
        "2",
    ]
    (status, _, errors), (other_status, _, other_errors) = on_two_ranks(*data, "--train-iters", "5")
    assert (status, other_status) == (1, 1)
    wanted = (
        r"pretrain_gpt\.py: rank 0: split 'train', [^\n]* id 60000, "
        r"but the vocabulary has 61 entries[^\n]*\n"
    )
    assert re.fullmatch(wanted, errors), errors
    # Reported by the program when it loses contact, or by its watchdog if that is first.
    wanted = (
        r"(pretrain_gpt\.py: )?rank 1: rank 0 on \S+ failed: "
        r"split 'train', [^\n]* id 60000, [^\n]*\n"
        r"(  \(contact was lost in at > all_reduce: [^\n]+\)\n)?"
    )
    assert re.fullmatch(wanted, other_errors), other_errors


def message_of_main(monkeypatch, *flags: str | Path) -> str:
    """What the main program exits with, in this process."""
    monkeypatch.setattr(sys, "argv", [PROGRAM, *MODEL, "--train-iters", "2", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        pretrain_gpt.main()
    return end.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_a_missing_gpu_is_reported_in_a_line(monkeypatch):
    message = message_of_main(monkeypatch, "--device", "cuda")
    assert (
        message.startswith("pretrain_gpt.py: rank 0: --device cuda: 0 GPU(s)")
        and "--device cpu" in message
    )


def test_a_damaged_checkpoint_is_reported_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", [PROGRAM, *MODEL, "--train-iters", "1", "--save", str(tmp_path)]
    )
    pretrain_gpt.main()
    (weights,) = tmp_path.glob("iter_*/weights-*")
    weights.write_bytes(weights.read_bytes()[:-1])
    message = message_of_main(monkeypatch, "--load", tmp_path)
    assert re.fullmatch(
        r"pretrain_gpt\.py: rank 0: .*iter_0000001/weights-.* has \d+ bytes instead of \d+\n"
        r"--load-fallback goes back .*",
        message,
    )


def test_a_run_without_save_says_so_before_it_trains(from_file):
    output = (from_file / "output").read_text()
    before, _, after = output.partition("training from iteration 0")
    assert "saves none (--save is unset)\n" in before
    assert "--save" not in after


def test_an_error_in_the_program_keeps_its_traceback():
    assert explain(ValueError("shapes differ")) is None
    assert explain(RuntimeError("mat1 and mat2 cannot be multiplied")) is None
