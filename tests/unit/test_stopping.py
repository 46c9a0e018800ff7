"""Stopping on a signal: what a block may say about it."""

from __future__ import annotations

import os
import signal

import pytest

from specvlm_cli.stopping import NotBegunError, end_if_asked, is_asked, listening, until_listening


def ask(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_only_asks_but_where_a_block_is_to_end_at_once() -> None:
    with until_listening(), listening() as stop:
        with stop.at_once():
            pass
        ask()
        assert stop.reason == "SIGTERM"
        with pytest.raises(NotBegunError), stop.at_once():  # asked before it began
            raise AssertionError
        with pytest.raises(NotBegunError):
            end_if_asked()
    assert not is_asked()
    end_if_asked()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_block_at_once(number: signal.Signals) -> None:
    with until_listening(), listening() as stop:
        with pytest.raises(NotBegunError, match=number.name), stop.at_once():
            ask(number)
        assert stop.reason == number.name
        with pytest.raises(KeyboardInterrupt):
            ask(number)
