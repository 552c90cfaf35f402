"""The thread that runs exchanges: many in flight, nothing on the caller's thread, and a failure reaches everybody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from tenko.comm.exchanger import ThreadExchanger
from tenko.comm.link import Exchange


class Signal:
    """A handle that the test completes."""

    def __init__(self) -> None:
        self.received: dict[int, torch.Tensor] = {}
        self._calls: list[Callable[[], None]] = []
        self._done = False
        self.error: Exception | None = None

    def then(self, call: Callable[[], None]) -> None:
        if self._done:
            call()
        else:
            self._calls.append(call)

    def wait(self) -> None:
        raise AssertionError("the thread never blocks on one exchange")

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def complete(self) -> None:
        self._done = True
        for call in self._calls:
            call()


def test_an_exchange_that_waits_lets_others_go_on() -> None:
    exchanger = ThreadExchanger()
    slow, log = Signal(), []
    names: set[str] = set()

    def waiting() -> Exchange:
        log.append("first begins")
        yield slow
        log.append("first ends")

    def quick() -> Exchange:
        names.add(threading.current_thread().name)
        log.append("second")
        return
        yield

    first = exchanger.submit([waiting()], lambda: torch.tensor(1))
    second = exchanger.submit([quick(), quick()], lambda: torch.tensor(2))
    assert int(second.wait()) == 2
    assert log == ["first begins", "second", "second"]
    assert not first.done()
    slow.complete()
    assert int(first.wait()) == 1
    assert log[-1] == "first ends"
    assert names == {"tenko-exchange"}
    exchanger.close()


def test_a_failure_reaches_its_future_and_all_later_ones() -> None:
    exchanger = ThreadExchanger()
    signal = Signal()

    def broken() -> Exchange:
        yield signal
        raise AssertionError("not resumed: check raises before")

    future = exchanger.submit([broken()], lambda: torch.tensor(1))
    signal.error = ConnectionError("the wire is cut")
    signal.complete()
    with pytest.raises(Exception, match="the wire is cut"):
        future.wait()
    with pytest.raises(Exception, match="an earlier exchange failed: the wire is cut"):
        exchanger.submit([], lambda: torch.tensor(1)).wait()
    exchanger.close()


def test_an_exchange_that_waits_too_long_fails() -> None:
    exchanger = ThreadExchanger(timeout=0.2)

    def waiting() -> Exchange:
        yield Signal()

    began = time.monotonic()
    with pytest.raises(Exception, match="waited too long"):
        exchanger.submit([waiting()], lambda: torch.tensor(1)).wait()
    assert time.monotonic() - began < 5
    exchanger.close()


def test_an_exchange_may_wait_for_as_long_as_the_timeout_says_and_closing_waits_for_it() -> None:
    exchanger, signal = ThreadExchanger(timeout=30.0), Signal()

    def waiting() -> Exchange:
        yield signal

    future = exchanger.submit([waiting()], lambda: torch.tensor(1))
    time.sleep(1.3)  # it looks once a second who is overdue; the machine has been up for longer than the timeout
    threading.Timer(0.2, signal.complete).start()
    exchanger.close()
    assert future.done()
    assert int(future.wait()) == 1
