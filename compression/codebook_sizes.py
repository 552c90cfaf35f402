"""How many centroids each weight gets, where their codes and codebooks together may take so many bits.

Weights differ many times over in what an error of theirs costs the loss. Near a minimum that is, to second order, half
the sum of F e^2 over a weight's elements, e the error of each and F the diagonal of the Fisher matrix, its mean squared
gradients. k-means with each number of centroids gives the errors; then, from the fewest centroids on, the
weight that gains the most for its bits gets more, until the bits are spent.

Source: LeCun et al. 1990, "Optimal Brain Damage", section 2 (the diagonal second order); Shoham & Gersho 1988 (bits by
marginal gain); as in HAWQ-V2 (Dong et al. 2020), whose sensitivity is the Hessian's trace times the squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .pq import Blocks, PqScheme, check_values, decode_packed, pack_pq, quantize_pq, weight_seed

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of centroids to choose from: those whose codes waste no bit."""
ITERATIONS = 6
"""Of k-means: a comparison needs no more."""


def least_bits(items: Sequence[Blocks], scheme: PqScheme) -> float:
    """Bits a weight, in the mean, that the fewest centroids take."""
    bits = sum(stored_bits(item.weight.tensor.numel() // item.block, item.block, SIZES[0], scheme) for item in items)
    return bits / sum(item.weight.tensor.numel() for item in items)


def stored_bits(codes: int, block: int, centroids: int, scheme: PqScheme) -> int:
    """What `codes` codes and their codebook take in the file, before zstd."""
    codebook = centroids * block * 16 if scheme == "pq" else centroids * block * 8 + 32
    return codes * max(1, (centroids - 1).bit_length()) + codebook


@torch.no_grad()
def choose_centroids(
    items: Sequence[Blocks],
    squared_gradients: Mapping[str, Tensor],
    bits: float,
    *,
    scheme: PqScheme,
    seed: int,
    on_weight: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Centroids of each weight by name; called on every rank, which share the k-means, with the same result on all.

    Args:
        items: the weights and their blocks, equal on all ranks.
        squared_gradients: by name, of the weight's shape, equal on all ranks; their scale does not count.
        bits: a weight, in the mean; at least `least_bits`.
        scheme: how the file stores centroids.
        seed: of k-means.
        on_weight: called after each weight of this rank.

    Raises:
        ValueError: a weight holds inf, NaN or a value that fp16 does not reach.
    """
    for item in items:
        check_values(item.weight.name, item.weight.tensor)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    mine = dist.get_rank() if ranks > 1 else 0
    device = items[0].weight.tensor.device
    found = torch.zeros(2, len(items), len(SIZES), dtype=torch.float64, device=device)
    for i, item in enumerate(items):
        if i % ranks == mine:
            sensitivity = squared_gradients[item.weight.name].to(item.weight.tensor.device)
            for j, size in enumerate(SIZES):
                cost, error = _try(item, size, sensitivity, scheme, weight_seed(seed, i))
                found[0, i, j], found[1, i, j] = cost, error
            on_weight()
    if ranks > 1:
        dist.all_reduce(found)  # each number is of one rank: the sum is exact
    costs, errors = found.cpu().numpy()
    elements = sum(item.weight.tensor.numel() for item in items)
    chosen = spend(costs, errors, bits * elements)
    return {item.weight.name: SIZES[j] for item, j in zip(items, chosen, strict=True)}


def spend(costs: np.ndarray, errors: np.ndarray, budget: float) -> list[int]:
    """The column to take of each row, so that costs add up to the budget at most and errors to little.

    Args:
        costs: [rows, columns], rising.
        errors: [rows, columns].
        budget: at least the sum of the first column.
    """
    chosen = [0] * len(costs)
    left = budget - costs[:, 0].sum()
    while True:
        best, step = 0.0, None
        for i, (cost, error) in enumerate(zip(costs, errors, strict=True)):
            now = chosen[i]
            for j in range(now + 1, len(cost)):
                extra, gain = cost[j] - cost[now], error[now] - error[j]
                if extra <= left and gain > best * extra:
                    best, step = gain / extra, (i, j)
        if step is None:
            return chosen
        i, j = step
        left -= costs[i, j] - costs[i, chosen[i]]
        chosen[i] = j


def _try(item: Blocks, centroids: int, sensitivity: Tensor, scheme: PqScheme, seed: int) -> tuple[int, float]:
    """Bits in the file, and what the error costs the loss but for a factor."""
    weight = item.weight.tensor
    codes, codebook = quantize_pq(weight, item.block, centroids, seed=seed, scheme=scheme, iterations=ITERATIONS)
    decoded = decode_packed(pack_pq(codes, codebook, scheme), weight.shape).to(weight.device)
    error = float((sensitivity * (decoded - weight).square()).sum(dtype=torch.float64))
    # Of the centroids that were asked for: with fewer distinct blocks the codebook is smaller, and no larger one pays.
    return stored_bits(codes.numel(), item.block, centroids, scheme), error
