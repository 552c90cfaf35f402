"""torchrun's agent of one node, told more of what its workers do: it starts and watches them, and starts them anew.

What torch's own agent leaves open is decided here: what is not worth another start (a user's error; what failed at the
same update as before), which of several ends was the cause, over all nodes; and that a node is lost, which workers that
wait for it would learn after hours.
"""

from __future__ import annotations

import logging
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs, PContext

from . import pulse
from .errors import BAD_INPUT, STOPPED, RunFailed
from .failures import Failure, first_cause, read_all, write_error
from .rendezvous import SILENCE_SECONDS, Meeting, Rendezvous
from .watchdog import Crew

logger = logging.getLogger(f"torch.distributed.{__name__}")  # into torchrun's log

SHUTDOWN_SECONDS = 5
"""How long workers may take to end before they are killed; they end at once unless stuck in the kernel."""
EXIT_SECONDS = 300
"""How long an agent whose workers are done waits for those of other nodes."""
ECHO_SECONDS = SILENCE_SECONDS + 2.0
"""How long a broken connection is not the cause yet: another node may be about to tell, or be found lost."""


def _close(context: PContext | None, death_sig: signal.Signals | None) -> None:
    if context is not None:
        type(context).close(context, death_sig, SHUTDOWN_SECONDS)


class Agent(LocalElasticAgent):
    """Starts this node's workers and watches them.

    Args:
        spec: what torch's agent takes.
        logs: where workers write.
        meeting: the agents of all nodes.
        crew: is told which workers run.
        log_dir: the run's folder of logs.
        say: takes a line for the user.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs: LogsSpecs,
        *,
        meeting: Meeting,
        crew: Crew,
        log_dir: Path,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=EXIT_SECONDS)
        self._meeting, self._crew, self._log_dir, self._say = meeting, crew, log_dir, say
        self._several = meeting.nodes.several
        self._lost = ""
        self._last_end: tuple[str, int] | None = None
        self._looked = 0.0

    @property
    def rendezvous(self) -> Rendezvous:
        """Who else there is."""
        handler = self._rdzv_handler
        assert isinstance(handler, Rendezvous)
        return handler

    @property
    def _nodes(self) -> int:
        """Nodes of this start."""
        return self._worker_group.group_world_size or 1

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self._several and self.rendezvous.is_full():
            most = self._meeting.nodes.most
            self._say(f"the run has all its {most} nodes; this one is a spare, and waits to take the place of one lost")
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        context = self._pcontext
        assert context is not None
        # Torch calls its `close` with a patience of 30 s. A reference to the context itself would keep it, and the logs
        # that it holds open, beyond its workers.
        this = weakref.ref(context)
        context.close = lambda death_sig=None, timeout=0: _close(this(), death_sig)  # type: ignore[method-assign]
        ranks = {worker.local_rank: worker.global_rank for worker in worker_group.workers}
        self._lost = ""
        self._crew.start({ranks[local]: pid for local, pid in pids.items()})
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = self._ended(worker_group)  # before torch ends the others
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            return self._look_around(result)
        if result.state == WorkerState.FAILED:
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            self._crew.end()
            for rank, code in (ended or codes).items():
                self._write_down(rank, code, result.failures[rank].pid)
        return result

    def _ended(self, worker_group: WorkerGroup) -> dict[int, int]:
        """Exit codes of workers that have failed by themselves, by rank."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        codes = {worker.global_rank: handlers[worker.local_rank].proc.poll() for worker in worker_group.workers}
        return {rank: code for rank, code in codes.items() if code}

    def _write_down(self, rank: int, code: int, pid: int) -> None:
        """Say for a worker what it could not say itself; nothing is overwritten."""
        if code < 0:
            name = signal.Signals(-code).name
            why = " (out of memory?)" if -code == signal.SIGKILL else ""
            kind = "ended" if -code == signal.SIGTERM else "killed"
            message = f"worker {rank} (process {pid}) was ended by {name}{why}"
        else:
            kind, message = "exit", f"worker {rank} exited with {code}; see {self._log_dir / f'worker-{rank}.log'}"
        write_error(self._log_dir, rank, kind=kind, message=message)

    def _look_around(self, result: RunResult) -> RunResult:
        """Whether the other nodes are there and well, about once a second."""
        if not self._several or time.monotonic() - self._looked < 1.0:
            return result
        self._looked = time.monotonic()
        if (verdict := self._meeting.verdict()) is not None:
            raise verdict
        if self.rendezvous.missing(self._nodes) <= 0:
            return result
        self._lost = self._name_lost()
        logger.warning("%s", self._lost)
        return RunResult(state=WorkerState.FAILED)

    def _name_lost(self) -> str:
        """Which node is gone, by the last beats of its workers."""
        beats = pulse.read_all(self._log_dir)
        present = self.rendezvous.ranks_present()
        lost = [beat for beat in beats if beat.node not in present and beat.node < self._nodes]
        ranks = ", ".join(str(beat.rank) for beat in lost)
        hosts = ", ".join(dict.fromkeys(beat.host for beat in lost)) or "a node"
        workers = f" (worker {ranks})" if ranks else ""
        return f"{hosts}{workers} is lost: no sign of life for {SILENCE_SECONDS} s"

    def cause(self, patience: float = ECHO_SECONDS) -> RunFailed:
        """Why the workers of this start ended, as one line; waits a little for the other nodes to tell theirs.

        Args:
            patience: seconds to wait while there is only the echo of another worker's end.
        """
        failure = self._first_cause(patience)
        if self._lost and (failure is None or failure.kind in ("peer", "ended")):
            return RunFailed(self._lost, STOPPED)  # nobody's mistake
        if failure is None:
            return RunFailed(f"workers ended without a word; see {self._log_dir}", BAD_INPUT)
        return failure.as_error(several=self._several)

    def _first_cause(self, patience: float) -> Failure | None:
        deadline = time.monotonic() + (patience if self._several else 0)
        while True:
            failure = first_cause(read_all(self._log_dir, self.rendezvous.round))
            echo = failure is None or failure.kind in ("peer", "ended")
            if not echo or self._lost or time.monotonic() > deadline:
                return failure
            if self._several and self.rendezvous.missing(self._nodes) > 0:
                self._lost = self._name_lost()
            time.sleep(0.1)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._crew.end()
        if worker_group.state == WorkerState.HEALTHY:
            # Another node whose worker has failed may be back for the next start before ours have noticed.
            failure = first_cause(read_all(self._log_dir, self.rendezvous.round))
            why = "a node joins or leaves" if failure is None else str(failure.as_error(several=self._several))
            self._say(f"{why}: all workers start anew")
        else:
            super()._stop_workers(worker_group)
            self._refuse_in_vain(self._first_cause(ECHO_SECONDS))
            number = worker_group.spec.max_restarts - self._remaining_restarts
            error = self.cause(0.0)
            self._say(f"{error}; starts anew ({number} of {worker_group.spec.max_restarts})")
        super()._restart_workers(worker_group)

    def _refuse_in_vain(self, failure: Failure | None) -> None:
        """Raise RunFailed instead of another start that would end as the last one."""
        if self._crew.stopping:
            raise self.cause(0.0)
        if failure is None or self._lost:
            return
        if failure.kind == "user":
            raise failure.as_error(several=self._several)
        beat = pulse.read(pulse.path_of(self._log_dir, failure.rank))
        end = (failure.kind, 0 if beat is None else beat.update)
        if end == self._last_end:
            error = failure.as_error(several=self._several)
            raise RunFailed(f"{error}; as in the start before, after update {end[1]}", error.code)
        self._last_end = end
