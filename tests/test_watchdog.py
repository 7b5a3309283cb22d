"""Ranks that hang, die, fail or differ: real ones, and what their job says before it ends."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megalite import cli, validate
from megalite.parallel.watchdog import HUNG
from megalite.training.pretrain import pretrain
from tests.pool import RanksFailed
from tests.test_pretrain import free_port
from tests.trouble import troubled

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
    --mock-data --vocab-size 61 --num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 16 --device cpu
    --global-batch-size 4 --eval-interval 0 --eval-iters 0 --train-iters 4
""".split()


def train_in_trouble(launch, trouble: str, flags: list[str]) -> str:
    """A training on a rank of the pool."""
    config = validate.resolve(cli.read([*MODEL, *flags]), launch.world_size)
    pretrain(config, launch, troubled(trouble))
    return "trained"


def hang(pool, ranks: int, trouble: str, *flags) -> RanksFailed:
    with pytest.raises(RanksFailed) as failed:
        pool.run(train_in_trouble, ranks, trouble, list(map(str, flags)), timeout=100)
    return failed.value


def test_a_hang_is_explained_and_ends_every_rank(pool, tmp_path):
    """Rank 2 of tp=2 x pp=2 sleeps: the verdict is said once, with its stack; all stacks are in a file."""
    flags = ["--tp", "2", "--pp", "2", "--save", tmp_path / "c", "--hang-timeout", "4"]
    failed = hang(pool, 4, "sleep 2 3", *flags)
    said = str(failed)
    # Rank 0 may stay a moment longer than the pool waits, for the store that it holds.
    assert sorted(failed.ranks) == [0, 1, 2, 3] and said.count(f"exited with status {HUNG}\n") >= 3, said
    assert said.count("HANG: ") == 1
    head = r"HANG: no progress for \d+ s, waiting for rank 2\n  rank 2 on \S+ \(process \d+\): training, step 3; in no"
    assert re.search(head, said), said
    # Rank 3 waits for it in the layer, rank 0 for a microbatch to go or to come back: whoever was first is named.
    calls = (
        r"all_reduce of \[16, 1, 16\] float32, call \d+ of the tensor group \(ranks 2, 3\)|transfer \d+ from rank [02]"
    )
    assert re.search(rf"missing from ({calls})", said), said
    assert re.search(r"where rank [03] on \S+ \(process \d+\) has waited for \d+ s", said)
    assert "in sleep" in said and "time.sleep(1)" in said
    text = (tmp_path / "c" / "hang-step-3.txt").read_text()
    for rank in range(4):
        assert f"--- rank {rank} on " in text
    assert text.count("in _watch") == 4 and text.count("in train_in_trouble") == 4 + 1  # in the verdict above them too


def test_a_stopped_process_is_named_though_it_cannot_answer(pool, tmp_path):
    said = str(hang(pool, 2, "stop 1 3", "--save", tmp_path, "--hang-timeout", "3"))
    assert "waiting for rank 1" in said and "it does not answer" in said and "was not done" in said


def test_rank_0_stopped_with_the_store_in_it():
    """Then nobody can be asked. The others end all the same, and say where they wait."""
    (status, _), (other, said) = ranks("stop 0 3", ["--hang-timeout", "4"], ["--hang-timeout", "4"], stopped=[0])
    assert (status, other) == (-signal.SIGKILL, HUNG), said
    assert re.search(
        r"^HANG: no progress for \d+ s on rank 1 of \S+, in all_reduce of .*does not answer", said, re.M
    ), said
    assert "in all_reduce" in said and "in _step" in said


def test_one_process_alone_that_hangs(pool, tmp_path):
    said = str(hang(pool, 1, "sleep 0 3", "--save", tmp_path, "--hang-timeout", "2"))
    assert f"exited with status {HUNG}\n" in said and "waiting for rank 0" in said and "in no call" in said
    assert "in sleep" in said


def test_a_slow_step_is_no_hang(pool):
    assert pool.run(train_in_trouble, 2, "slow 1 3", ["--hang-timeout", "60"], timeout=100) == ["trained"] * 2


def ranks(trouble: str, *flags_by_rank: list, stopped: Sequence[int] = ()) -> list[tuple[int, str]]:
    """(exit status, errors) of processes that run tests/trouble.py as ranks; stopped ones are killed in the end."""
    port, common = free_port(), {**os.environ, "OMP_NUM_THREADS": "1", "TROUBLE": trouble}
    processes = []
    for rank, flags in enumerate(flags_by_rank):
        launch = dict(RANK=rank, WORLD_SIZE=len(flags_by_rank), MASTER_ADDR="localhost", MASTER_PORT=port)
        launch |= dict(LOCAL_RANK=rank, LOCAL_WORLD_SIZE=len(flags_by_rank))
        command = [sys.executable, ROOT / "tests/trouble.py", *MODEL, *flags]
        environment = common | {name: str(value) for name, value in launch.items()}
        processes.append(subprocess.Popen(map(str, command), stderr=subprocess.PIPE, text=True, env=environment))
    for rank, process in enumerate(processes):
        if rank not in stopped:
            process.wait(timeout=200)  # what it says is less than a pipe holds
    for rank in stopped:
        processes[rank].kill()
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors)]


def test_a_rank_that_dies_is_named_once():
    """One of the three others says who died, where and in what; the rest end without a word."""
    ended = ranks("die 2 3", *[["--tp", "2"]] * 4)
    assert [status for status, _ in ended] == [1, 1, -signal.SIGKILL, 1], ended
    (said,) = [errors for _, errors in ended if errors]
    died = r"rank 2 on \S+ \(process \d+\) died without a word \(last heard: \w+"
    assert re.match(r"pretrain_gpt\.py: rank [013]: " + died, said), said


def test_rank_0_takes_the_store_with_it_and_is_named_too():
    ended = ranks("die 0 3", [], [])
    assert [status for status, _ in ended] == [-signal.SIGKILL, 1], ended
    said = r"^pretrain_gpt\.py: rank 1: rank 0, or torchrun on the first node, is gone"
    assert re.search(said, ended[1][1], re.M), ended


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_fails_is_quoted_once(culprit):
    """Its traceback, and one line of the others that repeats the error; also of rank 0, which holds the store."""
    ended = ranks(f"fail {culprit} 3", [], [], [], [])
    assert [status for status, _ in ended] == [1, 1, 1, 1], ended
    assert ended[culprit][1].rstrip().endswith("ArithmeticError: this model is broken")
    others = [errors for rank, (_, errors) in enumerate(ended) if errors and rank != culprit]
    assert len(others) == 1, others
    (said,) = others
    assert re.search(rf"rank {culprit} on \S+ failed: ArithmeticError: this model is broken", said), said
    assert "Traceback" not in said and "c10d" not in said


def test_ranks_that_were_not_started_alike_are_told_apart():
    ended = ranks("slow 9 9", ["--lr", "0.1"], ["--lr", "0.2"])
    assert [status for status, _ in ended] == [1, 1], ended
    said = r"pretrain_gpt\.py: rank 0: ranks were not started alike; rank\(s\) 1 on \S+: lr 0\.2 \(rank 0: 0\.1\)\n"
    assert re.fullmatch(said, ended[0][1]) and ended[1][1] == "", ended
