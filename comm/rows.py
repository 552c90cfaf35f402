"""Sparse rows: of an embedding's gradient, only rows that this rank's batch touched travel, up and down.

Up, the owner of a range of rows gets a bitmap of those touched and their codes; down, the bitmap of those that any rank
touched and the codes of their means. With error feedback, what quantization left out of a row waits until the row is
touched again. Lengths differ from update to update, so messages tell them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .lanes import DOWN, UP, Bucket, Context, Lane, Portion, all_finite
from .layout import Cut, single
from .link import Exchange
from .quantizer import Quantizer
from .reference import key_words


class RowsLane(Lane):
    """Quantized rows of matrices; see the module.

    Raises:
        ValueError: from `bind`, when the model has no such tensors.
    """

    def __init__(self, up: Quantizer, down: Quantizer) -> None:
        assert up.block == down.block, (up, down)
        self.up, self.down = up, down
        self.rows_sent = 0
        """Rows that went up from this rank, its own included: what a log may compare with the vocabulary."""

    def bind(self, context: Context) -> None:
        super().bind(context)
        self._whole = Cut(context.numels, self.up.span, 1)

    def portions(self, bucket: Bucket, tensors: Sequence[int]) -> list[Portion]:
        assert all(len(self.context.shapes[tensor]) >= 2 for tensor in tensors), tensors
        return [Portion(bucket, pieces) for tensor in tensors if (pieces := tuple(self._whole.pieces(tensor)))]

    def exchange(self, buffer: Tensor, portion: Portion, step: int, tag: int) -> Exchange:
        context, tensor = self.context, portion.pieces[0].tensor
        rank, n, count = context.rank, context.world_size, context.shapes[tensor][0]
        gradient = _matrix(buffer, portion, count)
        residual = context.residual(portion.bucket)
        kept = None if residual is None else _matrix(residual, portion, count)
        bounds = [count * i // n for i in range(n + 1)]
        ranges = [slice(low, high) for low, high in pairwise(bounds)]
        touched = (gradient != 0).any(dim=1)
        sent = [
            self._encode(self.up, gradient[r], touched[r], kept[r] if kept is not None else None,
                         key_words((context.seed, step, UP, rank, owner), [tensor]))
            for owner, r in enumerate(ranges)
        ]  # fmt: skip
        self.rows_sent += int(touched.sum())
        peers = [peer for peer in range(n) if peer != rank]
        context.meter.add(up=sum(sent[peer].numel() for peer in peers))
        handle = context.link.start(tag, {peer: sent[peer] for peer in peers}, dict.fromkeys(peers))
        yield handle

        mine = ranges[rank]
        total = torch.zeros_like(gradient[mine])
        union = torch.zeros_like(touched[mine])
        for peer in range(n):
            payload = sent[rank] if peer == rank else handle.received[peer]
            mask, rows = self._decode(self.up, payload, total)
            total[mask] += rows
            union |= mask
        total /= n
        mean = self._encode(self.down, total, union, None, key_words((context.seed, step, DOWN, rank), [tensor]))
        context.meter.add(down=mean.numel() * len(peers))
        handle = context.link.start(tag + 1, dict.fromkeys(peers, mean), dict.fromkeys(peers))
        yield handle
        gradient.zero_()
        for owner, r in enumerate(ranges):
            mask, rows = self._decode(self.down, mean if owner == rank else handle.received[owner], gradient[r])
            gradient[r][mask] = rows

    def finite(self, buffer: Tensor, portion: Portion) -> Tensor:
        return all_finite(buffer, portion)

    @staticmethod
    def _encode(quantizer: Quantizer, rows: Tensor, mask: Tensor, residual: Tensor | None, key: np.ndarray) -> Tensor:
        """Bitmap of `mask` [rows], then the codes of the rows it names; their residuals [rows, width] are updated."""
        chosen = rows[mask].reshape(-1)
        part = single(chosen.numel(), quantizer.span, rows.shape[1])
        bits = _pack_bits(mask)
        out = torch.empty(bits.numel() + part.size(quantizer.bits), dtype=torch.uint8, device=rows.device)
        out[: bits.numel()] = bits
        keys = np.repeat(key, len(part.table), axis=0)
        if residual is None:
            quantizer.encode_shard(chosen, part, keys, out[bits.numel() :])
        else:
            left = residual[mask].reshape(-1)
            quantizer.encode_feedback(chosen, left, part, keys, out[bits.numel() :])
            residual[mask] = left.view(-1, rows.shape[1])
        return out

    @staticmethod
    def _decode(quantizer: Quantizer, payload: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mask [rows of `like`], and the rows that it names.

        Raises:
            ValueError: the payload has another length than its bitmap says.
        """
        count, width = like.shape
        bytes_of_mask = -(-count // 8)
        mask = _unpack_bits(payload[:bytes_of_mask], count)
        rows = int(mask.sum())
        return mask, quantizer.decode(payload[bytes_of_mask:].contiguous(), rows * width).view(rows, width)


def _matrix(buffer: Tensor, portion: Portion, rows: int) -> Tensor:
    """A view of the portion's tensor in the buffer [rows, width]."""
    (start,), (piece,) = portion.starts, portion.pieces
    return buffer[start : start + piece.numel].view(rows, -1)


def _pack_bits(mask: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    bits = packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).view(-1)[:count].bool()
