"""The split: which parameter takes which route, by name, size, dimensions, and the sparsity of its first gradient."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from .config import SplitRule


def assign(
    rules: Sequence[SplitRule], shapes: Mapping[str, torch.Size], sparsity: Mapping[str, float] | None = None
) -> dict[str, str]:
    """The route of every parameter.

    Args:
        rules: of the recipe.
        shapes: of every parameter that trains, by name; see `weight_shapes`.
        sparsity: share of the rows of each one's gradient that were zero; None before that is known.

    Returns:
        Routes by name; "" for a parameter that only its gradient's sparsity can decide, while that is not known.

    Raises:
        ValueError: a rule matches no parameter, or a parameter is taken by none or by two of them, at some sparsity if
            that is not known; the message names it.
    """
    routes: dict[str, str] = {}
    used: set[int] = set()
    for name, shape in shapes.items():
        likely = [i for i, rule in enumerate(rules) if _takes(rule, name, shape)]
        used.update(likely)
        if len(shape) < 2:
            possible_shares = [0.0]
        elif sparsity is not None:
            possible_shares = [sparsity.get(name, 0.0)]
        else:
            possible_shares = _changes([rules[i] for i in likely])
        found = {_the_one(rules, likely, name, shape, share).route for share in possible_shares}
        routes[name] = found.pop() if len(found) == 1 else ""
    for i, rule in enumerate(rules):
        if i not in used:
            near = ", ".join(list(shapes)[:3])
            raise ValueError(f"split[{i}]: takes no parameter ({', '.join(rule.match)}); names are like {near}")
    return routes


def possible(rules: Sequence[SplitRule], name: str, shape: torch.Size) -> set[str]:
    """The routes that rules may give a parameter, whatever its sparsity is."""
    return {rule.route for rule in rules if _takes(rule, name, shape)}


def plain_name(name: str) -> str:
    """The name by which rules know a parameter of a DDP model: a parametrized weight goes by that of the plain weight.

    Where a parametrization stores several tensors (`original0`, ...), none is the weight: they keep their names.
    """
    return _PARAMETRIZED.sub(r"\1", name.removeprefix("module."))


_PARAMETRIZED = re.compile(r"\bparametrizations\.([^.]+)\.original$")


def weight_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes that rules go by, of all parameters by `plain_name`: those of the plain model.

    A parametrization that keeps a weight in another shape (a codebook) says the weight's as `weight_shape`.
    """
    shapes = {plain_name(name): parameter.shape for name, parameter in model.named_parameters()}
    for prefix, module in model.named_modules():
        chains = module.parametrizations if parametrize.is_parametrized(module) else {}
        for attribute, chain in chains.items():
            if (shape := getattr(chain[0], "weight_shape", None)) is not None:
                shapes[plain_name(f"{prefix}.{attribute}".lstrip("."))] = torch.Size(shape)
    return shapes


def row_sparsity(gradient: torch.Tensor) -> float:
    """Share of the rows of a gradient [rows, ...] that are all zero; 0 of a vector."""
    if gradient.dim() < 2:
        return 0.0
    return float((gradient.flatten(1) == 0).all(dim=1).float().mean())


def _takes(rule: SplitRule, name: str, shape: torch.Size) -> bool:
    return (
        any(fnmatchcase(name, pattern) for pattern in rule.match)
        and not any(fnmatchcase(name, pattern) for pattern in rule.exclude)
        and rule.min_numel <= shape.numel() <= (rule.max_numel or shape.numel())
        and rule.min_dims <= len(shape) <= (rule.max_dims or len(shape))
    )


def _holds(rule: SplitRule, sparsity: float) -> bool:
    return rule.min_sparsity <= sparsity and (rule.max_sparsity == 1 or sparsity < rule.max_sparsity)


def _changes(rules: Sequence[SplitRule]) -> list[float]:
    """Shares of zero rows, one of each range in which the same rules hold."""
    return sorted({0.0, 1.0, *(rule.min_sparsity for rule in rules), *(rule.max_sparsity for rule in rules)})


def _the_one(
    rules: Sequence[SplitRule], likely: Sequence[int], name: str, shape: torch.Size, share: float
) -> SplitRule:
    """The rule that takes a parameter whose gradient has this share of zero rows.

    Args:
        likely: those that take it by all else.
    """
    taken = [i for i in likely if _holds(rules[i], share)]
    measured = (
        f" where {share:.2f} of its first gradient's rows are zero" if any(rules[i].measured for i in likely) else ""
    )
    if len(taken) > 1:
        which = " and ".join(f"split[{i}] ({rules[i].route})" for i in taken)
        raise ValueError(
            f"split: {name} is taken by {which}{measured}; a parameter has one route: narrow one of them with exclude"
            + (", or by sparsity" if measured else "")
        )
    if not taken:
        raise ValueError(
            f"split: no rule takes {name} ({shape.numel()} elements, {len(shape)} dimensions){measured}; add one, for "
            "instance {route: all_reduce, exclude: [...]}"
        )
    rule = rules[taken[0]]
    if rule.route == "rows" and len(shape) < 2:
        raise ValueError(f"split[{taken[0]}]: route rows takes matrices, {name} is a vector; add min_dims: 2")
    return rule
