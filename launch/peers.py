"""The watchdog of workers that no agent of ours has started: under mpirun, srun, and a torchrun of the user's own.

Every worker watches those of its node, itself included, one a little later than the other: whoever hangs, somebody is
left to say so and to kill it. That ends the others, too, by their launcher.
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

from . import pulse
from .job import Job
from .watchdog import DUMP, Crew, Watchdog

LATER_SECONDS = 3.0
"""How much later than a worker its next on the node acts."""


class PeersWatchdog(Watchdog):
    """Watches the workers of this node from one of them; a context manager.

    Args:
        job: has met the others, whose pulses are there.
        log_dir: the run's folder of logs.
        hang_timeout: seconds; 0 watches nothing.
    """

    def __init__(self, job: Job, log_dir: Path, hang_timeout: float) -> None:
        world, crew = job.world, Crew()
        beats = [beat for beat in pulse.read_all(log_dir) if beat.rank < world.size and beat.node == world.node]
        crew.start({beat.rank: beat.pid for beat in beats})
        timeout = hang_timeout and hang_timeout + LATER_SECONDS * world.local_rank
        super().__init__(crew, log_dir, timeout, several=world.nodes > 1)
        self._log = open(log_dir / f"worker-{world.rank}.log", "w", encoding="utf-8")  # noqa: SIM115
        faulthandler.register(DUMP, file=self._log, all_threads=True)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        faulthandler.unregister(DUMP)
        self._log.close()

    def _report(self, rank: int, kind: str, message: str) -> None:
        print(f"tenko: error: {message}", file=sys.stderr, flush=True)
