"""An interrupt that is deferred comes after the block, once, and nowhere else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from intaglio.passes.interrupts import deferred


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where tests run in the background and it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_block_is_finished_before_it_is_interrupted() -> None:
    done = []

    def work() -> None:
        with deferred():
            press()
            press()
            done.append("block")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_block_that_nobody_interrupts_goes_on() -> None:
    with deferred():
        pass
    with pytest.raises(KeyboardInterrupt):
        press()


def test_blocks_in_blocks_wait_for_the_outermost() -> None:
    done = []

    def work() -> None:
        with deferred():
            with deferred():
                press()
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]


def test_an_error_inside_is_not_lost() -> None:
    def work() -> None:
        with deferred():
            press()
            raise ValueError("inside")

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred():
        press()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_threads_are_never_interrupted_and_change_no_handler() -> None:
    found = []

    def work() -> None:
        with deferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
