"""The one training loop: lottery tickets, quantization noise, distillation and every route run through it unchanged.

What is notable: the loss is divided by the global number of target tokens before the backward pass (every rank knows
that number from the batch plan), so gradients are normalised on the wire already and no second pass over them is
needed; a step with a non-finite gradient is skipped on the device, by the fused optimizer, without waiting for it; and
an update is a pure function of weights, optimizer state and its number, which makes a resumed run bit-exact.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tenko.compression.technique import Technique, UsesMoments

from . import checkpoint, distributed, precision
from .batches import UpdateStream, to_device
from .config import TrainConfig
from .fairseq_bridge import ModelWithLoss
from .schedule import learning_rate
from .validate import Validation

if TYPE_CHECKING:
    from tenko.comm import Route

    from .deepspeed_engine import ZeroEngine

logger = logging.getLogger(__name__)


@dataclass
class Best:
    """The best validation so far, and how long ago it was."""

    bleu: float = -1.0
    update: int = 0
    since: int = 0
    """Validations without a better BLEU."""
    nll: float = math.inf
    """Breaks ties, for instance while BLEU is still 0."""


class Trainer:
    """Trains one model on this rank.

    Args:
        model: the fairseq model, on its device, techniques attached.
        stream: this rank's batches.
        config: the recipe's settings.
        seed: of dropout.
        wrap: puts `ModelWithLoss` into DDP and gives the route it registered, whose state is saved and whose meter is
            logged; a single process keeps the module, without a route.
        engine: puts `ModelWithLoss` and the optimizer into DeepSpeed, in the place of `wrap`; it is given the
            resolved precision as well.
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
        wrap: Callable[[nn.Module], tuple[nn.Module, Route | None]] = lambda m: (m, None),
        engine: Callable[[nn.Module, torch.optim.Optimizer, str], ZeroEngine] | None = None,
        techniques: Sequence[Technique] = (),
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.stream, self.config, self.seed = model, stream, config, seed
        self.checkpoints, self.techniques = checkpoints, techniques
        self.device = next(model.parameters()).device
        self.precision = precision.resolve(config.precision, self.device)
        self.scaler = precision.loss_scaler(
            self.precision, self.device, init_scale=config.init_scale, scale_window=config.scale_window
        )
        module = ModelWithLoss(model, config.label_smoothing, teacher=teacher, distill=config.distill).to(self.device)
        self.wrapped, self.route = (module, None) if engine else wrap(module)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        settings: dict[str, Any] = {
            "lr": config.lr,
            "betas": config.adam_betas,
            "eps": config.adam_eps,
            "weight_decay": config.weight_decay,
        }
        self.optimizer: torch.optim.Optimizer
        if self.route is not None:  # a parameter server's owners step their shards
            self.optimizer = self.route.optimizer(self.parameters.items(), **settings)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters.values(), fused=True, **settings)
        for technique in techniques:
            if isinstance(technique, UsesMoments):
                technique.use_optimizer(self.optimizer)
        self.engine = None
        if engine is not None:
            self.engine = engine(module, self.optimizer, self.precision)
            self.wrapped = self.engine.wrapped
        self.updates = 0
        self.stopped = False
        """Whether `should_stop` has ended the last `run`."""
        self.best = Best()
        self.seconds = 0.0
        """Time spent in updates, validations and checkpoints left out; survives a resume."""
        self._reset_figures()

    # One update

    def update(self) -> None:
        """Forward and backward for each micro-batch, then one optimizer step."""
        number = self.updates + 1
        work = self.stream.update(number)
        # Dropout depends on (seed, update, rank) only: nothing of torch's generator needs saving.
        torch.manual_seed(int(np.random.SeedSequence((self.seed, number, self.stream.rank)).generate_state(1)[0]))
        for technique in self.techniques:
            technique.before_update(self.updates)
        self.wrapped.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.updates)
        normaliser = self.stream.world / work.target_tokens  # DDP averages over ranks: undo its 1/world
        for i, sample in enumerate(work.samples):
            last = i == len(work.samples) - 1
            with self._synchronise_if(last):
                sample = to_device(sample, self.device)
                with precision.autocast(self.precision, self.device):
                    loss, nll = self.wrapped(sample)
                if self.engine is not None:
                    self.engine.backward(loss * normaliser, last=last)
                else:
                    self.scaler.scale(loss * normaliser).backward()
            self._loss += loss.detach()
            self._nll += nll.detach()
        self._step()
        for technique in self.techniques:
            technique.after_update(self.updates)
        self.updates = number
        self._tokens += work.target_tokens

    def _synchronise_if(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(self.wrapped, "no_sync", None)
        if last or no_sync is None or self.engine is not None:
            return contextlib.nullcontext()
        return no_sync()

    def _step(self) -> None:
        if self.engine is not None:
            self._norm, overflow = self.engine.step()
            self._overflows += overflow
            return
        self.scaler.unscale_(self.optimizer)
        if self.route is not None:
            norm = self.route.total_norm(self.parameters.values())
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.config.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.clip_norm, norm)
        overflow = (~torch.isfinite(norm)).float()
        if not self.scaler.is_enabled():
            # The fused optimizer leaves weights and moments alone when this is 1: a skipped step without a wait. (A
            # server's optimizer looks at it.)
            self.optimizer.found_inf = overflow  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._overflows += overflow
        self._norm = norm

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
        config = self.config
        self.model.train()
        if self.updates == 0 and 0 in config.keep_updates:
            self.save()
        while self.updates < config.max_update and not self.stopped_early:
            on_phase("update")
            started = time.perf_counter()
            self.update()
            last = self.updates == config.max_update
            on_update(self.updates)
            if self.updates % config.log_interval == 0 or last:
                figures = self._figures(started)
                on_metrics(figures)
            else:
                self.seconds += time.perf_counter() - started
            if self.updates % config.valid_interval == 0 or last:
                on_phase("validate")
                on_metrics(self._validate(validate))
            self.stopped = not last and should_stop(self.updates)
            due = self.updates % config.save_interval == 0 or self.updates in config.keep_updates
            if due or last or self.stopped_early or self.stopped:
                on_phase("save")
                self.save()
            if self.stopped:
                return

    @property
    def stopped_early(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.config.patience <= self.best.since

    def _reset_figures(self) -> None:
        self._loss = torch.zeros((), device=self.device)
        self._nll = torch.zeros((), device=self.device)
        self._overflows = torch.zeros((), device=self.device)
        self._norm = torch.zeros((), device=self.device)
        self._tokens = 0
        self._seconds_before = self.seconds

    def _figures(self, started: float) -> dict[str, Any]:
        """The figures since the last call: here, and only here, the loop waits for the device."""
        loss, nll = distributed.sum_over_ranks([self._loss.item(), self._nll.item()], self.device)
        self.seconds += time.perf_counter() - started
        tokens = max(self._tokens, 1)
        nll /= tokens
        overflows = int(self._overflows.item())
        figures: dict[str, Any] = {
            "kind": "train",
            "update": self.updates,
            "epoch": round(self.stream.epoch(self.updates), 3),
            "loss": loss / tokens,
            "nll": nll,
            "ppl": math.exp(min(nll, 100)) if math.isfinite(nll) else math.inf,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": self._norm.item(),
            "tokens_per_second": self._tokens / max(self.seconds - self._seconds_before, 1e-9),
            "seconds": self.seconds,
        }
        if overflows:
            figures["overflows"] = overflows
        if self.scaler.is_enabled():
            figures["scale"] = self.scaler.get_scale()
            if figures["scale"] < self.config.min_loss_scale:
                raise ValueError(
                    f"train.min_loss_scale: the loss scale fell to {figures['scale']:g} at update {self.updates}, "
                    f"below {self.config.min_loss_scale:g}: gradients overflow again and again; lower train.lr or use "
                    "precision: bf16 or fp32"
                )
        elif overflows >= 10 or (overflows and overflows == self.config.log_interval > 1):
            raise ValueError(
                f"train.lr: training diverged, {overflows} of the last {self.config.log_interval} updates to "
                f"{self.updates} had a non-finite gradient; lower train.lr, or set train.clip_norm"
            )
        if self.route is not None:
            figures["wire_bytes"] = self.route.meter.bytes_sent
            figures["wire_fp32_bytes"] = self.route.meter.fp32_bytes
        self._reset_figures()
        return figures

    def _validate(self, validate: Callable[[], Validation]) -> dict[str, Any]:
        distributed.assert_ranks_agree(self.parameters.values(), f"weights after update {self.updates}", self.device)
        self.wrapped.eval()
        result = validate()
        self.wrapped.train()
        since = 0 if result.bleu > self.best.bleu else self.best.since + 1
        if (result.bleu, -result.nll) > (self.best.bleu, -self.best.nll):
            self.best = Best(result.bleu, self.updates, since, result.nll)
            checkpoint.save(
                self.checkpoints / "best",
                model_state=self.parameters,
                state={"update": self.updates, "bleu": result.bleu},
                rank=distributed.rank(),
                barrier=distributed.barrier,
            )
        else:
            self.best.since = since
        return {
            "kind": "valid",
            "update": self.updates,
            "nll": result.nll,
            "ppl": math.exp(min(result.nll, 100)),
            "bleu": result.bleu,
            "best_bleu": self.best.bleu,
            "bleu_signature": result.signature,
            "seconds": self.seconds,
        }

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint of this update, and delete what is older than `keep_last`; called on every rank."""
        checkpoint.save(
            checkpoint.path_of(self.checkpoints, self.updates),
            model_state=self.parameters,
            state={
                "update": self.updates,
                "world": self.stream.world,
                "optimizer": None if self.engine else self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best": [self.best.bleu, self.best.update, self.best.since, self.best.nll],
                "seconds": self.seconds,
                "techniques": [technique.state_dict() for technique in self.techniques],
            },
            rank_state={
                "route": None if self.route is None else self.route.state_dict(),
                "engine": None if self.engine is None else self.engine.state_dict(),
                "figures": [self._loss, self._nll, self._overflows, self._tokens, self._seconds_before],
            },
            rank=distributed.rank(),
            barrier=distributed.barrier,
        )
        if distributed.rank() == 0:
            checkpoint.prune(self.checkpoints, self.config.keep_last, keep=self.config.keep_updates)

    def resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            ValueError: it is damaged, or of another model; the message names the file.
        """
        updates = checkpoint.list_updates(self.checkpoints)
        if not updates:
            return False
        self.load(checkpoint.path_of(self.checkpoints, updates[-1]))
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
        """Take weights, counters and all other state of a checkpoint; `only_weights` leaves optimizer, route
        and techniques as they are.

        Raises:
            ValueError: it is damaged, or of another model; the message names the file.
        """
        weights, state, rank_state = checkpoint.load(folder, rank=distributed.rank())
        load_weights(self.parameters, weights, folder)
        self.updates, self.seconds = state["update"], state["seconds"]
        self.best = Best(*state["best"])
        self._reset_figures()
        self.scaler.load_state_dict(state["scaler"])
        if only_weights:
            return
        if self.engine is not None:
            self.engine.load_state_dict((rank_state or {}).get("engine"))
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        for technique, kept in zip(self.techniques, state.get("techniques", []), strict=False):
            technique.load_state_dict(kept)
        if state["world"] != self.stream.world:
            logger.warning(
                "%s was saved by %d ranks, now %d: goes on, but not as it would have",
                folder,
                state["world"],
                self.stream.world,
            )
            return
        if rank_state is None:
            raise ValueError(f"{folder}: has no state of rank {distributed.rank()}")
        sums = rank_state["figures"]
        self._loss, self._nll, self._overflows = (s.to(self.device) for s in sums[:3])
        self._tokens, self._seconds_before = sums[3:]
        if self.route is not None and rank_state["route"] is not None:
            self.route.load_state_dict(rank_state["route"])


def load_weights(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], source: Path) -> None:
    """Copy weights into parameters of the same names and shapes.

    Raises:
        ValueError: names or shapes differ; the message names the first.
    """
    for name in sorted(parameters.keys() ^ weights.keys()):
        raise ValueError(f"{source}: holds another model ({name} is {'missing' if name in parameters else 'unknown'})")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"{source}: holds another model ({name} is {list(weights[name].shape)}, "
                    f"expected {list(parameter.shape)})"
                )
            parameter.copy_(weights[name])
