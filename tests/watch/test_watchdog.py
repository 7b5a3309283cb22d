"""Ranks that hang, die, fail or differ: real ones, and what their job says before it ends."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from megalite.config import cli, validate
from megalite.parallel.collectives import Group
from megalite.parallel.context import ParallelContext
from megalite.training.pretrain import pretrain
from megalite.watch.watchdog import HUNG, Watchdog
from tests.pool import RanksFailed
from tests.test_pretrain import free_port
from tests.test_resume import curve, wait_for
from tests.trouble import troubled

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
    --mock-data --vocab-size 61 --num-layers 2 --hidden-size 16 --num-attention-heads 4
    --seq-length 16 --device cpu --global-batch-size 4 --eval-interval 0 --eval-iters 0
    --train-iters 4
""".split()


def train_in_trouble(launch, trouble: str, flags: list[str], folder: str = ".") -> str:
    """A training on a rank of the pool."""
    os.chdir(folder)
    config = validate.resolve(cli.read_config([*MODEL, *flags]), launch.world_size)
    pretrain(config, launch, troubled(trouble))
    return "trained"


def hang(pool, ranks: int, trouble: str, *flags, folder: str | Path = ".") -> RanksFailed:
    with pytest.raises(RanksFailed) as failed:
        pool.run(train_in_trouble, ranks, trouble, list(map(str, flags)), str(folder), timeout=100)
    return failed.value


def test_a_hang_is_explained_and_ends_every_rank(pool, tmp_path):
    """Rank 2 of tp=2 x pp=2 sleeps: one verdict, with its stack; all stacks are in a file."""
    flags = ["--tp", "2", "--pp", "2", "--save", tmp_path / "c", "--hang-timeout", "4"]
    failed = hang(pool, 4, "sleep 2 3", *flags)
    said = str(failed)
    # Rank 0 may stay a moment longer than the pool waits, for the store that it holds.
    assert (
        sorted(failed.ranks) == [0, 1, 2, 3] and said.count(f"exited with status {HUNG}\n") >= 3
    ), said
    assert said.count("HANG: ") == 1
    head = (
        r"HANG: no progress for \d+ s, waiting for rank 2\n"
        r"  rank 2 on \S+ \(process \d+\): training, step 3, forward of microbatch 0; in no call"
    )
    assert re.search(head, said), said
    # Rank 3 waits for it in the layer, rank 0 in a transfer: whichever came first is named.
    calls = (
        r"all_reduce of \[16, 1, 16\] float32, call \d+ of the tensor group \(ranks 2, 3\)"
        r"|transfer \d+ from rank [02]"
    )
    assert re.search(rf"missing from ({calls})", said), said
    assert re.search(r"where rank [03] on \S+ \(process \d+\) has waited for \d+ s", said)
    assert "in sleep" in said and "time.sleep(1)" in said
    text = (tmp_path / "c" / "hang-step-3.txt").read_text()
    for rank in range(4):
        assert f"--- rank {rank} on " in text
    assert text.count("in _watch") == text.count("in train_in_trouble") == 4


def test_a_hang_names_microbatch_stage_and_chunk(pool):
    """Rank 1 sleeps in the second of its two stages, the last of the model; rank 0 waits for it."""
    flags = ["--pp", 2, "--num-layers", 4, "--num-virtual-stages-per-pipeline-rank", 2]
    said = str(hang(pool, 2, "sleep 1 2", *flags, "--hang-timeout", 3))
    assert re.search(
        r"rank 1 on \S+ \(process \d+\): training, step 2, "
        r"forward of microbatch 0 on stage 3 \(chunk 1\); in no call\n"
        r"    missing from transfer \d+ from rank 1 to rank 0 .*\n"
        r"    where rank 0 on \S+ \(process \d+\) has waited for \d+ s "
        r"in its backward of microbatch 0 on stage 2 \(chunk 1\)\n",
        said,
    ), said


def shown(screen: str) -> list[str]:
    """Patterns of the lines that docs/troubleshooting.md shows under a heading.

    Numbers, hosts, calls and folders may differ, the line numbers of tests/trouble.py may not.
    """
    text = (ROOT / "docs/troubleshooting.md").read_text().partition(f"## {screen}\n")[2]
    block = re.search(r"^```\n(.*?)^```", text, re.M | re.S)[1]
    varies = {
        r'"tests/': r'"\S*tests/', r"line \d+": None, r"/shared/run/": r"\S*/",
        r"node\d": r"\S+", r"\d+": r"\d+", r"last heard: .*\)(?=: )": r"last heard: .*\)",
        r"contact was lost in .*": "contact was lost in .*",
    }  # fmt: skip
    names = [f"({pattern})" for pattern in varies]
    token = re.compile("|".join(names))
    forms = list(varies.values())

    lines = []
    for line in block.splitlines():
        if line.startswith(("srun: ", "slurmstepd-", "training ")) or line.endswith("..."):
            continue
        pattern = ""
        end = 0
        for found in token.finditer(line):
            pattern += re.escape(line[end : found.start()])
            pattern += forms[found.lastindex - 1] or found[0]
            end = found.end()
        lines.append(pattern + re.escape(line[end:]))
    return lines


def assert_shown(screen: str, said: str) -> None:
    """Each line that the docs show was said."""
    for line in shown(screen):
        assert re.search(f"^{line}$", said, re.M), f"{line}\nis not in\n{said}"


def test_the_docs_show_what_is_said_of_a_hang(pool, tmp_path):
    said = hang(
        pool,
        2,
        "sleep 1 3",
        "--tp",
        "2",
        "--micro-batch-size",
        "4",
        "--hang-timeout",
        "2",
        "--save",
        tmp_path,
    )
    assert_shown("A rank hangs", str(said))


def test_a_stopped_process_is_named_though_it_cannot_answer(pool, tmp_path):
    said = str(hang(pool, 2, "stop 1 3", "--save", tmp_path, "--hang-timeout", "3"))
    assert "waiting for rank 1" in said and "it does not answer" in said and "was not done" in said


def test_rank_0_stopped_with_the_store_in_it():
    """Then nobody can be asked. The others end all the same, and say where they wait."""
    (status, _), (other, said) = ranks(
        "stop 0 3", ["--hang-timeout", "4"], ["--hang-timeout", "4"], stopped=[0]
    )
    assert (status, other) == (-signal.SIGKILL, HUNG), said
    assert re.search(
        r"^HANG: no progress for \d+ s on rank 1 of \S+, in all_reduce of .*does not answer",
        said,
        re.M,
    ), said
    assert "in all_reduce" in said and "in _step" in said


def test_a_disk_that_does_not_take_the_stacks_does_not_delay_the_verdict(pool, tmp_path):
    """A named pipe without a reader is in the place of the file: opening it blocks for ever."""
    os.mkfifo(tmp_path / "hang-step-3.txt")
    said = str(hang(pool, 1, "sleep 0 3", "--save", tmp_path, "--hang-timeout", "2"))
    assert f"exited with status {HUNG}\n" in said and "waiting for rank 0" in said, said


def test_a_process_that_is_stopped_in_a_save_is_no_slow_disk(pool, tmp_path):
    said = str(
        hang(pool, 2, "stop_at_the_next_file 1 4", "--save", tmp_path, "--hang-timeout", "3")
    )
    assert re.search(
        r"^HANG: no progress for [1-9]\d+ s, waiting for rank 1\n  rank 1 on .*: last heard: ",
        said,
        re.M,
    )
    assert "it does not answer" in said and re.search(
        r"where rank 0 on \S+ \(process \d+\) waits$", said, re.M
    ), said


def test_rank_0_stopped_in_a_save_with_the_store_in_it(tmp_path):
    flags = [["--save", tmp_path, "--hang-timeout", "3"]] * 2
    (status, _), (other, said) = ranks("stop_at_the_next_file 0 4", *flags, stopped=[0])
    assert (status, other) == (-signal.SIGKILL, HUNG), said
    assert re.search(
        r"^HANG: no progress for [1-9]\d+ s on rank 1 of .*does not answer", said, re.M
    ), said


def test_one_process_alone_that_hangs(pool, tmp_path):
    said = str(hang(pool, 1, "sleep 0 3", "--save", tmp_path, "--hang-timeout", "2"))
    assert (
        f"exited with status {HUNG}\n" in said
        and "waiting for rank 0" in said
        and "in no call" in said
    )
    assert "in sleep" in said


def test_slow_steps_saves_and_evaluations_are_no_hang(tmp_path):
    """Three steps, a save and three batches of an evaluation, each longer than --hang-timeout."""
    flags = [
        "--tp",
        "2",
        "--micro-batch-size",
        "4",
        "--eval-interval",
        "4",
        "--eval-iters",
        "3",
        "--save",
        tmp_path,
    ]
    ended = ranks("slow 1 2-4, slow_disk 1 4", *[[*flags, "--hang-timeout", "4"]] * 2)
    assert statuses(ended) == [0, 0], ended


def test_a_job_that_was_suspended_continues_with_the_same_losses(pool, tmp_path):
    """All ranks are stopped for longer than --hang-timeout, in a step that continues afterwards."""
    found, undisturbed = tmp_path / "found.jsonl", tmp_path / "undisturbed.jsonl"
    flags = ["--hang-timeout", "8", "--micro-batch-size", "2"]
    processes = started("busy 1 2", *[[*flags, "--metrics-file", found]] * 2)
    wait_for(lambda: found.exists() and found.read_text().count("\n") >= 1)
    time.sleep(0.5)  # until step 2 is computed
    for number, pause in (signal.SIGSTOP, 9), (signal.SIGCONT, 0):
        for process in processes:
            process.send_signal(number)
        time.sleep(pause)
    assert statuses(ended_of(processes)) == [0, 0]
    pool.run(
        train_in_trouble, 2, "slow 9 9", [*flags, "--metrics-file", str(undisturbed)], timeout=100
    )
    assert curve(found) == curve(undisturbed)


class Shared(dist.HashStore):
    """A store of one process, for all of its ranks."""

    def clone(self):
        return self


class Suspending(Shared):
    """A store in whose first call the process is suspended for five seconds."""

    def set(self, key, value):
        if not self.check(["suspended"]):
            super().set("suspended", "yes")
            subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
            super().set("resumed", "yes")
        super().set(key, value)


class Garbling(Shared):
    """A store that gives back something else."""

    def multi_get(self, keys):
        return [b"?" for key in keys]


def rest_after_a_suspension(launch) -> str:
    """No progress before, during and for two seconds after a suspension: less than four in all."""
    context = replace(ParallelContext.single(), store=Suspending())
    with Watchdog(context, 4, "."):
        context.activity.set_state("training", 1)
        wait_for(lambda: context.store.check(["resumed"]))
        time.sleep(2)
    return "rested"


def test_a_suspension_within_a_call_of_the_store_is_no_hang(pool):
    assert pool.run(rest_after_a_suspension, 1) == ["rested"]


def hold_the_interpreter(launch) -> None:
    """A call into C that keeps Python's GIL, until a signal interrupts it."""
    context = replace(ParallelContext.single(), store=Shared())
    with Watchdog(context, 2, ".", partial(print, file=sys.stderr)):
        context.activity.set_state("training", 1)
        time.sleep(0.5)
        ctypes.PyDLL(None).sleep(100)
        time.sleep(100)


def test_a_rank_that_holds_the_interpreter_shows_where(pool):
    with pytest.raises(RanksFailed, match=rf"exited with status {HUNG}\b") as failed:
        pool.run(hold_the_interpreter, 1)
    assert re.search(
        r"Stack \(most recent call first\):\n  File .* in hold_the_interpreter", str(failed.value)
    ), failed.value


def nothing_more(launch, trouble: str) -> None:
    def say(text):
        raise BrokenPipeError("nobody reads this")

    context = ParallelContext.single()
    context = replace(context, store=Garbling()) if trouble == "garbled" else context
    with Watchdog(
        context, 2, ".", say if trouble == "unheard" else partial(print, file=sys.stderr)
    ):
        context.activity.set_state("training", 1)
        time.sleep(100)


@pytest.mark.parametrize("trouble", ["garbled", "unheard"])
def test_a_hang_ends_the_process_though_it_cannot_be_explained(pool, trouble):
    with pytest.raises(RanksFailed, match=rf"exited with status {HUNG}\b") as failed:
        pool.run(nothing_more, 1, trouble)
    assert ("others cannot be asked: Expecting value" in str(failed.value)) == (
        trouble == "garbled"
    )


def test_a_rank_that_does_not_come_to_the_end_is_a_hang(pool, tmp_path):
    """The one that waits for it, once all is trained, may not wait for ever."""
    said = str(
        hang(pool, 2, "stop_at_the_next_barrier 1 4", "--hang-timeout", "3", folder=tmp_path)
    )
    assert "rank 1 was not done" in said and f"rank 0 exited with status {HUNG}\n" in said, said
    assert re.search(
        r"waiting for rank 1\n  rank 1 on \S+ \(process [1-9].*\n +it does not answer", said
    ), said
    assert "missing from barrier" in said, said


def test_a_rank_that_cannot_leave_the_groups_ends_by_itself(pool):
    said = str(hang(pool, 2, "sleep_when_leaving 1 4", "--hang-timeout", "2"))
    assert f"rank 1 exited with status {HUNG}\n" in said and "finished: ranks [0]" in said, said
    assert re.search(r"HANG: no progress for \d+ s on rank 1 of \S+, in no call; others", said), (
        said
    )
    assert "in destroy" in said


def ranks(trouble: str, *flags_by_rank: list, stopped: Sequence[int] = ()) -> list[tuple[int, str]]:
    """(exit status, stderr) of ranks that run tests/trouble.py; stopped ones are killed last."""
    return ended_of(started(trouble, *flags_by_rank), stopped)


def started(trouble: str, *flags_by_rank: list) -> list[subprocess.Popen]:
    """Processes that run tests/trouble.py as ranks."""
    port, common = free_port(), {**os.environ, "OMP_NUM_THREADS": "1", "TROUBLE": trouble}
    processes = []
    for rank, flags in enumerate(flags_by_rank):
        launch = dict(
            RANK=rank, WORLD_SIZE=len(flags_by_rank), MASTER_ADDR="localhost", MASTER_PORT=port
        )
        launch |= dict(LOCAL_RANK=rank, LOCAL_WORLD_SIZE=len(flags_by_rank))
        command = [sys.executable, ROOT / "tests/trouble.py", *MODEL, *flags]
        environment = common | dict(zip(launch, map(str, launch.values())))
        processes.append(
            subprocess.Popen(map(str, command), stderr=subprocess.PIPE, text=True, env=environment)
        )
    return processes


def ended_of(
    processes: list[subprocess.Popen], stopped: Sequence[int] = ()
) -> list[tuple[int, str]]:
    """(exit status, stderr) of ranks; stopped ones are killed last."""
    for rank, process in enumerate(processes):
        if rank not in stopped:
            process.wait(timeout=200)  # what it prints is less than a pipe holds
    for rank in stopped:
        processes[rank].kill()
    ended = []
    for process in processes:
        _, errors = process.communicate(timeout=200)
        ended.append((process.returncode, errors))
    return ended


def statuses(ended: list[tuple[int, str]]) -> list[int]:
    """Exit status of each rank."""
    return [status for status, _ in ended]


def messages(ended: list[tuple[int, str]], but: int | None = None) -> list[str]:
    """What the ranks print on stderr, without those that print nothing, and without rank `but`."""
    return [errors for rank, (_, errors) in enumerate(ended) if errors and rank != but]


def test_a_rank_that_dies_is_named_once():
    """One of the others says which rank died, where and in which call; the rest print nothing.

    So do those that do not notice it, since one sleeps and one waits for that one.
    """
    ended = ranks("die 2 3, sleep 1 3", *[["--tp", "2"]] * 4)
    assert statuses(ended) == [1, 1, -signal.SIGKILL, 1], ended
    (said,) = messages(ended)
    died = r"rank 2 on \S+ \(process \d+\) exited without an error message \(last heard: \w+"
    assert re.match(r"pretrain_gpt\.py: rank [013]: " + died, said), said
    assert_shown("A rank dies", said)


def test_rank_0_takes_the_store_with_it_and_is_named_too():
    ended = ranks("die 0 3", [], [])
    assert statuses(ended) == [-signal.SIGKILL, 1], ended
    said = (
        r"pretrain_gpt\.py: rank 1: rank 0, or torchrun on the first node, is gone: .*\n"
        r"  \(contact was lost .*\)\n"
    )
    assert re.fullmatch(said, ended[1][1]), ended


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_is_quoted_once(failing):
    """Its traceback, and one line of another rank; also if it is rank 0, which holds the store."""
    ended = ranks(f"killed_when_leaving {failing} 3, fail {failing} 3", [], [], [], [])
    assert statuses(ended) == [1, 1, 1, 1], ended
    assert ended[failing][1].rstrip().endswith("ArithmeticError: this model is broken")
    others = messages(ended, but=failing)
    assert len(others) == 1, others
    (said,) = others
    assert re.search(
        rf"rank {failing} on \S+ failed: ArithmeticError: this model is broken", said
    ), said
    assert "Traceback" not in said and "c10d" not in said
    if failing:  # others lose contact with it at once; rank 0 stays for a moment, with the store
        assert_shown("A rank fails", "".join(messages(ended)))


def test_rank_0_keeps_the_store_for_one_that_comes_late():
    ended = ranks("fail 1 3, pause 3 3", [], [], [], [])
    (said,) = messages(ended, but=1)
    assert re.search(r"rank 1 on \S+ failed: ArithmeticError: this model is broken", said), said


def test_a_launcher_that_ends_all_at_once_leaves_rank_0_the_time_to_say_why():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TROUBLE": "fail 0 3"}
    ended = subprocess.run(
        [*command, ROOT / "tests/trouble.py", *MODEL],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert ended.returncode == 1, ended.stderr
    assert "[rank0]: ArithmeticError: this model is broken" in ended.stderr, ended.stderr
    assert re.search(r"Root Cause.*\n.*\n.*\n.*\n  rank      : 0 ", ended.stderr), (
        ended.stderr
    )  # though it ends last


def test_what_all_ranks_end_with_is_said_once(tmp_path):
    ended = ranks("full_disk 1 4", *[["--save", tmp_path / "c"]] * 2)
    assert statuses(ended) == [1, 1], ended
    (said,) = messages(ended)
    full = r"pretrain_gpt\.py: rank \d: checkpoint not written; .*No space left on device.*\n"
    assert re.fullmatch(full, said), said


def test_a_traceback_of_all_ranks_is_shown_once():
    errors = "".join(messages(ranks("fail 0 3, fail 1 3", [], [])))
    assert errors.count("Traceback") == 1, errors


def test_a_rank_that_failed_is_not_called_dead():
    """One that fails while another looks who has died."""
    store = Shared()
    first, second = (
        replace(ParallelContext.single(), store=store, world=Group((0, 1), rank))
        for rank in range(2)
    )
    with Watchdog(first, 0, ".") as watchdog, Watchdog(second, 0, ".") as failing:
        wait_for(lambda: store.check(["report/1"]))
        threading.Timer(0.7, failing.report_failure, ["broken"]).start()
        assert re.fullmatch(r"rank 1 on \S+ failed: broken", watchdog.why_contact_was_lost())


def test_no_thread_is_left_that_holds_the_groups():
    with Watchdog(ParallelContext.single(), 100, "."):
        pass
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_ranks_that_were_not_started_alike_are_named():
    ended = ranks("slow 9 9", ["--lr", "0.1"], ["--lr", "0.2"])
    assert statuses(ended) == [1, 1], ended
    said = (
        r"pretrain_gpt\.py: rank 0: ranks were not started alike; "
        r"rank\(s\) 1 on \S+: lr 0\.2 \(rank 0: 0\.1\); min_lr 0\.02 \(rank 0: 0\.01\)\n"
    )
    # On a machine that is busy, rank 1 says after some seconds that it waits for rank 0.
    waits = r"(rank 1 waits for \S+: connection refused\n)?"
    assert re.fullmatch(said, ended[0][1]) and re.fullmatch(waits, ended[1][1]), ended


def test_a_run_without_stderr_is_watched_too(tmp_path):
    """As a shell starts it with 2>&-."""
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *MODEL, "--save", str(tmp_path / "c")]
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0 and "all 4 iterations are done" in done.stdout
    assert (tmp_path / "c" / "iter_0000004").is_dir()
