"""How ranks find each other: rank 0 or torchrun serves a key-value store that all connect to.

A rank that waits says what for. What cannot succeed (a host name that does not resolve, a port in
use) is an error at once; what may still come is waited for until the timeout.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from megalite.parallel.activity import first_ranks
from megalite.parallel.launch import LaunchInfo
from megalite.system.background import in_background

FIRST_NOTICE_SECONDS = 5.0
"""A rank that has waited so long, or a quarter of the timeout, says what it waits for."""
NOTICE_FACTOR = 3
"""It says so again when it has waited this many times as long."""
CONNECT_SECONDS = 5.0
"""Limit of one attempt to connect."""
POLL_SECONDS = 0.5
"""Longest pause between two attempts."""
RANKS_SHOWN = 16
"""Missing ranks that a message lists."""


class RendezvousError(ConnectionError):
    """Ranks did not meet. The message names the address, where it comes from, and likely causes."""


def meet(launch: LaunchInfo, timeout: timedelta) -> Any:
    """Return torch's store that all ranks share, once every rank has connected to it. Collective.

    Its keys are this start's own (`launch.incarnation`). Ranks that wait say so on stderr: rank 0,
    rank 1 and the first rank of each node.

    Raises RendezvousError when the host name does not resolve, rank 0 cannot serve the store at
    this address, another process has the same rank, or a rank is missing after `timeout`.
    """
    if launch.init_method.startswith("tcp://"):
        store = _Rendezvous(launch, timeout).store()
    else:
        rank, world = launch.rank, launch.world_size
        store, _, _ = next(dist.rendezvous(launch.init_method, rank, world, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(launch.incarnation, store)


class _Rendezvous:
    """One rank's way to the others, at tcp://host:port."""

    def __init__(self, launch: LaunchInfo, timeout: timedelta):
        self._launch = launch
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout.total_seconds()
        self._address = launch.init_method.removeprefix("tcp://")
        self._host, _, port = self._address.rpartition(":")
        self._port = int(port)
        self._named = f"{self._address} (from {launch.address_source})"
        self._limit = f"{timeout.total_seconds():g} s (--distributed-timeout-minutes)"
        self._machine = os.uname().nodename

    def store(self) -> dist.TCPStore:
        """Resolve the address, serve or reach the store there, and wait for all ranks."""
        try:
            socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RendezvousError(
                f"the host name {self._host!r} does not resolve on {self._machine}: {reason}. "
                f"It comes from {self._launch.address_source}; "
                "set MASTER_ADDR to an address of rank 0's machine"
            ) from None
        if self._launch.rank == 0 and self._launch.hosts_store:
            store = self._serve()
        else:
            store = self._connect()
        try:
            self._wait_for_all(store)
        except RuntimeError:  # of torch's store
            raise RendezvousError(
                f"the store at {self._named} was lost before all ranks had connected: "
                "see what rank 0 says"
            ) from None
        return store

    def _serve(self) -> dist.TCPStore:
        try:
            store = self._open_store("127.0.0.1", self._timeout, is_master=True)
        except RuntimeError as error:
            reason = re.search(r"message: (.*)|$", str(error))[1] or str(error).splitlines()[0]
            if "EADDRINUSE" in str(error):
                reason += (
                    " by another job, or by a process that an earlier one left; set MASTER_PORT"
                )
            raise RendezvousError(
                f"rank 0 cannot listen at {self._named} on {self._machine}: {reason}"
            ) from None
        # It listens on every address of this machine: if this one fails, it is another machine's.
        if reason := self._connection_error():
            raise RendezvousError(
                f"rank 0 runs on {self._machine}, but is not reached at {self._named}: {reason}. "
                "Likely causes: an address of another machine, or a firewall"
            )
        return store

    def _open_store(self, host: str, timeout: timedelta, is_master: bool = False) -> dist.TCPStore:
        size = self._launch.world_size
        return dist.TCPStore(
            host, self._port, size, is_master, timeout=timeout, wait_for_workers=False
        )

    def _connection_error(self) -> str:
        """Why a connection to the address fails; "" when it does not."""
        left = max(1.0, self._deadline - time.monotonic())
        address = (self._host, self._port)
        try:
            socket.create_connection(address, timeout=min(CONNECT_SECONDS, left)).close()
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return ""

    def _connect(self) -> dist.TCPStore:
        # Until something listens there: torch's own attempts would not say what they wait for.
        if reason := self._wait(self._connection_error):
            raise RendezvousError(
                f"rank 0 was not reached at {self._named} within {self._limit}: {reason}. Likely "
                "causes: rank 0 did not start, the address is not its machine's, or a firewall"
            )

        # In a thread, since torch waits without limit for a program that accepts and says nothing.
        # Its timeout is longer than ours: at its own it prints C++ stacks.
        patience = 2 * self._timeout + timedelta(minutes=1)
        store = in_background("rendezvous", partial(self._open_store, self._host, patience))
        problem = "what listens there does not answer as torch's store does"
        if self._wait(lambda: "" if store.done() and not store.exception() else problem):
            raise RendezvousError(
                f"rank 0 was not reached at {self._named} within {self._limit}: {problem}. "
                "Likely cause: another program uses this port"
            )
        return store.result()

    def _wait_for_all(self, store: dist.TCPStore) -> None:
        """Tell the others that this rank is here; return when all are."""
        launch = self._launch
        keys = dist.PrefixStore(f"rendezvous/{launch.incarnation}", store)
        # torchrun gives every job a port and every rank its number, but keeps keys over restarts.
        if keys.add(f"rank/{launch.rank}", 1) > 1 and launch.hosts_store:
            raise RendezvousError(
                f"another process has connected to {self._named} as rank {launch.rank}: "
                "two jobs use this address, or two processes were started with one rank"
            )
        if launch.rank:
            problem = "other ranks are missing, see rank 0"
            if self._wait(lambda: "" if keys.check(["complete"]) else problem):
                raise RendezvousError(
                    f"not all ranks connected to {self._named} within {self._limit}: "
                    "see what rank 0 says"
                )
            return

        missing = list(range(launch.world_size))

        def still_missing() -> str:
            missing[:] = [rank for rank in missing if not keys.check([f"rank/{rank}"])]
            shown = first_ranks(missing, RANKS_SHOWN)
            return missing and f"{len(missing)} of {launch.world_size} ranks are missing: {shown}"

        if problem := self._wait(still_missing):
            raise RendezvousError(
                f"{problem}. They did not connect to {self._named} within {self._limit}. Likely "
                "causes: they did not start, they have another address, or a firewall"
            )
        keys.set("complete", "")

    def _wait(self, problem: Callable[[], str]) -> str:
        """Call `problem` until it returns "" or the time is over; return its last answer.

        Meanwhile print it, at intervals that grow.
        """
        began = time.monotonic()
        notice = min(FIRST_NOTICE_SECONDS, self._timeout.total_seconds() / 4)
        pause = 0.01
        while found := problem():
            now = time.monotonic()
            if now > self._deadline:
                return found
            # A line of every rank would be thousands in a large job.
            speaks = self._launch.local_rank == 0 or self._launch.rank == 1
            if now - began > notice and speaks:
                notice *= NOTICE_FACTOR
                where = "for" if self._launch.rank else "at"
                line = f"rank {self._launch.rank} waits {where} {self._address}: {found}"
                print(line, file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
        return ""
