"""How codes become weights again: the one decoding of each scheme, used in training, in baking and by the file.

A linear scheme (int8, int4, ternary) is codes times a scale, binary picks one of two levels, product quantization (pq)
looks blocks of a row up in a codebook. All give fp32, and the same bits wherever they run on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SLICE = 1 << 20
"""Codes of product quantization that are looked up at once."""


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 weight of a linear scheme: codes times scale.

    Args:
        codes: integers [rows, ...].
        scale: fp32 [rows], or [1] for the whole tensor.
    """
    return codes.to(torch.float32, copy=True).mul_(_per_row(scale, codes))  # in place: half of the memory


def decode_binary(codes: Tensor, levels: Tensor) -> Tensor:
    """The fp32 weight of two levels a row: element i of row r is `levels[r, codes[r, i]]`.

    Args:
        codes: integers [rows, ...], 0 or 1.
        levels: fp32 [rows, 2], or [1, 2] for the whole tensor.
    """
    low, high = _per_row(levels[:, 0], codes), _per_row(levels[:, 1], codes)
    return torch.where(codes.bool(), high, low)


def decode_pq(codes: Tensor, codebook: Tensor, shape: Sequence[int], scale: Tensor | None = None) -> Tensor:
    """The fp32 weight of product quantization: each block of a row is the centroid that its code names.

    Args:
        codes: integers [rows, columns / block], in 0 to K - 1.
        codebook: [K, block], fp32, fp16, or int8 with a scale.
        shape: of the weight; `shape[0]` is rows, and the other dimensions' product is columns.
        scale: fp32 [1] or [K], which an int8 codebook is multiplied with; None for a codebook of floats.
    """
    centroids = codebook.float() if scale is None else dequantize(codebook, scale)
    flat = codes.reshape(-1)
    blocks = centroids.new_empty(len(flat), centroids.shape[1])
    for start in range(0, len(flat), _SLICE):  # numbers of four bytes for a slice of the codes, not for all
        part = slice(start, start + _SLICE)
        torch.index_select(centroids, 0, flat[part].int(), out=blocks[part])
    return blocks.reshape(tuple(shape))


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))  # [rows or 1, 1, ...]
