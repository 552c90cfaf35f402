"""What some workers saved, for as many others: Adam's state put together from shards, and cut anew.

Every optimizer of a route comes down to the same: moments and step counts of each parameter; a server's owners have the
full-precision weights besides. So any number of workers goes on from any other, one alone (which has no route)
included. What a worker kept of its own does not fit others: error feedback begins at zero.
"""

# No `from __future__ import annotations`: see route.py.

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layout import as_stored
from .route import Route
from .server_optimizer import ServerOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = dict[int, dict[str, Tensor]]
"""By a parameter's place in the model: moments and weights (those of an owner) in its shape, and `step`."""


def adopt(
    route: Route | None,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    saved: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
) -> None:
    """Gives route and optimizer what another number of workers has saved; the weights are loaded already.

    A single worker who goes on from a parameter server's shards gets the owners' full-precision weights.

    Args:
        route: on the model; None of a single worker.
        optimizer: the route's, or torch's AdamW.
        parameters: all of the model's, in order.
        saved: the `state_dict` of the other workers' optimizer.
        states: `Route.state_dict()` of each of them, by rank; empty where there was no route.

    Raises:
        ValueError: a shard is missing, or the optimizer is another.
    """
    if route is not None and states:
        route.adopt(states)
    sharded = isinstance(optimizer, ServerOptimizer)
    if not sharded and "others" not in saved:
        optimizer.load_state_dict(dict(saved))  # every worker has all of it
        return
    moments = _gather(parameters, saved, states)
    if isinstance(optimizer, ServerOptimizer):
        optimizer.take(parameters, moments)
        return
    with torch.no_grad():
        for place, kept in moments.items():
            if "weights" in kept:
                parameters[place].copy_(kept["weights"])
    trained = [place for place, parameter in enumerate(parameters) if parameter.requires_grad]
    load_adamw(optimizer, trained, moments)


def load_adamw(optimizer: torch.optim.Optimizer, places: Sequence[int], moments: Moments) -> None:
    """Gives AdamW the moments of its parameters, whose places in the model are `places`."""
    state = {
        number: {key: moments[place][key] for key in ("step", *MOMENTS)}
        for number, place in enumerate(places)
        if place in moments
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _gather(
    parameters: Sequence[nn.Parameter], saved: Mapping[str, Any], states: Sequence[Mapping[str, Any]]
) -> Moments:
    trained = [place for place, parameter in enumerate(parameters) if parameter.requires_grad]
    if "others" not in saved:
        return {trained[number]: kept for number, kept in saved["state"].items()}
    served = _join(parameters, [state.get("server") for state in states])
    others = [place for place in trained if place not in served]
    inner = saved["others"] or {"state": {}}
    return {**served, **{others[number]: kept for number, kept in inner["state"].items()}}


def _join(parameters: Sequence[nn.Parameter], shards: Sequence[Mapping[str, Tensor] | None]) -> Moments:
    """Shards of all owners, put together."""
    moments: Moments = {}
    found: dict[int, int] = {}
    for rank, shard in enumerate(shards):
        if shard is None or "segments" not in shard:
            raise ValueError(f"server: the state of rank {rank} does not say which part of the weights it holds")
        at = 0
        for segment, (place, start, numel) in enumerate(shard["segments"].tolist()):
            if place not in moments:
                like = torch.empty_like(parameters[place], dtype=torch.float32, device="cpu")
                moments[place] = {key: torch.empty_like(like) for key in ("weights", *MOMENTS)}
                found[place] = 0
            for key in ("weights", *MOMENTS):
                whole = as_stored(moments[place][key], parameters[place]).view(-1)
                whole[start : start + numel] = shard[key][at : at + numel]
            moments[place]["step"] = shard["steps"][segment].clone()  # the same for all segments of a parameter
            found[place] += numel
            at += numel
    for place, numel in found.items():
        if numel != parameters[place].numel():
            raise ValueError(f"server: the owners have {numel} of {parameters[place].numel()} elements of a parameter")
    return moments
