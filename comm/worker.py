"""One thread that does the exchanges of a route, one bucket after the other.

gloo's collectives block, and callbacks of futures run on gloo's own threads: two of them with collectives
inside would wait for each other. So the hook hands a bucket over and returns; everything between the ranks
happens here, in the order of the buckets, which is the same on every rank.

It is a daemon thread, not an executor's: an executor is joined when the interpreter ends, and a rank that
failed while its peer waits for it must be able to end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_Job = tuple[Callable[[], Tensor], "torch.futures.Future[Tensor]"]


class Worker:
    """Runs jobs in order and completes their futures, with the exception if there was one."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Tensor]) -> torch.futures.Future[Tensor]:
        """Queues a job; the future holds its result or raises what it raised. After a failure all later jobs fail."""
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        # An exception set on a future of Python reaches C++, where DDP waits, as a value. Only one that a
        # callback raised is an error there. This callback does nothing else, least of all a collective.
        result = done.then(lambda finished: finished.value())
        self._jobs.put((job, done))
        return result

    def close(self, timeout: float = 5.0) -> None:
        """Lets the queued jobs finish, for `timeout` seconds at most."""
        self._jobs.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            try:
                if self._failure is not None:
                    raise RuntimeError(f"an earlier exchange failed: {self._failure}") from self._failure
                with torch.no_grad():
                    result = job()
            except BaseException as error:  # whatever it is, the rank must not wait for ever
                if self._failure is None:
                    self._failure = error
                    logger.error("exchange of gradients failed: %s", error)
                done.set_exception(error)  # type: ignore[arg-type]
            else:
                done.set_result(result)
            del item, job, done
