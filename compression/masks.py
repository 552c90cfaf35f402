"""Masks: which weights survive pruning (`pruning.py` makes them), and the technique that keeps the others at zero.

What is notable: a tied weight is one tensor with one mask. Pruned weights are zeroed in the stored parameter, and their
gradients by hooks on the leaf, so that the wire, the norm and Adam see zeros; no parametrization is involved, and
quantization may be attached on top. Rank 0's masks are everybody's, and checked to be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .technique import Packed, Weight, select_weights, weights

_BITS, _SHAPE = ".bits", ".shape"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Masks(Mapping[str, Tensor]):
    """Bool tensors by the name of a weight, on the CPU: True where it survives.

    Args:
        masks: bool, or numbers that are 0 or 1, in the shape of the weight.

    Raises:
        ValueError: a value is neither 0 nor 1; names the weight.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
                raise ValueError(f"{name}: a mask holds 0 and 1 only")
            self._masks[name] = mask.detach().to("cpu", torch.bool).clone()

    @classmethod
    def ones(cls, of: Sequence[Weight]) -> Masks:
        """Masks under which everything survives."""
        return cls({weight.name: torch.ones(weight.tensor.shape, dtype=torch.bool) for weight in of})

    @classmethod
    def of_zeros(cls, model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Masks:
        """The masks that a pruned model shows: exact zeros are pruned.

        A weight without a zero is left out, and so is a row of zeros in an embedding (fairseq's padding) as the only
        zeros of its weight. Without any zeros the masks are empty.

        Args:
            model: plain and dense, as read from an artefact.
            include, exclude: see `select_weights`, which says what is raised.
        """
        found = {}
        for weight in select_weights(model, include, exclude):
            mask = weight.tensor.detach() != 0
            rows = {m.padding_idx for m, _ in weight.sites if isinstance(m, nn.Embedding) and m.padding_idx is not None}
            others = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
            others[list(rows)] = False
            if not bool(mask[others].all()):
                found[weight.name] = mask
        return cls(found)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(mask, other[name]) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """Prunable weights, pruned or not."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def counts(self) -> dict[str, int]:
        """Surviving weights of each tensor."""
        return {name: int(mask.sum()) for name, mask in self._masks.items()}

    @property
    def remaining(self) -> int:
        """Surviving weights."""
        return sum(self.counts.values())

    @property
    def fraction_remaining(self) -> float:
        """Surviving weights of the prunable ones, 1 where there are none."""
        return self.remaining / self.total if self.total else 1.0

    def is_within(self, other: Masks) -> bool:
        """Whether whatever survives here survives in `other` (nested masks), over the same tensors."""
        return self.keys() == other.keys() and not any(bool((mask & ~other[name]).any()) for name, mask in self.items())

    def digest(self) -> str:
        """SHA-256 of names, shapes and masks."""
        sha = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            sha.update(f"{name} {list(value.shape)}\n".encode())
            sha.update(value.view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def state_dict(self) -> dict[str, Tensor]:
        """Bit-packed: NAME.bits, uint8 [ceil(numel / 8)], the first weight in the lowest bit, and NAME.shape, int64."""
        state = {}
        for name, mask in self.items():
            state[name + _BITS] = _pack_bits(mask)
            state[name + _SHAPE] = torch.tensor(mask.shape, dtype=torch.int64)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Masks:
        """What `state_dict` gave.

        Raises:
            ValueError: a shape is missing, or disagrees with the bits; names the weight.
        """
        names = [key.removesuffix(_BITS) for key in state if key.endswith(_BITS)]
        masks = {}
        for name in names:
            shape = state.get(name + _SHAPE)
            if shape is None:
                raise ValueError(f"{name}: a mask without {_SHAPE}")
            numel = int(shape.prod())
            if state[name + _BITS].numel() != -(-numel // 8):
                raise ValueError(f"{name}: {state[name + _BITS].numel()} bytes of mask don't fit {shape.tolist()}")
            masks[name] = _unpack_bits(state[name + _BITS], numel).reshape(shape.tolist())
        return cls(masks)


def share(masks: Masks | None, like: Masks, device: torch.device | str = "cpu") -> Masks:
    """Rank 0's masks on every rank, checked to be the same; without torch.distributed, `masks`.

    Args:
        masks: rank 0's; what other ranks give is not looked at.
        like: masks of the same names and shapes, for the other ranks.
        device: where the process group exchanges tensors.

    Raises:
        RuntimeError: the ranks disagree after all.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        assert masks is not None, "rank 0 has masks"
        return masks
    first = dist.get_rank() == 0
    assert not first or (masks is not None and masks.keys() == like.keys()), "rank 0 has masks of the same names"
    shared = {}
    for name, mask in like.items():
        bits = _pack_bits(masks[name] if first and masks is not None else mask).to(device)
        dist.broadcast(bits, 0)
        shared[name] = _unpack_bits(bits, mask.numel()).reshape(mask.shape)
    result = Masks(shared)
    check_ranks_agree(result, device)
    return result


def check_ranks_agree(masks: Masks, device: torch.device | str = "cpu") -> None:
    """Raise RuntimeError, on every rank, unless all ranks hold the same masks."""
    if not dist.is_available() or not dist.is_initialized():
        return
    mine = torch.tensor(list(bytes.fromhex(masks.digest())), dtype=torch.uint8, device=device)
    all_digests = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_digests, mine)
    if any(not torch.equal(other, mine) for other in all_digests):
        short = ", ".join(f"rank {r}: {bytes(d.tolist()).hex()[:12]}" for r, d in enumerate(all_digests))
        raise RuntimeError(f"masks differ between ranks ({short})")


class PrunedWeights:
    """The technique that keeps pruned weights at exactly zero, whatever the optimizer does.

    Attach it before what parametrizes the same weights (quantization noise), and bake it after. A route that sends one
    bit an element knows no zero: the moments of pruned weights are then noise, their weights zero all the same.

    Args:
        masks: of weights of the model, by the first of their names.
    """

    name = "pruned"

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self._pruned: list[tuple[str, nn.Parameter, Tensor]] = []  # name, stored weight, -1 where it is kept, else 0
        self._hooks: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Zero the pruned weights and their gradients from now on.

        Raises:
            ValueError: the model has no weight of a mask's name and shape.
        """
        assert not self._pruned, "attached already"
        known = {weight.name: weight.tensor for weight in weights(model)}
        for name, mask in self.masks.items():
            if name not in known or known[name].shape != mask.shape:
                has = list(known[name].shape) if name in known else "none"
                raise ValueError(f"{name}: the mask has shape {list(mask.shape)}, the model's weight {has}")
        for name, mask in self.masks.items():
            kept = -mask.to(known[name].device, torch.int8)
            self._pruned.append((name, known[name], kept))
            self._hooks.append(
                known[name].register_hook(lambda grad, kept=kept: (_bits_of(grad) & kept).view(grad.dtype))
            )
        self.zero()

    @torch.no_grad()
    def zero(self) -> None:
        """Zero the pruned weights."""
        for _, weight, kept in self._pruned:
            _bits_of(weight).bitwise_and_(kept)

    def before_update(self, update: int) -> None:
        """Nothing: the masks stay."""

    def after_update(self, update: int) -> None:
        """Zero again what momentum, weight decay or a route may have revived."""
        self.zero()

    def bake(self, model: nn.Module) -> None:
        """Take the hooks off; the weights are plain, the pruned ones exactly zero."""
        for name, weight, kept in self._pruned:
            assert not bool(weight.detach()[kept == 0].any()), f"{name}: a pruned weight is not zero"
        self.detach()

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._pruned = [], []

    def pack(self, name: str) -> Packed | None:
        """None: the file itself stores zeros as a bitmask where that is smaller."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The masks' digest, by which a resumed run sees that its masks are those of the checkpoint."""
        return {"masks": self.masks.digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint was trained under these masks, and zero what it loaded.

        Raises:
            ValueError: it was trained under others.
        """
        if state.get("masks") != self.masks.digest():
            raise ValueError("the checkpoint was trained under other masks; delete it to begin anew")
        self.zero()


def _bits_of(values: Tensor) -> Tensor:
    """Floating-point values as integers over the same memory. And-ing them with a mask leaves +0 even of an inf or NaN,
    and is a twentieth of the time of `masked_fill` on a CPU."""
    return values.view(_INTEGERS[values.element_size()])


def _pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().reshape(-1).numpy(), bitorder="little"))


def _unpack_bits(bits: Tensor, numel: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=numel, bitorder="little")).to(torch.bool)
