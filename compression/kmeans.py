"""k-means over blocks of weights: faiss does the iterations, this adds what codebooks of weights need.

No subsampling, no empty cluster at the end (the most populous one is split), and a result that depends on blocks, seed
and start only. faiss and torch each bring an OpenMP runtime; both are given the same number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLE = 16
"""Blocks a centroid that are looked at before all blocks are, to see whether there are more distinct ones."""
ROUNDS = 100
"""Of splitting clusters, at most."""


def fit(blocks: Tensor, centroids: int, *, seed: int, iterations: int = 25, start: Tensor | None = None) -> Tensor:
    """The centroids of k-means under the Euclidean distance.

    Args:
        blocks: [blocks, width], finite, on any device.
        centroids: how many at most; with fewer distinct blocks these are the centroids, and the error is 0.
        seed: of the blocks that are the first centroids.
        iterations: of Lloyd's algorithm.
        start: [centroids, width], the first centroids in place of random blocks.

    Returns:
        fp32 [K, width] on the CPU, K = min(centroids, distinct blocks); each is the nearest of at least one block,
        unless blocks differ by rounding errors only.
    """
    faiss = _faiss()
    points = _numpy(blocks)
    few = _distinct(points, centroids)
    if few is not None:
        return torch.from_numpy(few)
    kmeans = faiss.Kmeans(
        points.shape[1],
        centroids,
        niter=iterations,
        seed=seed % 2**31,  # faiss keeps it in an int
        max_points_per_centroid=len(points),  # the default of 256 would drop the others
        min_points_per_centroid=1,  # no advice on stderr
    )
    first = None if start is None or start.shape != (centroids, points.shape[1]) else _numpy(start)
    kmeans.train(points, init_centroids=first)
    return torch.from_numpy(_split_for_empty(points, kmeans.centroids.copy()))


def assign(blocks: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest centroid of each block, int64 [blocks], on the CPU; of blocks on a GPU, there.

    Args:
        blocks: [blocks, width]; one that holds inf or NaN gets any of the numbers.
        centroids: [K, width], on the same device.
    """
    if blocks.is_cuda:  # without waiting for it
        scores = torch.addmm(centroids.float().square().sum(1), blocks.float(), centroids.float().T, alpha=-2)
        return scores.argmin(1)
    return torch.from_numpy(_nearest(_numpy(blocks), _numpy(centroids))[1]).clamp_(min=0)  # faiss: -1 for NaN


def _split_for_empty(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Move each centroid that is nobody's nearest to the outermost block of one of the most populous clusters.

    faiss splits while it iterates, but not after its last step. A move may empty another cluster, so this is repeated,
    though not forever: blocks that differ by rounding errors only may have no nearest centroid to be sure of.
    """
    for _ in range(ROUNDS):
        distances, nearest = _nearest(points, centroids)
        counts = np.bincount(nearest, minlength=len(centroids))
        empty = np.flatnonzero(counts == 0)
        if not len(empty):
            break
        order = np.lexsort((-distances, nearest))  # by cluster, the outermost block first
        full = np.flatnonzero(counts)
        outermost = order[np.searchsorted(nearest[order], full)]
        splittable = distances[outermost] > 0
        full, outermost = full[splittable], outermost[splittable]
        chosen = np.argsort(-counts[full], kind="stable")[: len(empty)]
        centroids[empty[: len(chosen)]] = points[outermost[chosen]]
    return centroids


def _distinct(points: np.ndarray, most: int) -> np.ndarray | None:
    """The distinct blocks, if there are at most so many."""
    if len(points) > SAMPLE * most and len(np.unique(points[: SAMPLE * most], axis=0)) > most:
        return None
    found = np.unique(points, axis=0)
    return found if len(found) <= most else None


def _nearest(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance to the nearest centroid, fp32 [blocks], and its number, int64 [blocks]."""
    index = _faiss().IndexFlatL2(points.shape[1])
    index.add(centroids)
    _, nearest = index.search(points, 1)
    # faiss computes |a|^2 - 2ab + |b|^2, which is not quite 0 for equal ones
    return np.square(points - centroids[nearest[:, 0]]).sum(1), nearest[:, 0]


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _faiss() -> Any:
    import faiss  # not above: it takes a moment, and few stages need it

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
