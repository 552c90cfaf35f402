"""Error feedback: what quantization left out of a gradient is added to the next one: nothing is lost, only late.

The residual is kept by parameter, never by bucket: DDP rebuilds its buckets after the first update, and a resumed run,
whose buckets are the first ones again, must find it.

Source: Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019 for the proof.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ErrorFeedback:
    """Residuals of this rank, fp32, in the units of the gradients that the hook sees."""

    def __init__(self) -> None:
        self._pieces: dict[int, Tensor] = {}
        self._flats: dict[tuple[int, ...], Tensor] = {}

    def flat(self, tensors: tuple[int, ...], numels: Sequence[int], device: torch.device) -> Tensor:
        """The residuals of a bucket's tensors side by side [sum(numels)]; writing to it changes them.

        Args:
            tensors: index of each tensor in the model.
            numels: elements of each.
            device: where they are.
        """
        if tensors in self._flats:
            return self._flats[tensors]
        flat = torch.zeros(sum(numels), dtype=torch.float32, device=device)
        for index, piece in zip(tensors, flat.split(list(numels)), strict=True):
            if index in self._pieces:
                piece.copy_(self._pieces[index])
            self._pieces[index] = piece
        self._flats = {key: old for key, old in self._flats.items() if not set(key) & set(tensors)}
        self._flats[tensors] = flat
        return flat

    def clear(self) -> None:
        """Forget all residuals: after an overflow, whose update is skipped and whose loss scale changes."""
        for flat in self._flats.values():
            flat.zero_()
        in_use = {index for tensors in self._flats for index in tensors}
        # What was loaded and not asked for yet is the caller's: left out, not zeroed.
        self._pieces = {index: piece for index, piece in self._pieces.items() if index in in_use}

    def clear_unless(self, finite: Tensor) -> None:
        """`clear` where `finite` [] is false; on a GPU without waiting for its value."""
        if finite.device.type != "cpu":
            for flat in self._flats.values():
                flat.masked_fill_(~finite, 0)
        elif not finite:
            self.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Residuals by the parameter's index in the model."""
        return {str(index): piece.detach().cpu().clone() for index, piece in self._pieces.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on with saved residuals."""
        self._flats = {}
        self._pieces = {int(index): piece for index, piece in state.items()}
