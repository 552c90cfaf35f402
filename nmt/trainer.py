"""The one training loop: lottery tickets, quantization noise, distillation and every route run through it unchanged.

What is notable: the loss is divided by the global number of target tokens before the backward pass (every rank knows
that number from the batch plan), so gradients are normalised on the wire already and no second pass over them is
needed; and an update is a pure function of weights, optimizer state and its number, which makes a resumed run
bit-exact. Even dropout does not depend on which rank computes a micro-batch, so that other workers can go on with the
same training.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tenko.compression.technique import Technique, UsesMoments

from . import checkpoint, distributed, precision, trainer_state
from .batches import UpdateStream, to_device
from .config import TrainConfig
from .fairseq_bridge import ModelWithLoss, set_dropout
from .figures import Sums, check_overflows, train_line
from .optimization import EngineOf, Optimization, Wrap
from .saver import Content, Saver
from .schedule import learning_rate
from .shares import Shares
from .validate import Best, Validation

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one model on this rank.

    Args:
        model: the fairseq model, on its device, techniques attached.
        stream: this rank's batches.
        config: the recipe's settings.
        seed: of dropout and switchout.
        wrap: see `Optimization`; the route's state is saved, its meter logged.
        engine: see `Optimization`.
        techniques: told before and after each update; their state is saved with the weights.
        teacher: a frozen model on the same device, which `config.distill` learns from.
        checkpoints: folder of the checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: UpdateStream,
        config: TrainConfig,
        *,
        seed: int,
        checkpoints: Path,
        wrap: Wrap = lambda module: (module, None),
        engine: EngineOf | None = None,
        techniques: Sequence[Technique] = (),
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.stream, self.config, self.seed = model, stream, config, seed
        self.checkpoints, self.techniques = checkpoints, techniques
        self.device = next(model.parameters()).device
        if config.dropout is not None:
            set_dropout(model, config.dropout)
        with_loss = ModelWithLoss(
            model, config.label_smoothing, teacher=teacher, distill=config.distill, switchout=config.switchout
        )
        module = with_loss.to(self.device)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        made = self.optimization = Optimization(module, self.parameters, config, wrap=wrap, engine=engine)
        self.wrapped, self.optimizer, self.scaler = made.wrapped, made.optimizer, made.scaler
        self.route, self.dedicated, self.engine = made.route, made.dedicated, made.engine
        self.precision = made.precision
        for technique in techniques:
            if isinstance(technique, UsesMoments):
                technique.use_optimizer(self.optimizer)
        self.updates = 0
        self.stopped = False
        """Whether `should_stop` has ended the last `run`."""
        self.best = Best()
        self.seconds = 0.0
        """Time spent in updates, validations and checkpoints left out; survives a resume."""
        self.shares = Shares(self.device, self.route)
        self._saver: Saver | None = None
        self._skipped = 0
        """Updates skipped in lines of nothing else, up to now."""
        self._reset_figures()

    # One update

    def update(self) -> None:
        """Forward and backward for each micro-batch, then one optimizer step."""
        number = self.updates + 1
        self.shares.begin()
        started = time.perf_counter()
        work = self.stream.update(number)
        self.shares.data_read(started)
        self._seed(number)
        for technique in self.techniques:
            technique.before_update(self.updates)
        self.wrapped.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.updates)
        normaliser = self.stream.world / work.target_tokens  # DDP averages over ranks: undo its 1/world
        for i, sample in enumerate(work.samples):
            last = i == len(work.samples) - 1
            with self.optimization.synchronise_if(last):
                started = time.perf_counter()
                sample = to_device(sample, self.device)
                self.shares.data_read(started)
                self._seed(number, self.stream.rank + i * self.stream.world)
                with precision.autocast(self.precision, self.device):
                    loss, nll = self.wrapped(sample)
                self.optimization.backward(loss * normaliser, last=last)
            self.sums.loss += loss.detach()
            self.sums.nll += nll.detach()
        if self.route is not None:
            self.route.waits.end()
        self.sums.norm, overflow = self.optimization.step()
        self.sums.overflows += overflow
        for technique in self.techniques:
            technique.after_update(self.updates)
        self.updates = number
        self.sums.tokens += work.target_tokens

    def _seed(self, *place: int) -> None:
        """Dropout and switchout depend on seed, update and number of the micro-batch in it: not on ranks, and torch's
        generator needs no saving."""
        torch.manual_seed(int(np.random.SeedSequence((self.seed, *place)).generate_state(1)[0]))

    # The loop

    def run(
        self,
        *,
        validate: Callable[[], Validation],
        on_metrics: Callable[[dict[str, Any]], None] = lambda figures: None,
        on_update: Callable[[int], None] = lambda update: None,
        on_phase: Callable[[str], None] = lambda phase: None,
        should_stop: Callable[[int], bool] = lambda update: False,
    ) -> None:
        """Train to `max_update`, or until BLEU has not risen for `patience` validations.

        Args:
            validate: validation loss and BLEU of the model as it is, the same on all ranks; called on every rank.
            on_metrics: takes a line of figures (a `kind` of train or valid), called on every rank.
            on_update: told the number of each finished update.
            on_phase: told what begins: `update`, `validate` or `save`.
            should_stop: asked after each update but the last, with its number; the same on all ranks. At a yes the
                update is saved and `stopped` is set.
        """
        self.model.train()
        saver = self._begin_saves()
        try:
            if self.updates == 0 and 0 in self.config.keep_updates:
                self._save(final=False)
            self._loop(validate, on_metrics, on_update, on_phase, should_stop)
            saver.close()
        except BaseException:
            saver.abandon()
            raise
        distributed.barrier()  # the others may read the checkpoints that rank 0 has sealed

    def _loop(
        self,
        validate: Callable[[], Validation],
        on_metrics: Callable[[dict[str, Any]], None],
        on_update: Callable[[int], None],
        on_phase: Callable[[str], None],
        should_stop: Callable[[int], bool],
    ) -> None:
        config, saver = self.config, self._begin_saves()
        while self.updates < config.max_update and not self.stopped_early:
            saver.check()
            on_phase("update")
            started = time.perf_counter()
            self.update()
            last = self.updates == config.max_update
            on_update(self.updates)
            logged = self.updates % config.log_interval == 0 or last
            if logged:
                on_metrics(self._figures(started))
            else:
                self.shares.end(logged=False)
                self.seconds += time.perf_counter() - started
            best = False
            if self.updates % config.valid_interval == 0 or last:
                on_phase("validate")
                best = self._validate(validate, on_metrics)
            self.stopped = not last and should_stop(self.updates)
            final = last or self.stopped_early
            due = config.saves_at(self.updates) or final or self.stopped
            if due or best:
                on_phase("save")
                self._save(update=due, best=best, final=final)
            if self.stopped:
                return

    @property
    def stopped_early(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.config.patience <= self.best.since

    def _reset_figures(self) -> None:
        self.sums = Sums.begin(self.device, self.seconds)

    def _figures(self, started: float) -> dict[str, Any]:
        """The figures since the last call: here, and only here, the loop waits for the device."""
        local = [self.sums.loss.item(), self.sums.nll.item()]
        self.shares.end(logged=True)
        loss, nll, data, exchange, all_seconds = distributed.sum_over_ranks([*local, *self.shares.read()], self.device)
        self.seconds += time.perf_counter() - started
        figures: dict[str, Any] = {
            "kind": "train",
            "update": self.updates,
            "epoch": round(self.stream.epoch(self.updates), 3),
            "lr": self.optimizer.param_groups[0]["lr"],
            **train_line(
                self.sums,
                loss=loss,
                nll=nll,
                seconds=self.seconds,
                data=data,
                exchange=exchange,
                all_seconds=all_seconds,
            ),
        }
        overflows = int(self.sums.overflows.item())
        if overflows:
            figures["overflows"] = overflows
        if self.scaler.is_enabled():
            figures["scale"] = self.scaler.get_scale()
        self._skipped = self._skipped + overflows if overflows >= self.config.log_interval else 0
        check_overflows(self.config, self.updates, overflows, figures.get("scale"), row=self._skipped)
        if self.route is not None:
            figures["wire_bytes"] = self.route.meter.bytes_sent
            figures["wire_fp32_bytes"] = self.route.meter.fp32_bytes
        self._reset_figures()
        return figures

    def _validate(self, validate: Callable[[], Validation], on_metrics: Callable[[dict[str, Any]], None]) -> bool:
        """Whether this model is the best so far."""
        if self.dedicated is not None:
            self.dedicated.settle()
        distributed.assert_ranks_agree(self.parameters.values(), f"weights after update {self.updates}", self.device)
        self.wrapped.eval()
        result = validate()
        self.wrapped.train()
        better = self.best.take(result, self.updates, self.config.best_by)
        on_metrics(
            {
                "kind": "valid",
                "update": self.updates,
                "nll": result.nll,
                "ppl": math.exp(min(result.nll, 100)),
                "bleu": result.bleu,
                "best_bleu": self.best.bleu,
                "bleu_signature": result.signature,
                "seconds": self.seconds,
            }
        )
        return better

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint of this update, and wait for it; called on every rank."""
        self._save()
        assert self._saver is not None
        self._saver.close()
        distributed.barrier()

    def _begin_saves(self) -> Saver:
        if self._saver is None:
            self._saver = Saver(self.checkpoints)
        return self._saver

    def _save(self, *, update: bool = True, best: bool = False, final: bool = False) -> None:
        """Save in the background, and then delete what is older than `keep_last`."""
        config, now = self.config, self.updates
        contents: list[Content] = []
        if best:
            figures = {"bleu": self.best.bleu, "nll": self.best.nll}
            state = {"update": now, **figures, **trainer_state.techniques_state(self)}
            contents.append(Content(target=self.checkpoints / "best", model_state=self.parameters, state=state))
        if update:
            contents.append(
                Content(
                    target=checkpoint.path_of(self.checkpoints, now),
                    model_state=self.parameters,
                    state=trainer_state.shared_state(self),
                    rank_state=trainer_state.rank_state(self),
                )
            )

        def prune() -> None:
            checkpoint.prune(
                self.checkpoints,
                config.keep_last,
                config.keep_updates,
                regular=lambda number: config.is_regular(number) or (final and number == now),
            )

        self._begin_saves().save(contents, prune)

    def resume(self) -> bool:
        """Go on from the newest checkpoint that is whole, if there is any; called on every rank, rank 0 looks.

        Raises:
            ValueError: all are damaged, or of another model; the message names the file.
        """
        found = checkpoint.newest_whole(self.checkpoints) if distributed.rank() == 0 else None
        update, damages = distributed.from_rank0(found)
        if update is None and damages:
            raise ValueError(
                f"{damages[0]}; no checkpoint is whole; delete {self.checkpoints} to begin this training anew"
            )
        if update is None:
            return False
        if damages and distributed.rank() == 0:
            logger.warning("%s; set aside, goes on from update %d", "; ".join(damages), update)
            checkpoint.set_aside(self.checkpoints, update)
        trainer_state.restore(self, checkpoint.path_of(self.checkpoints, update), check=False)
        return True

    def rewind(self, folder: Path, *, moments: bool = True) -> None:
        """Go on as if the checkpoint's update had just been made, with nothing validated yet.

        Args:
            folder: a checkpoint of a model with the same parameters, of this run or another.
            moments: take Adam's moments and the route's state along; False starts them at zero.

        Raises:
            ValueError: it is damaged, or of another model; the message names the file.
        """
        self.load(folder, only_weights=not moments)
        self.best, self.seconds = Best(), 0.0
        self._reset_figures()

    def load(self, folder: Path, *, only_weights: bool = False) -> None:
        """Take weights, counters and all other state of a checkpoint; see `trainer_state.restore`."""
        trainer_state.restore(self, folder, only_weights=only_weights)

    def take_counters(self, state: dict[str, Any]) -> None:
        """What `trainer_state.shared_state` says beside optimizer and techniques."""
        self.updates, self.seconds = state["update"], state["seconds"]
        self.best = Best(*state["best"])
        self.scaler.load_state_dict(state["scaler"])
        self._reset_figures()
