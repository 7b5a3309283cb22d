"""Signals that are remembered."""

import signal

from megalite.training.signals import StopSignals


def test_inner_ones_begin_with_what_outer_ones_have_received_and_give_the_signals_back():
    before = {number: signal.getsignal(number) for number in StopSignals.CAUGHT}
    outer = StopSignals(caught=[signal.SIGUSR1])
    signal.raise_signal(signal.SIGUSR1)
    inner = StopSignals()
    assert inner.received == signal.SIGUSR1 and inner.warned
    signal.raise_signal(signal.SIGTERM)
    assert inner.received == signal.SIGTERM and not inner.warned and outer.warned
    inner.uninstall()
    outer.received = None
    signal.raise_signal(signal.SIGUSR1)
    assert outer.warned and inner.received == signal.SIGTERM
    outer.uninstall()
    assert {number: signal.getsignal(number) for number in StopSignals.CAUGHT} == before
