"""Signals that are remembered."""

import signal

from megalite.training.signals import Stop, StopSignals

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def test_signals_are_remembered_and_former_handlers_come_back():
    before = {number: signal.getsignal(number) for number in CAUGHT}
    with StopSignals() as signals:
        signals.catch(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1 and signals.is_time_warning
        signals.catch(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        assert signals.received == signal.SIGUSR1
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.raise_signal(number)
            assert signals.received == number and not signals.is_time_warning
    assert {number: signal.getsignal(number) for number in CAUGHT} == before


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.catch(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_are_not_caught_keep_their_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(enabled=False) as signals:
        signals.catch(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before


def test_all_ranks_stop_and_only_warnings_of_time_ask_for_a_requeue():
    signals = StopSignals()
    assert signals.stop({"signalled": 0.0, "time_warnings": 0.0}) is None
    other = "a signal to another rank"
    assert signals.stop({"signalled": 2.0, "time_warnings": 2.0}) == Stop(other, requeue=True)
    signals.received = signal.SIGHUP
    assert signals.stop({"signalled": 2.0, "time_warnings": 1.0}) == Stop("SIGHUP")
