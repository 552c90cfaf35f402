"""Who runs the exchanges: one thread on a CPU, many buckets in flight; a stream of its own on a GPU.

On a CPU the hook hands over generators and returns; the thread runs each until it waits for the wire, then goes on
with another: encoding the next bucket while the last one's bytes travel keeps the wire full. What is computed does not
depend on the order, as buckets share nothing.

It is a daemon thread, not an executor's: an executor is joined when the interpreter ends, and a rank that failed while
its peer waits for it must be able to end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import torch

from .link import Exchange, Handle, run

logger = logging.getLogger(__name__)

Done = Callable[[], None]


class Exchanger(Protocol):
    """Runs exchanges."""

    def submit(self, exchanges: Sequence[Exchange], finish: Callable[[], torch.Tensor]) -> torch.futures.Future:
        """Runs exchanges side by side, then calls `finish`, whose value completes the future."""

    def close(self) -> None:
        """Ends it."""


@dataclass
class _Batch:
    """What one call of `submit` handed over."""

    left: int
    finish: Callable[[], torch.Tensor]
    future: torch.futures.Future[torch.Tensor]


@dataclass
class _Job:
    exchange: Exchange
    batch: _Batch
    waiting: Handle | None = None
    since: float = 0.0


class ThreadExchanger:
    """For CPU tensors. After a failure all later exchanges fail with it.

    Args:
        timeout: seconds that an exchange may wait for the wire.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        self._timeout = timeout
        self._events: SimpleQueue[_Job | _Batch | None] = SimpleQueue()
        self._waiting: dict[int, _Job] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tenko-exchange", daemon=True)
        self._thread.start()

    def submit(
        self, exchanges: Sequence[Exchange], finish: Callable[[], torch.Tensor]
    ) -> torch.futures.Future[torch.Tensor]:
        """See `Exchanger`; the future raises what an exchange or `finish` raised."""
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        # An exception set on a future of Python reaches C++, where DDP waits, as a value. Only one that a
        # callback raised is an error there. This callback does nothing else, least of all a collective.
        result = done.then(lambda finished: finished.value())
        batch = _Batch(len(exchanges), finish, done)
        for exchange in exchanges:
            self._events.put(_Job(exchange, batch))
        if not exchanges:
            self._events.put(batch)
        return result

    def close(self, timeout: float = 5.0) -> None:
        """Lets what was handed over finish, for `timeout` seconds at most."""
        self._events.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        closing = False
        while not (closing and not self._waiting and self._events.empty()):
            try:
                event = self._events.get(timeout=min(1.0, self._timeout))
            except Empty:
                self._find_overdue()
                continue
            if event is None:
                closing = True
            elif isinstance(event, _Batch):
                self._finish(event)
            else:
                self._advance(event)

    def _advance(self, job: _Job) -> None:
        self._waiting.pop(id(job), None)
        handle, job.waiting = job.waiting, None
        try:
            if self._failure is not None:
                raise RuntimeError(f"an earlier exchange failed: {self._failure}") from self._failure
            if handle is not None:
                handle.check()
            with torch.no_grad():
                job.waiting = next(job.exchange, None)
        except BaseException as error:  # whatever it is, the rank must not wait for ever
            self._fail(error, job.batch)
            return
        if job.waiting is None:
            job.batch.left -= 1
            if not job.batch.left:
                self._finish(job.batch)
            return
        job.since = time.monotonic()
        self._waiting[id(job)] = job
        job.waiting.then(lambda: self._events.put(job))

    def _finish(self, batch: _Batch) -> None:
        try:
            if self._failure is not None:
                raise RuntimeError(f"an earlier exchange failed: {self._failure}") from self._failure
            with torch.no_grad():
                result = batch.finish()
        except BaseException as error:
            self._fail(error, batch)
        else:
            batch.future.set_result(result)

    def _fail(self, error: BaseException, batch: _Batch) -> None:
        if self._failure is None:
            self._failure = error
            logger.error("exchange between ranks failed: %s", error)
        if not batch.future.done():
            batch.future.set_exception(error)  # type: ignore[arg-type]

    def _find_overdue(self) -> None:
        late = [job for job in self._waiting.values() if time.monotonic() - job.since > self._timeout]
        # One that waits for other exchanges knows no peer: those that do speak first.
        for job in sorted(late, key=lambda job: not hasattr(job.waiting, "overdue")):
            self._waiting.pop(id(job))
            overdue = getattr(job.waiting, "overdue", lambda: "exchange between ranks: waited too long")
            self._fail(ConnectionError(overdue()), job.batch)


class StreamExchanger:
    """For CUDA tensors: in order on a stream of its own, so that backward goes on beside it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def submit(
        self, exchanges: Sequence[Exchange], finish: Callable[[], torch.Tensor]
    ) -> torch.futures.Future[torch.Tensor]:
        """See `Exchanger`; the future is complete when the stream is."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for exchange in exchanges:
                run(exchange)
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[self._device])
            result = finish()
            result.record_stream(self._stream)
            done.set_result(result)
        return done

    def close(self) -> None:
        """Nothing to end."""
