"""What the link benchmarks train: the tensors of a real Transformer, a backward pass that replays given gradients.

Two cores cannot compute for eight machines. So the backward pass sleeps for as long as the computation would take,
layer by layer, and hands out gradients made before: DDP, its buckets and its hook see what they would see there.

- Tensors, their names, their order and their sharing are those of fairseq's Transformer (`transformer_wmt_en_de`:
  60M parameters, one table of 32,000 subwords for encoder, decoder and output).
- The table's gradient is ready last, as in the real model: the encoder's share of it comes at the end of backward.
- A layer's gradients are ready at a fixed moment of the clock, whatever the hook does meanwhile, as on a GPU.
- Gradients have heavy tails: Student's t with 3 degrees of freedom, every tensor scaled differently. A share of their
  energy (`signal`) is the same on all ranks, the rest is a rank's own, as in mini-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POOL = 1 << 22
FORWARD_SHARE = 1 / 3
"""Of the time of forward and backward pass together."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A Transformer by its sizes."""

    vocabulary: int
    dim: int
    ffn: int
    layers: int
    """Of the encoder, and of the decoder."""

    def attention(self, name: str) -> list[tuple[str, tuple[int, ...]]]:
        parts = []
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            parts += [(f"{name}.{projection}.weight", (self.dim, self.dim)), (f"{name}.{projection}.bias", (self.dim,))]
        return [*parts, *self.norm(f"{name}_layer_norm")]

    def norm(self, name: str) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"{name}.weight", (self.dim,)), (f"{name}.bias", (self.dim,))]

    def layer(self, name: str, *, crossed: bool) -> list[tuple[str, tuple[int, ...]]]:
        parts = self.attention(f"{name}.self_attn")
        if crossed:
            parts += self.attention(f"{name}.encoder_attn")
        parts += [(f"{name}.fc1.weight", (self.ffn, self.dim)), (f"{name}.fc1.bias", (self.ffn,))]
        parts += [(f"{name}.fc2.weight", (self.dim, self.ffn)), (f"{name}.fc2.bias", (self.dim,))]
        return [*parts, *self.norm(f"{name}.final_layer_norm")]

    def groups(self) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Names and shapes of all tensors, by the step of the forward pass that uses them first."""
        found = [[("encoder.embed_tokens.weight", (self.vocabulary, self.dim))]]
        found += [self.layer(f"encoder.layers.{i}", crossed=False) for i in range(self.layers)]
        found += [self.layer(f"decoder.layers.{i}", crossed=True) for i in range(self.layers)]
        return found

    def numels(self) -> list[int]:
        """Elements of each of these groups."""
        return [sum(math.prod(shape) for _, shape in group) for group in self.groups()]

    def ready(self) -> list[float]:
        """When each group's gradients are ready, as a share of the time of forward and backward pass."""
        numels = self.numels()
        # Backward begins with the output's product, as large as the table; the embedding itself takes no time.
        shares, done = [], float(numels[0])
        for numel in reversed(numels[1:]):
            done += numel
            shares.append(done / sum(numels))
        return [FORWARD_SHARE + (1 - FORWARD_SHARE) * share for share in (1.0, *reversed(shares))]


MODELS = {
    "base": Shapes(vocabulary=32_000, dim=512, ffn=2048, layers=6),
    "small": Shapes(vocabulary=4_000, dim=128, ffn=512, layers=2),
}
"""Transformer-base, 60.5M parameters; the small Transformer of `recipes/scratch.yaml`, 1.4M."""


class Replay(nn.Module):
    """The model: all tensors, and a loss whose gradients are the given ones.

    Args:
        shapes: the Transformer's sizes.
        rank: whose gradients these are.
        signal: share of the gradients' energy that all ranks have in common.
        seed: of the gradients.
    """

    def __init__(self, shapes: Shapes, rank: int, *, signal: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.rank, self.signal, self.seed = rank, signal, seed
        self.groups: list[list[nn.Parameter]] = []
        for group in shapes.groups():
            self.groups.append([_put(self, name, nn.Parameter(torch.zeros(shape))) for name, shape in group])
        self.order = [parameter for group in self.groups for parameter in group]
        self._ready = shapes.ready()
        self._pool = self.pool(rank)
        self.compute = 0.0
        """Seconds of the forward and backward pass together."""
        self.hand_out = True
        """Hand gradients to autograd; False: they are in `.grad` already, only say that they are ready."""
        self._begun = 0.0

    def pool(self, rank: int) -> Tensor:
        """Values that a rank's gradients are cut from [POOL]."""

        def heavy(key: int) -> Tensor:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + key)
            normal = torch.randn(4, POOL, generator=generator)
            return normal[0] / (normal[1:].square().mean(dim=0)).sqrt() / 3**0.5

        own = heavy(rank + 1)
        return own if self.signal == 0 else self.signal**0.5 * heavy(0) + (1 - self.signal) ** 0.5 * own

    def cut(self, index: int, pool: Tensor, numel: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The gradient of tensor `index`, in pieces (where, values), before its scale; `numel`: no more."""
        size = self.order[index].numel()
        if numel is not None:
            size = min(size, numel)
        at, offset = 0, index * 65_537 % POOL
        while at < size:
            take = min(size - at, POOL - offset)
            yield at, pool[offset : offset + take]
            at, offset = at + take, 0

    def scale(self, index: int) -> float:
        """Size of the gradient of tensor `index`: over two orders of magnitude, as in a real model."""
        return 1e-4 * 10 ** (index * 7 % 11 / 5)

    @torch.no_grad()
    def fill(self, index: int, target: Tensor) -> Tensor:
        """Writes this rank's gradient of tensor `index`."""
        flat, factor = target.view(-1), self.scale(index)
        for at, values in self.cut(index, self._pool):
            torch.mul(values, factor, out=flat[at : at + values.numel()])
        return target

    def refill(self) -> None:
        """Writes this rank's gradients into the `.grad` of all parameters, which DDP keeps in its buckets."""
        for index, parameter in enumerate(self.order):
            assert parameter.grad is not None
            self.fill(index, parameter.grad)

    def begin(self) -> None:
        """Starts the clock of the next forward and backward pass."""
        self._begun = time.perf_counter()

    def wait_for(self, share: float) -> None:
        """Sleeps until so much of the computation would be done."""
        left = self._begun + share * self.compute - time.perf_counter()
        if self.compute and left > 0:
            time.sleep(left)

    def forward(self) -> Tensor:
        """A loss [] whose gradients are the given ones."""
        x = torch.zeros((), requires_grad=True)
        for index, group in enumerate(self.groups):
            x = _Layer.apply(x, self, index, *group)
        self.wait_for(FORWARD_SHARE)
        return x

    def gradients_of(self, layer: int) -> list[Tensor | None]:
        """What backward returns for a layer, when it would be ready."""
        self.wait_for(self._ready[layer])
        first = sum(len(group) for group in self.groups[:layer])
        group = self.groups[layer]
        if not self.hand_out:
            return [None] * len(group)
        return [self.fill(first + i, torch.empty_like(parameter)) for i, parameter in enumerate(group)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, model: Replay, layer: int, *parameters: Tensor) -> Tensor:
        ctx.model, ctx.layer = model, layer
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None, *ctx.model.gradients_of(ctx.layer)


def _put(module: nn.Module, path: str, parameter: nn.Parameter) -> nn.Parameter:
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in dict(module.named_children()):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.register_parameter(leaf, parameter)
    return parameter
