"""Quant-Noise with scalar schemes: an update sees a random fraction p of the weights quantized, the rest exact.

p = 1 is quantization-aware training, and attached and baked at once it is post-training quantization. Notable:

- Gradients pass straight through, to quantized and exact weights alike. Modules read exactly what the file will decode
  to.
- Fan et al. draw anew at each forward. Here a mask is drawn once an update, by (seed, update, tensor), for all ranks
  and micro-batches: how many of them share an update's batch then changes nothing, a gradient is that of one model, and
  a resumed run draws what an unbroken one does.
- Evaluation (`module.training` False) quantizes everything.
- What modules read is computed once an update (`readers.py`).

Source: Fan et al. 2021, "Training with Quantization Noise for Extreme Model Compression".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tenko.comm.laq import EPSILON

from .activations import InputRanges, linear_modules
from .config import QuantizeConfig, QuantNoiseConfig
from .readers import Reader, StraightThrough
from .scalar import Linear, Quantizer, decode
from .technique import Packed, Weight, expect_fp32, parametrize_weight, select_weights, unparametrize_weight
from .ternary import Lat, Twn, TwoMeans


def make_quantizer(config: QuantizeConfig) -> Quantizer:
    """The quantizer of a recipe's scheme, granularity and clip.

    Raises:
        ValueError: the scheme is product quantization, which has techniques of its own.
    """
    match config.scheme:
        case "int8" | "int4":
            return Linear(int(config.scheme[3:]), config.granularity, config.clip)
        case "ternary":
            return Twn(config.granularity)
        case "lat":
            return Lat(config.granularity)
        case "binary":
            return TwoMeans(config.granularity)
        case _:
            raise ValueError(f"scheme: {config.scheme} is for PqNoise, PostTrainingPq and Ipq, not for QuantNoise")


def select_noisy(model: nn.Module, config: QuantizeConfig) -> list[Weight]:
    """The weights that the recipe's scalar scheme is for, in the model's order; reads no values.

    Raises:
        ValueError: a pattern matches no weight, one is not fp32, the block does not divide a weight's columns, or
            activations are to be quantized and none of the matched weights is a linear layer's.
    """
    selected = select_weights(model, config.include, config.exclude)
    expect_fp32(selected)
    if isinstance(config, QuantNoiseConfig):
        for weight in selected:
            columns = weight.tensor[0].numel()
            if columns % config.block_size:
                raise ValueError(
                    f"block_size: must divide the columns of every weight, is {config.block_size}; "
                    f"{weight.name} has {columns}"
                )
        if config.activations:
            linear_modules(model, selected)
    return selected


class QuantNoise:
    """The technique of `QuantNoiseConfig`, and with p = 1 that of `QuantizeConfig`.

    Args:
        config: a `QuantizeConfig` quantizes all matched weights.
        seed: of the masks; the same on all ranks.

    Raises:
        ValueError: the scheme is product quantization.
    """

    def __init__(self, config: QuantizeConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.name: str = config.scheme
        noise = config if isinstance(config, QuantNoiseConfig) else QuantNoiseConfig(p=1.0)
        self.p, self.block_size = noise.p, noise.block_size
        self.quantizer = make_quantizer(config)
        self.ranges = InputRanges(noise.ema_decay) if noise.activations else None
        self._optimizer: Optimizer | None = None
        self._moments: dict[str, Tensor] = {}
        """Second moments by name, as a checkpoint has them, until the next update."""
        self._update = 0
        self._attached: list[Weight] = []
        self._readers: list[NoisyWeight] = []
        self._packed: dict[str, Packed] = {}

    def attach(self, model: nn.Module) -> None:
        """Parametrize the matched weights, of a model on its device.

        Raises:
            ValueError: see `select_noisy`.
        """
        assert not self._attached, "attached already"
        selected = select_noisy(model, self.config)
        if self.ranges is not None:
            self.ranges.attach(model, linear_modules(model, selected))
        self._attached = selected
        for position, weight in enumerate(selected):
            self._readers.append(NoisyWeight(self, weight, position))
            parametrize_weight(weight, self._readers[-1])

    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Take the second moments that a loss-aware scheme weights errors with from this optimizer, once it has any.

        Raises:
            ValueError: the scheme needs them, and this optimizer does not keep all of them on every rank.
        """
        if not self.quantizer.uses_importance:
            return
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise ValueError(
                f"scheme: {self.name} needs Adam's second moments of all weights on every rank, and a parameter server "
                "shards them; take another comm.route, or scheme: ternary"
            )
        self._optimizer = optimizer

    def before_update(self, update: int) -> None:
        """A new mask for all weights, drawn when they are read."""
        self._update = update
        self._forget()

    def after_update(self, update: int) -> None:
        """Take the new weights and the inputs' ranges in."""
        self._moments = {}
        self._forget()
        if self.ranges is not None:
            self.ranges.update()

    @torch.no_grad()
    def bake(self, model: nn.Module) -> None:
        """Leave dense dequantized weights, and inputs as they were.

        Raises:
            ValueError: a weight holds an inf or a NaN, which no scale covers; the model stays attached.
        """
        assert self._attached, "bake follows attach"
        for weight in self._attached:
            if not bool(torch.isfinite(weight.tensor).all()):
                raise ValueError(f"{weight.name}: holds inf or NaN and can't be quantized")
        self._forget()
        for weight in self._attached:
            packed = self.quantizer.quantize(weight.tensor, self._importance(weight))
            unparametrize_weight(weight)
            weight.tensor.copy_(decode(packed))
            self._packed |= dict.fromkeys(weight.names, packed)
        if self.ranges is not None:
            self.ranges.detach()
        self._attached, self._readers, self._optimizer = [], [], None

    def pack(self, name: str) -> Packed | None:
        """See `Technique.pack`."""
        assert not self._attached, "pack follows bake"
        return self._packed.get(name)

    def state_dict(self) -> dict[str, Any]:
        """The inputs' ranges, and the moments that the weights are read with; masks follow from the update's number."""
        state: dict[str, Any] = {} if self.ranges is None else {"ranges": self.ranges.state_dict()}
        if self.quantizer.uses_importance:
            moments = {weight.name: self._moment(weight) for weight in self._attached}
            state["moments"] = {name: moment.clone() for name, moment in moments.items() if moment is not None}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Technique.load_state_dict`."""
        if self.ranges is not None and "ranges" in state:
            self.ranges.load_state_dict(state["ranges"])
        self._moments = state.get("moments", {})
        self._forget()

    @torch.no_grad()
    def read(self, stored: Tensor, weight: Weight, position: int, *, noisy: bool) -> Tensor:
        """What modules read of a weight: quantized, but for what the update's mask leaves exact if `noisy`."""
        value = decode(self.quantizer.quantize(stored, self._importance(weight))).to(stored.dtype)
        if not noisy:
            return value
        seed = np.random.SeedSequence((self.seed, self._update, position)).generate_state(1)
        generator = torch.Generator(stored.device).manual_seed(int(seed[0]))
        draws = torch.rand(stored.numel() // self.block_size, generator=generator, device=stored.device)
        exact = (draws >= self.p).unsqueeze(1)  # [blocks, 1]
        return torch.where(exact, stored.reshape(-1, self.block_size), value.reshape(-1, self.block_size)).view_as(
            stored
        )

    def _importance(self, weight: Weight) -> Tensor | None:
        """sqrt(v) of Adam's second moment v, as LAQ weights errors; None before the first update."""
        moment = self._moment(weight)
        return None if moment is None else moment.sqrt().add_(EPSILON)

    def _moment(self, weight: Weight) -> Tensor | None:
        if weight.name in self._moments:
            return self._moments[weight.name].to(weight.tensor.device)
        state = {} if self._optimizer is None else self._optimizer.state.get(weight.tensor, {})
        return state.get("exp_avg_sq")

    def _forget(self) -> None:
        for reader in self._readers:
            reader.forget()


class NoisyWeight(Reader):
    """Gives what modules read of one weight, gradients straight through."""

    def __init__(self, technique: QuantNoise, weight: Weight, position: int) -> None:
        super().__init__()
        self._source = (technique, weight, position)  # in a tuple: its parameter must not be registered here too

    def read(self, stored: Tensor) -> Tensor:
        technique, weight, position = self._source
        return technique.read(stored, weight, position, noisy=self.training and technique.p < 1)

    def forward(self, stored: Tensor) -> Tensor:
        return StraightThrough.apply(stored, self.cached(stored))
