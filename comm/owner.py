"""The owner of a shard: full-precision weights and Adam's moments, and the thin weights that everybody else holds.

Every parameter server is made of these, whether the shards lie on the workers or on servers of their own.

Notable:
- The update is torch's own fused AdamW, a parameter a segment: an owner steps to the bit as the whole model's AdamW
  would (a test says so), and a segment that had no gradient anywhere is left alone, its step count included.
- Matrices are sent in `weight_bits`, vectors (biases, norms) in fp32: they are a thousandth of the bytes, and a layer
  norm in 4 bits is not the layer norm that was trained.
- What is sent is a function of weights and moments alone: a resumed owner sends the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .config import WEIGHT_BITS
from .laq import WeightQuantizer
from .layout import Shard


class WeightFormat:
    """Where what stands in a payload: raw numbers of vectors (or of all), then the codes of matrices.

    Args:
        shard: whose weights; its starts say where they lie in the buffers that `encode` reads and `decode` writes.
        matrices: bool [segments]: those are sent in `bits`, the others as fp32.
        bits: 2 to 8 (LAQ), 16 (fp16) or 32 (fp32).
        block: weights that share an alpha, a multiple of 8.

    Raises:
        ValueError: a setting is none of these.
    """

    def __init__(self, shard: Shard, matrices: np.ndarray, bits: int, block: int = 256) -> None:
        if bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits: must be 2 to 8 (LAQ), 16 (fp16) or 32 (fp32), is {bits}")
        if matrices.shape != (len(shard.table),) or matrices.dtype != np.bool_:
            raise ValueError(f"matrices: must be bool [{len(shard.table)}], is {matrices.dtype} {matrices.shape}")
        self.quantizer = WeightQuantizer(bits, block) if bits <= 8 else None
        thin = matrices if bits < 32 else np.zeros_like(matrices)
        # (start, numel, its place in bytes) of every segment that travels as plain numbers
        self.numel = shard.numel
        self.full: list[tuple[int, int, int]] = []
        self.half: list[tuple[int, int, int]] = []
        at = 0
        for start, numel in shard.table[~thin, :2].tolist():
            self.full.append((start, numel, at))
            at += 4 * numel
        self.codes_at = at
        self.part = None
        if self.quantizer is not None:
            self.part = self.quantizer.layout(shard, thin)
            at += self.quantizer.size(self.part)
        else:
            for start, numel in shard.table[thin, :2].tolist():
                self.half.append((start, numel, at))
                at += 2 * numel
        self.size = at
        """Bytes of a payload."""

    def encode(self, w: Tensor, v: Tensor, out: Tensor) -> None:
        """Writes weights w under second moments v (both fp32) into out, uint8 [size or more]."""
        for start, numel, at in self.full:
            out[at : at + 4 * numel] = w[start : start + numel].view(torch.uint8)
        for start, numel, at in self.half:
            out[at : at + 2 * numel] = w[start : start + numel].half().view(torch.uint8)
        if self.quantizer is not None and self.part is not None:
            self.quantizer.encode(w, v, self.part, out[self.codes_at :])

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Writes the weights of a payload, uint8 [size or more], into out, fp32; what the shard lacks stays."""
        for start, numel, at in self.full:
            out[start : start + numel].view(torch.uint8).copy_(payload[at : at + 4 * numel])
        for start, numel, at in self.half:
            # A copy: the bytes of the payload may begin anywhere, those of fp16 may not.
            out[start : start + numel] = payload[at : at + 2 * numel].clone().view(torch.float16)
        if self.quantizer is not None and self.part is not None:
            self.quantizer.decode(payload[self.codes_at :], self.part, out)


def payload_size(shard: Shard, matrices: np.ndarray, weight_bits: int, block: int = 256) -> int:
    """Bytes of a shard's weights as `ShardOwner.encode` sends them."""
    return WeightFormat(shard, matrices, weight_bits, block).size


def decode_weights(
    payload: Tensor, shard: Shard, matrices: np.ndarray, weight_bits: int, block: int, out: Tensor
) -> None:
    """Writes the weights of a payload where the shard says. (`WeightFormat.decode`, for those who do it once.)

    Args:
        payload: uint8 [payload_size or more]; it may begin at any byte.
        shard: the owner's; compact, or with starts of one's own, to scatter the weights over a larger buffer.
        matrices: bool [segments], which segments are sent in `weight_bits`; the others come as fp32.
        weight_bits, block: the owner's.
        out: fp32, contiguous; other elements than the shard's stay as they are.

    Raises:
        ValueError: the payload is too short, or a setting is wrong.
    """
    form = WeightFormat(shard, matrices, weight_bits, block)
    if payload.dtype != torch.uint8 or payload.numel() < form.size:
        raise ValueError(f"payload: must be uint8 [{form.size}], is {payload.dtype} {list(payload.shape)}")
    form.decode(payload, out)


class ShardOwner:
    """Weights and Adam's state of one shard.

    Args:
        weights: fp32 [shard.numel], copied.
        shard: whose; compact (its segments one after the other from 0).
        matrices: bool [segments]: those are sent in `weight_bits`, the others in fp32.
        weight_bits: 2 to 8 (LAQ), 16 (fp16) or 32 (fp32).
        block: weights that share an alpha, a multiple of 8.
        betas, eps, weight_decay: AdamW's.

    Raises:
        ValueError: a setting is none of these.
    """

    def __init__(
        self,
        weights: Tensor,
        shard: Shard,
        *,
        matrices: np.ndarray,
        weight_bits: int = 4,
        block: int = 256,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: must be from 0 to below 1, are {betas}")
        if not eps >= 0 or not weight_decay >= 0:
            raise ValueError(f"eps, weight_decay: must be at least 0, are {eps} and {weight_decay}")
        if weights.shape != (shard.numel,):
            raise ValueError(f"weights: must be [{shard.numel}], are {list(weights.shape)}")
        assert (shard.table[:, 0] == np.cumsum(shard.table[:, 1]) - shard.table[:, 1]).all(), "compact"
        self.shard, self.matrices, self.weight_bits, self.block = shard, matrices, weight_bits, block
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self._form = WeightFormat(shard, matrices, weight_bits, block)
        self.weights = weights.detach().to(torch.float32, copy=True).contiguous()
        self.mean = torch.zeros_like(self.weights)
        """Adam's first moment, exp_avg."""
        self.square = torch.zeros_like(self.weights)
        """Adam's second moment, exp_avg_sq; also what LAQ weighs the weights with."""
        self.steps = torch.zeros(len(shard.table), dtype=torch.float32, device=weights.device)
        """Updates of every segment."""

    def step(self, gradient: Tensor, lr: float, touched: np.ndarray | None = None) -> None:
        """One AdamW update. The caller sees to it that the gradient is finite.

        Args:
            gradient: fp32 [shard.numel].
            lr: this update's learning rate.
            touched: bool [segments]: those that have a gradient; the others are left alone. Default all.
        """
        assert gradient.shape == self.weights.shape, gradient.shape
        assert gradient.dtype == torch.float32, gradient.dtype
        picked = np.arange(len(self.shard.table)) if touched is None else np.flatnonzero(touched)
        bounds = [(int(start), int(start + numel)) for start, numel in self.shard.table[picked, :2]]
        if not bounds:
            return
        weights, gradients, means, squares = (
            [x[low:high] for low, high in bounds] for x in (self.weights, gradient, self.mean, self.square)
        )
        with torch.no_grad():
            adamw(
                weights,
                gradients,
                means,
                squares,
                max_exp_avg_sqs=[],
                state_steps=[self.steps[i] for i in picked],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=self.weight_decay,
                eps=self.eps,
                maximize=False,
            )

    @property
    def payload_size(self) -> int:
        """Bytes that `encode` writes."""
        return self._form.size

    def encode(self, out: Tensor) -> None:
        """Writes the weights as they are sent into out, uint8 [payload_size or more]; it may begin at any byte."""
        assert out.dtype == torch.uint8, out.dtype
        assert out.numel() >= self.payload_size, out.shape
        self._form.encode(self.weights, self.square, out)

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """What everybody makes of `encode`'s bytes: fp32 [shard.numel]."""
        assert payload.numel() >= self.payload_size, payload.shape
        self._form.decode(payload, out)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, moments and step counts, on the CPU; all that a resumed owner needs."""
        named = {"weights": self.weights, "exp_avg": self.mean, "exp_avg_sq": self.square, "steps": self.steps}
        return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: a tensor is missing, or of another shape or type; nothing is loaded then.
        """
        mine = {"weights": self.weights, "exp_avg": self.mean, "exp_avg_sq": self.square, "steps": self.steps}
        for name, tensor in mine.items():
            saved = state.get(name)
            if not isinstance(saved, Tensor) or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                what = f"{saved.dtype} {list(saved.shape)}" if isinstance(saved, Tensor) else "missing"
                raise ValueError(f"server.{name}: must be {tensor.dtype} {list(tensor.shape)}, is {what}")
        for name, tensor in mine.items():
            tensor.copy_(state[name])
