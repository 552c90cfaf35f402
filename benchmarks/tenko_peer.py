"""tenko under the gate of `training.py`: the stage `train` of a recipe, as a worker of `tenko run` calls it.

    python tenko_peer.py prepare RECIPE.yaml BATCHES.npz COUNT    prepare the corpus, write the first batches' sentences
    python tenko_peer.py train RECIPE.yaml RUN_DIR                train, commands on stdin (RANK and WORLD_SIZE if two)

Nothing of the loop is replaced; four of its calls are timed where they stand.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gate import Gate, facts
from torch.utils.flop_counter import FlopCounterMode

from tenko.launch.progress import Reporter
from tenko.launch.recipe import load
from tenko.launch.rundir import RunDirectory
from tenko.launch.stages import RUNNERS
from tenko.nmt.batches import MicroBatches, UpdateStream
from tenko.nmt.fairseq_bridge import ModelWithLoss
from tenko.nmt.prepare import prepare
from tenko.nmt.trainer import Trainer


def write_batches(recipe_path: Path, out: Path, count: int) -> None:
    """Prepare the recipe's corpus, and write sentence numbers of its first `count` batches to an .npz file.

    With n ranks, rank r takes batches r, r + n, r + 2n ... of them, in tenko and in fairseq.
    """
    recipe = load(str(recipe_path))
    config: Any = recipe.stages[0].config
    corpus = prepare(recipe.data, report=lambda line: None)
    stream = UpdateStream(
        corpus.split("train"),
        recipe.direction,
        seed=recipe.seed,
        max_tokens=config.max_tokens,
        update_freq=1,
        rank=0,
        world=1,
    )
    batches = [stream.update(update).samples[0]["id"].numpy() for update in range(1, count + 1)]
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    np.savez(out, sentences=np.concatenate(batches), starts=starts)
    print(json.dumps({"corpus": str(corpus.path), "pairs": len(corpus.split("train"))}))


def train(recipe_path: Path, run_dir: Path) -> None:
    """Run the stage with its loop under a gate; ends the process."""
    trainer: Trainer | None = None

    def flops(updates: int) -> dict[str, float]:
        """Operations of the matrix products of the last so many updates, a target token.

        Counted forward and trebled: backward multiplies for the gradients of both factors of every product.
        """
        assert trainer is not None
        total = tokens = 0
        for number in range(trainer.updates - updates + 1, trainer.updates + 1):
            for sample in trainer.stream.update(number).samples:
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    trainer.wrapped(sample)
                total += 3 * counter.get_total_flops()
                tokens += sample["ntokens"]
        return {"flops_per_token": total / tokens}

    def at_end() -> dict[str, Any]:
        assert trainer is not None
        meter = trainer.route.meter if trainer.route else None
        wire = None if meter is None else {"sent": meter.bytes_sent, "fp32": meter.fp32_bytes}
        return {**facts(trainer.model), "precision": trainer.precision, "wire": wire}

    gate = Gate({"flops": flops}, at_end)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with gate.timed(part):
                return function(*args, **kwargs)

        return call

    real_update, real_batches, real_forward = Trainer.update, UpdateStream.update, ModelWithLoss.forward

    def update(self: Trainer) -> None:
        nonlocal trainer
        trainer = self
        gate.pass_through()
        real_update(self)

    def batches(self: UpdateStream, update: int) -> MicroBatches:
        with gate.timed("data"):
            work = real_batches(self, update)
        gate.tokens += sum(sample["ntokens"] for sample in work.samples)
        return work

    def forward(self: ModelWithLoss, sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with gate.timed("forward"):
            loss, nll = real_forward(self, sample)
        gate.loss += loss.item()
        return loss, nll

    Trainer.update, UpdateStream.update = update, batches  # type: ignore[method-assign]
    Trainer._step = timed("optimizer", Trainer._step)  # type: ignore[method-assign]
    ModelWithLoss.forward = forward  # type: ignore[method-assign]
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]

    rank = int(os.environ.get("RANK", "0"))
    run = RunDirectory(run_dir, load(str(recipe_path)))
    with Reporter(enabled=rank == 0) as reporter:
        RUNNERS["train"](run.context(0, reporter, writer=rank == 0, resume=False))


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        write_batches(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        train(Path(sys.argv[2]), Path(sys.argv[3]))
