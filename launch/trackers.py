"""Where figures go beside metrics.jsonl: TensorBoard and Weights & Biases, by accelerate's trackers.

A tracker never ends a training: one that fails, for want of a network or a key, is warned about once and left. A run
that resumes goes on in the same curves: TensorBoard is told which of its points come again; W&B gets its run's id, kept
in the folder of the training, and the lines that it has not got, since it buffers them and a kill loses some.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenko.nmt.config import TrainConfig

from .errors import one_line
from .files import write_text_atomic
from .metrics import read_metrics
from .recipe import to_dict
from .rundir import METRICS

if TYPE_CHECKING:
    from .rundir import StageContext

TENSORBOARD, WANDB, WANDB_ID = "tensorboard", "wandb", "wandb-id"
PATIENCE = 30.0
"""Seconds that W&B may take to begin, and to send the rest at the end."""
_EXTRAS = {TENSORBOARD: "trackers", WANDB: "wandb"}

logger = logging.getLogger(__name__)


def check(config: TrainConfig) -> None:
    """Raise ValueError for a tracker that is not installed, before anything is trained."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise ValueError(f"train.trackers: {name} is not installed; pip install tenko[{_EXTRAS[name]}]")


class Trackers:
    """The trackers of one training; made on rank 0 only.

    Args:
        context: the stage.
        config: names them.
        folder: of the training; gets `tensorboard/`, and `wandb/` with `wandb-id`.
        title: of the training.
        update: finished before; a run that resumes writes what came after it again.
    """

    def __init__(self, context: StageContext, config: TrainConfig, folder: Path, title: str, update: int) -> None:
        self._trackers: dict[str, Any] = {}
        for name in config.trackers:
            make = _tensorboard if name == TENSORBOARD else _wandb
            tracker = self._guard(name, lambda make=make: make(context, folder, title, update))  # type: ignore[misc]
            if tracker is not None:
                self._trackers[name] = tracker

    def log(self, figures: dict[str, Any]) -> None:
        """Pass on the numbers of one line of metrics, as KIND/NAME at its update."""
        values = _values(figures)
        for name, tracker in [*self._trackers.items()]:
            self._guard(name, lambda tracker=tracker: tracker.log(values, step=figures["update"]))  # type: ignore[misc]

    def close(self) -> None:
        """Send what is left and let go."""
        for name, tracker in [*self._trackers.items()]:
            self._guard(name, tracker.finish)
        self._trackers = {}

    def _guard(self, name: str, call: Callable[[], Any]) -> Any:
        """What `call` gives; None, and no more of this tracker, when it fails."""
        try:
            return call()
        except Exception as error:  # whatever a tracker or its server comes up with
            self._trackers.pop(name, None)
            reason = f"{type(error).__name__}: {one_line(error)}"
            logger.warning("tracker %s failed and is left out from here on: %s", name, reason)
            return None


def _values(figures: dict[str, Any]) -> dict[str, float]:
    return {f"{figures['kind']}/{key}": v for key, v in figures.items() if isinstance(v, int | float)}


def _tensorboard(context: StageContext, folder: Path, title: str, update: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Of points written twice, by the run that was cut and the one that resumed, the first is not to be shown.
    tracker = TensorBoardTracker(TENSORBOARD, folder, purge_step=update + 1)
    tracker.start()
    return tracker


def _wandb(context: StageContext, folder: Path, title: str, update: int) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to W&B's makers, and each try without a network waits
    import wandb
    from accelerate.tracking import WandBTracker

    kept = folder / WANDB_ID
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(kept, secrets.token_hex(4))
    tracker = WandBTracker(
        context.recipe.name,
        id=kept.read_text(encoding="utf-8").strip(),
        resume="allow",
        name=f"{context.run_dir.name} {title}",
        group=context.run_dir.name,
        config=to_dict(context.recipe),
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off", init_timeout=PATIENCE, finish_timeout=PATIENCE),
    )
    tracker.start()
    run = tracker.run
    where = f"offline; `wandb sync` sends {Path(run.dir).parent}" if run.offline else run.url
    context.reporter.log(f"{title}: W&B run {run.id}, {where}")
    for figures in read_metrics(folder / METRICS):
        if run.step <= figures["update"] <= update:  # offline it knows of no earlier step, and gets the whole again
            tracker.log(_values(figures), step=figures["update"])
    return tracker
