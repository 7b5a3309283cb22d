"""Ranks that cannot meet, in real processes: what they say while they wait, and in the end."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEET = """
import os, sys
from datetime import timedelta
from megalite.parallel.launch import detect
from megalite.parallel.rendezvous import RendezvousError, meet
try:
    meet(detect(os.environ), timedelta(seconds=float(sys.argv[1])))
except RendezvousError as error:
    sys.exit(f"error: {error}")
"""
MODEL = """
    --mock-data --vocab-size 61 --num-layers 2 --hidden-size 16 --num-attention-heads 4 --device cpu
    --seq-length 16 --global-batch-size 4 --train-iters 2 --eval-iters 0 --eval-interval 0
""".split()
SOON = 3
"""Seconds after which a rank that waits in vain gives up."""
MISSING = (
    "{}. They did not connect to {} (from MASTER_ADDR and MASTER_PORT) within {} s "
    "(--distributed-timeout-minutes). Likely causes: they did not start, they have another "
    "address, or a firewall"
)
"""What rank 0 says in the end."""
LATE = 200
"""Seconds after which it would, in a test that ends earlier."""


@contextmanager
def listening(port: int = 0) -> Iterator[int]:
    """A program that accepts connections at a port of this machine and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        yield server.getsockname()[1]


def free_port() -> int:
    with listening() as port:
        return port


@contextmanager
def rank(
    number: int, world: int, port: int, seconds: float, host: str = "localhost", command=None
) -> Iterator[subprocess.Popen]:
    """A process that waits for the others for so long. It is killed at the end of the block."""
    variables = dict(RANK=number, WORLD_SIZE=world, MASTER_ADDR=host, MASTER_PORT=port)
    variables |= dict(LOCAL_RANK=number, LOCAL_WORLD_SIZE=world, TORCH_CPP_LOG_LEVEL="ERROR")
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    process = subprocess.Popen(
        command or [sys.executable, "-c", MEET, str(seconds)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen) -> list[str]:
    """The lines on stderr of a rank that fails."""
    lines = process.stderr.read().splitlines()
    assert process.wait() == 1, lines
    return lines


def end_of_one(*arguments, **options) -> list[str]:
    with rank(*arguments, **options) as process:
        return end_of(process)


@pytest.mark.parametrize("host", ["foo.invalid", "a..b"])
def test_a_host_name_that_does_not_resolve_is_an_error_at_once(host):
    """At once: long before the timeout."""
    (line,) = end_of_one(1, world=2, port=1234, seconds=LATE, host=host)
    assert line.startswith(f"error: the host name '{host}' does not resolve on "), line
    assert "It comes from MASTER_ADDR and MASTER_PORT" in line


def test_a_program_ends_with_one_line():
    command = [sys.executable, "pretrain_gpt.py", *MODEL]
    (line,) = end_of_one(1, 2, port=1234, seconds=LATE, host="foo.invalid", command=command)
    assert line.startswith("pretrain_gpt.py: rank 1: the host name 'foo.invalid' does not resolve")


def test_a_rank_says_what_it_waits_for():
    port = free_port()
    *notices, line = end_of_one(1, world=2, port=port, seconds=SOON)
    assert notices, line
    assert set(notices) == {f"rank 1 waits for localhost:{port}: connection refused"}
    address = rf"localhost:{port} \(from MASTER_ADDR and MASTER_PORT\)"
    waited = rf"within {SOON} s \(--distributed-timeout-minutes\)"
    causes = "Likely causes: rank 0 did not start, .* a firewall"
    expected = f"error: rank 0 was not reached at {address} {waited}: connection refused. {causes}"
    assert re.fullmatch(expected, line), line


def test_rank_0_names_those_that_are_missing():
    port = free_port()
    with rank(1, world=3, port=port, seconds=LATE) as waiting:
        waiting.stderr.readline()  # it looks for rank 0
        *notices, line = end_of_one(0, world=3, port=port, seconds=2 * SOON)
        missing = "1 of 3 ranks are missing: 2"
        assert f"rank 0 waits at localhost:{port}: {missing}" in notices, notices
        assert line == f"error: {MISSING.format(missing, f'localhost:{port}', 2 * SOON)}"
        *_, line = end_of(waiting)
        assert "was lost before all ranks had connected: see what rank 0 says" in line


def test_the_docs_show_what_rank_0_says():
    shown = MISSING.format("1 of 4 ranks are missing: 3", "node1:29500", 600)
    text = (ROOT / "docs/troubleshooting.md").read_text()
    assert f"\npretrain_gpt.py: rank 0: {shown}\n" in text


def test_a_port_in_use_is_an_error_at_once():
    with listening() as port:
        (line,) = end_of_one(0, world=2, port=port, seconds=LATE)
    assert line.startswith(f"error: rank 0 cannot listen at localhost:{port} (from MASTER_ADDR")
    assert line.endswith(
        "in use by another job, or by a process that an earlier one left; set MASTER_PORT"
    )


def test_rank_0_does_not_wait_at_the_address_of_another_machine():
    port = free_port()
    (line,) = end_of_one(0, world=2, port=port, seconds=LATE, host="203.0.113.1")
    assert re.match(rf"error: rank 0 runs on \S+, but is not reached at 203.0.113.1:{port} ", line)
    assert "an address of another machine" in line


def test_a_program_that_listens_there_and_is_not_rank_0():
    with listening() as port:
        *notices, line = end_of_one(1, world=2, port=port, seconds=SOON)
    problem = "what listens there does not answer as torch's store does"
    assert set(notices) == {f"rank 1 waits for localhost:{port}: {problem}"}, notices
    assert line.startswith(f"error: rank 0 was not reached at localhost:{port} "), line
    assert line.endswith("another program uses this port")


def test_two_processes_with_one_rank():
    """As when two jobs have one address: the second rank 1 would replace the first."""
    port = free_port()
    with rank(0, world=3, port=port, seconds=LATE), rank(1, 3, port, LATE) as first:
        first.stderr.readline()  # it has said that it waits for others
        (line,) = end_of_one(1, world=3, port=port, seconds=LATE)
    assert re.match(rf"error: another process has connected to localhost:{port} .* as rank 1", line)
