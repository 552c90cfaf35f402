"""Ternary and binary weights: -1, 0, 1 times a scale, or one of two levels.

Three quantizers. `Twn` cuts at 0.7 of the mean magnitude; `Lat` alternates scale and codes under the loss's curvature
(the root of Adam's second moment), with the solver that `tenko.comm` sends a server's weights with; `TwoMeans` puts the
two levels at the 2-means of the weights. The first two keep zeros zero, so a pruned weight stays pruned; two levels
have no zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scalar import Granularity, as_rows, least_squares
from .technique import Packed

DELTA = 0.7
"""Of the mean magnitude: what is below becomes 0."""
LLOYD_STEPS = 8
"""Turns of 2-means; a fixed number, so that nothing waits for the device to say whether it has converged. On weights
of a trained Transformer the squared error is then within 2e-5 of where it ends."""


@dataclass(frozen=True)
class Twn:
    """Ternary weights by a threshold.

    Source: Li & Liu 2016, "Ternary Weight Networks", equations 4 to 6; TernaryBERT (Zhang et al. 2020) takes a scale a
    layer, and a scale a row for embeddings.
    """

    granularity: Granularity = "channel"
    uses_importance = False

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Packed:
        """Codes int8 in -1 to 1 and scale fp32 [rows], or [1] for the tensor: the mean magnitude of what is not 0."""
        rows_rc = as_rows(weight, self.granularity)
        magnitude_rc = rows_rc.abs()
        threshold_r1 = DELTA * magnitude_rc.mean(dim=1, keepdim=True)
        large_rc = torch.gt(magnitude_rc, threshold_r1, out=torch.empty_like(rows_rc))  # 0.0 or 1.0
        # A product, not a choice: what is not finite makes the scale NaN.
        scale = torch.linalg.vecdot(magnitude_rc, large_rc) / large_rc.sum(dim=1).clamp(min=1)
        codes = large_rc.mul_(rows_rc.sign()).to(torch.int8).view(weight.shape)
        return Packed("ternary", {"codes": codes, "scale": scale})


@dataclass(frozen=True)
class Lat:
    """Loss-aware ternary weights: least sum D (scale * code - w)^2, scale and codes in turn.

    Source: Hou & Kwok 2018, "Loss-aware Weight Quantization of Deep Networks"; TernaryBERT, section 3.2.
    """

    granularity: Granularity = "channel"
    uses_importance = True

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Packed:
        """Codes int8 in -1 to 1 and scale fp32 [rows], or [1] for the tensor; without importance D = 1."""
        codes, scale = least_squares(weight, importance, 2, self.granularity)
        return Packed("ternary", {"codes": codes, "scale": scale})


@dataclass(frozen=True)
class TwoMeans:
    """Two levels: the 2-means of the weights, by Lloyd's turns from the mean.

    In one dimension a turn is short: the levels are the means above and below a threshold, and the threshold is the
    middle of the levels. The squared error never rises.
    """

    granularity: Granularity = "channel"
    uses_importance = False

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Packed:
        """Codes int8, 0 or 1, and levels fp32 [rows, 2], or [1, 2] for the tensor, the lower one first."""
        rows_rc = as_rows(weight, self.granularity)
        columns, total = rows_rc.shape[1], rows_rc.sum(dim=1)
        threshold = low = high = total / columns
        above_rc = torch.empty_like(rows_rc)  # 0.0 or 1.0
        for _ in range(LLOYD_STEPS):
            torch.gt(rows_rc, threshold.unsqueeze(1), out=above_rc)
            count, part = above_rc.sum(dim=1), torch.linalg.vecdot(rows_rc, above_rc)
            # All weights of a row may be equal: then none is above, or none below, whose level stays.
            high = torch.where(count > 0, part / count.clamp(min=1), high)
            low = torch.where(count < columns, (total - part) / (columns - count).clamp(min=1), low)
            threshold = (low + high) / 2
        codes = (rows_rc > threshold.unsqueeze(1)).to(torch.int8).view(weight.shape)
        return Packed("binary", {"codes": codes, "levels": torch.stack([low, high], dim=1)})
