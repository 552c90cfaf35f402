"""8-bit inputs of linear layers (Q8BERT): symmetric, by a moving average of the largest magnitude.

x becomes clamp(round(x * S), -127, 127) / S with S = 127 / EMA(max|x|), in training and evaluation. Notable:

- The average takes one value an update: the maximum over all micro-batches and ranks, exchanged once, after the update.
  So it does not depend on how a batch is shared, all ranks keep the same, and forwards wait for nobody.
- It is debiased as Adam's moments are: with a decay of 0.9999 the first update's value would else count for thousands.
- Before the first update has ended an input's own maximum is taken.
- fairseq's attention hands its projections' weights to a functional, past their modules; an attention that has
  `_set_skip_embed_dim_check` is told to call the modules.
- Gradients pass straight through where x is in range, and are zero where it was clipped.

Source: Zafrir et al. 2019, "Q8BERT: Quantized 8Bit BERT", section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .technique import Weight

if TYPE_CHECKING:
    from .noise import QuantNoise

LEVELS = 127
_SMALLEST, _LARGEST = LEVELS * float(torch.finfo(torch.float32).tiny), float(torch.finfo(torch.float32).max)
"""Ranges whose scale is a normal fp32 number."""


class InputRanges:
    """Quantizes the inputs of modules, and follows their ranges while they train.

    Args:
        decay: of the moving average, an update.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._names: list[str] = []
        self._undo: list[Callable[[], None]] = []
        self._seen = self._total = self._weight = torch.zeros(0)  # [modules] each

    def attach(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Quantize the first argument of these modules, by name, of a model on its device."""
        assert not self._undo, "attached already"
        self._names = list(modules)
        device = next(model.parameters()).device
        self._seen = torch.zeros(len(modules), device=device)
        self._total = torch.zeros(len(modules), device=device, dtype=torch.float64)
        self._weight = torch.zeros_like(self._total)
        self._undo = [_force_modules(model)]
        for index, module in enumerate(modules.values()):
            self._undo.append(module.register_forward_pre_hook(self._hook(index)).remove)

    def detach(self) -> None:
        """Leave the modules as they were before `attach`; the ranges stay."""
        for undo in self._undo:
            undo()
        self._undo = []

    @torch.no_grad()
    def update(self) -> None:
        """Take what the update's forwards have seen into the average, the same on all ranks; called on every rank."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._seen, op=dist.ReduceOp.MAX)
        # A module that was not called, or whose input overflowed, has nothing to say.
        usable = torch.isfinite(self._seen) & (self._seen > 0)
        self._total = torch.where(usable, self._total.lerp(self._seen.double(), 1 - self.decay), self._total)
        self._weight = torch.where(usable, self._weight + (1 - self.decay) * (1 - self._weight), self._weight)
        self._seen = torch.zeros_like(self._seen)

    def ranges(self) -> dict[str, float]:
        """The largest magnitude that codes reach, by module; modules that were never called are left out."""
        found = zip(self._names, self._total.tolist(), self._weight.tolist(), strict=True)
        return {name: total / weight for name, total, weight in found if weight > 0}

    def state_dict(self) -> dict[str, Any]:
        """Names, and the average's sum and weight."""
        return {"names": self._names, "total": self._total.cpu(), "weight": self._weight.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take `state_dict` back, after `attach` to the same modules."""
        assert state["names"] == self._names, "ranges of other modules"
        self._total, self._weight = (state[key].to(self._total.device) for key in ("total", "weight"))

    def _hook(self, index: int) -> Callable[..., tuple[Any, ...]]:
        def quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            largest = args[0].detach().abs().amax().float() if args[0].numel() else self._seen.new_zeros(())
            if module.training:
                self._seen[index] = torch.maximum(self._seen[index], largest)
            weight = self._weight[index]
            return fake_quantize(args[0], torch.where(weight > 0, self._total[index] / weight, largest).float()), *args[
                1:
            ]

        return quantize_input


def fake_quantize(x: Tensor, limit: Tensor) -> Tensor:
    """x as 8-bit codes would give it back: clamp(round(127 x / limit), -127, 127) * limit / 127, in x's dtype.

    Args:
        x: any shape, floating point.
        limit: the magnitude of the largest code, fp32 []; not negative, 0 gives zeros. NaN stays NaN.
    """
    return _FakeQuantize.apply(x, limit)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= limit)
        scale = limit / LEVELS
        codes = (x.float() / torch.where(scale > 0, scale, torch.inf)).round_().clamp_(-LEVELS, LEVELS)
        return codes.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


def linear_modules(model: nn.Module, weights: Sequence[Weight]) -> dict[str, nn.Linear]:
    """The linear layers whose weight is among these, by name.

    Raises:
        ValueError: there are none.
    """
    sites = {id(module) for weight in weights for module, attribute in weight.sites if attribute == "weight"}
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in sites}
    if not found:
        raise ValueError("activations: none of the matched weights is a linear layer's; widen include")
    return found


def activation_ranges(technique: QuantNoise) -> dict[str, float]:
    """The inputs' ranges by module, to keep with the artefact; {} if the technique quantizes no activations."""
    return {} if technique.ranges is None else technique.ranges.ranges()


def attach_activations(model: nn.Module, ranges: Mapping[str, float]) -> list[RemovableHandle]:
    """Quantize the inputs of a plain model's linear layers with fixed ranges, as a technique left them.

    Args:
        model: of the structure that the ranges are of.
        ranges: from `activation_ranges`: largest magnitude by module.

    Returns:
        what takes each of the hooks off again.

    Raises:
        ValueError: a name is no linear layer of the model, or a range no positive fp32 number; nothing is attached.
    """
    modules = dict(model.named_modules())
    for name, limit in ranges.items():
        if not isinstance(modules.get(name), nn.Linear):
            valid = ", ".join(n for n, module in modules.items() if isinstance(module, nn.Linear))
            raise ValueError(f"activations: {name!r} is no linear layer of the model; valid are {valid}")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not _SMALLEST <= limit <= _LARGEST:
            raise ValueError(f"activations: the range of {name} must be a positive fp32 number, is {str(limit)[:40]}")
    if ranges:
        _force_modules(model)
    return [modules[name].register_forward_pre_hook(_fixed(limit)) for name, limit in ranges.items()]


def _fixed(limit: float) -> Callable[..., tuple[Any, ...]]:
    def quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return fake_quantize(args[0], torch.tensor(limit, dtype=torch.float32, device=args[0].device)), *args[1:]

    return quantize_input


def _force_modules(model: nn.Module) -> Callable[[], None]:
    """Make every attention call its projections' modules; returns what undoes it."""
    attentions: list[Any] = [m for m in model.modules() if hasattr(m, "_set_skip_embed_dim_check")]
    changed = [attention for attention in attentions if not attention.skip_embed_dim_check]
    for attention in changed:
        attention._set_skip_embed_dim_check()

    def undo() -> None:
        for attention in changed:
            attention.skip_embed_dim_check = False

    return undo
