"""What every compression technique looks like, and how its patterns find weights.

A technique is four moments and one answer: `attach`, `before_update`, `after_update`, `bake`, and `pack`.
Weights are reached with `torch.nn.utils.parametrize`, never with hooks or `weight.data`: fairseq's attention hands
`q_proj.weight` straight to a functional, so a module's hooks never fire there, while a parametrized attribute is
computed wherever it is read. Tied weights are one tensor with several sites; all its sites are parametrized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

NAMES_SHOWN = 6


@dataclass(frozen=True)
class Packed:
    """A tensor as it is stored: the scheme's name and its parts by suffix, for instance codes and scale."""

    scheme: str
    parts: Mapping[str, Tensor]


@runtime_checkable
class Technique(Protocol):
    """A way to make a model thinner, at its four moments.

    1. `attach` before training: parametrizes the weights it matches. The stored (trainable) weights stay bit-identical;
       only what modules read changes. Matching no weight is a ValueError.
    2. `before_update`, each update before its first micro-batch: what must be fixed for the whole update (a noise mask,
       a threshold), so that accumulation over micro-batches sees one model.
    3. `after_update`, each update after the optimizer's step: what follows the new weights (a schedule, a new mask).
    4. `bake` after training: parametrizations go, and the weights are left plain and dense, under their old names, tied
       where they were tied, with exactly the values that the stored file decodes to.

    After `bake`, `pack` says how a tensor is stored. `state_dict` is what a resumed run needs beside weights and the
    update's number, equal on all ranks.
    """

    name: str
    """The technique's name, written into the artefact."""

    def attach(self, model: nn.Module) -> None:
        """Parametrize the weights this technique matches; ValueError if a pattern matches none."""
        ...

    def before_update(self, update: int) -> None:
        """Called before the first micro-batch of update number `update`, counted from 0."""
        ...

    def after_update(self, update: int) -> None:
        """Called after the optimizer's step of update number `update`."""
        ...

    def bake(self, model: nn.Module) -> None:
        """Replace the attached model's parametrizations by plain dense weights, in place."""
        ...

    def pack(self, name: str) -> Packed | None:
        """The packed form of the baked tensor of this name (any of its names if tied), None to store it dense."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors that a checkpoint keeps; {} when weights say it all."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, after `attach`."""
        ...


@runtime_checkable
class UsesMoments(Protocol):
    """A technique that reads Adam's moments; it is given the optimizer once, before the first update."""

    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Keep the optimizer, to look up `optimizer.state[parameter]["exp_avg_sq"]` by the stored parameter."""
        ...


@dataclass(frozen=True)
class Weight:
    """One weight of a model: its tensor, every name it goes by, and every (module, attribute) that holds it."""

    tensor: nn.Parameter
    names: tuple[str, ...]
    sites: tuple[tuple[nn.Module, str], ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The name `named_parameters` gives it: the first."""
        return self.names[0]


def weights(model: nn.Module) -> list[Weight]:
    """Every parameter of two or more dimensions and an element, in order; a tied one once, with all names and sites."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert ".parametrizations." not in f".{name}", f"{name} is parametrized already; bake before attaching anew"
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    sites: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, held in module.named_parameters(recurse=False, remove_duplicate=False):
            sites.setdefault(id(held), []).append((module, attribute))
    return [
        Weight(tensor, tuple(names[key]), tuple(sites[key]))
        for key, tensor in tensors.items()
        if tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel() > 0
    ]


def select_weights(model: nn.Module, include: Sequence[str], exclude: Sequence[str] = ()) -> list[Weight]:
    """The weights whose name matches a pattern of `include` and none of `exclude`.

    Args:
        model: not parametrized yet.
        include, exclude: shell patterns (`*`, `?`, `[ab]`), matched with case against the full parameter name. A tied
            weight is matched by any of its names, and excluded by any of its names.

    Raises:
        ValueError: a pattern, in either list, matches no weight of two or more dimensions, or `exclude` leaves none.
    """
    found = weights(model)
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(name_matches(weight, (pattern,)) for weight in found):
                raise ValueError(f"{key}: {pattern!r} matches no weight; valid names are {some_names(found)}")
    selected = [w for w in found if name_matches(w, include) and not name_matches(w, exclude)]
    if not selected:
        raise ValueError(f"exclude: {list(exclude)} leaves none of what include {list(include)} matches")
    return selected


def expect_fp32(selected: Sequence[Weight]) -> None:
    """Raise ValueError unless weights are stored in fp32, as the file's codes and scales are made from."""
    for weight in selected:
        if weight.tensor.dtype != torch.float32:
            raise ValueError(
                f"{weight.name}: is {weight.tensor.dtype}; keep weights in fp32, and compute under torch.autocast"
            )


def parametrize_weight(weight: Weight, parametrization: nn.Module) -> None:
    """Register the parametrization at every site of the weight; the stored parameter stays the same, and tied."""
    for module, attribute in weight.sites:
        parametrize.register_parametrization(module, attribute, parametrization)


def unparametrize_weight(weight: Weight) -> None:
    """Take the parametrization off at every site; the stored parameter comes back under its old name, untouched.

    Inside a module it then stands last: match optimizer state by name across `attach` and `bake`, not by position.
    """
    for module, attribute in weight.sites:
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        assert getattr(module, attribute) is weight.tensor, f"{weight.name} was replaced while it was parametrized"


def name_matches(weight: Weight, patterns: Iterable[str]) -> bool:
    """Whether one of the shell patterns matches one of the weight's names."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in weight.names)


def some_names(found: Sequence[Weight]) -> str:
    """The names of the first few weights, for a message."""
    if not found:
        return "none: the model has no weight of two or more dimensions"
    rest = len(found) - NAMES_SHOWN
    return ", ".join(w.name for w in found[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
