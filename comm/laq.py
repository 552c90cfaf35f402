"""LAQ, loss-aware weight quantization: the weights that a parameter server sends down, in 2 to 8 bits.

A block of weights w becomes alpha * q / n, q one of the levels -n..n, n = 2^(m-1) - 1. Chosen are the alpha and q that
minimise sum D (alpha * q/n - w)^2, where D = sqrt(v) + 1e-8, v Adam's second moment: a weight counts as much as the
loss is curved there. Given alpha, the nearest levels are best; given levels, alpha = n sum(D q w) / sum(D q^2); the two
take turns, and the objective never rises. (The paper's code has sum |D q w| / sum |D q|, the minimiser for ternary q
only; with 4 bits its error is 8 times larger, which a test measures.)

Choices of our own, beside the paper's:
- Taking turns from the largest magnitude ends in the nearest hollow of the objective. So a few starts are looked at
  first, each 0.84 of the one before, until two in a row are worse. No start is kept from update to update: what is sent
  depends on the weights and v alone, and a resumed server needs nothing else.
- One alpha a block of 256 elements, sent as the upper 16 bits of its fp32 without the sign (8 bits of mantissa, rounded
  to nearest); the levels are chosen for the alpha that is sent.
- A block that holds an inf or a NaN gets the alpha 0xFFFF, and decodes to NaN throughout. Blocks whose largest weight
  is under 1e-30 are sent as zeros.

The bytes of a span, 8 blocks: 8 alphas of 2 bytes, then the codes q + n in groups and planes as in `reference.py`.

Source: Hou & Kwok, "Loss-aware Weight Quantization of Deep Networks", ICLR 2018; the algorithm from a description of
the authors' code, the paper was not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layout import Shard
from .reference import level_count, pack, unpack

LAQ_BYTES = 16
"""Of a span of weights: an alpha of 16 bits for each of its 8 blocks."""
MIN_WEIGHT = 1e-30
"""A block of smaller weights is sent as zeros."""
SHRINK = 0.84
"""From one start of the search to the next."""
EPSILON = 1e-8
"""Added to sqrt(v), as in the paper's code: without a gradient all weights count alike."""
STARTS, ALTERNATIONS = 12, 10


def tolerance_of(bits: int) -> float:
    """A turn that gains less than this of sum D w^2 is the last one: well below what `bits` bits leave as an error."""
    return 6e-4 / 4 ** (bits - 2)


def solve(
    w: Tensor,
    d: Tensor | None,
    bits: int,
    *,
    block: int = 0,
    start: Tensor | None = None,
    starts: int = STARTS,
    alternations: int = ALTERNATIONS,
) -> tuple[Tensor, Tensor]:
    """Quantizes weights: alpha and levels that minimise sum d (alpha * level/n - w)^2, n = 2^(bits-1) - 1.

    Args:
        w: weights of any shape, read as flat; floating point.
        d: their importance, of the same shape, not negative; None: all alike.
        bits: 2 (ternary) to 8.
        block: elements that share an alpha; 0: all.
        start: an alpha for each block [blocks] to try besides; 0 where there is none.
        starts: how many starts to try at most; 1: the largest magnitude alone, as in the paper.
        alternations: best alpha and nearest levels at most so many times.

    Returns:
        alpha fp32 [blocks] (0 where a block's weights, or their importances, are all zero), and levels int8, in the
        shape of w. The quantized weights are `values(alpha, levels, bits, block=block)`.

    Raises:
        ValueError: a setting is out of range, or a weight or an importance is not finite.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: must be 2 to 8, is {bits}")
    if block < 0:
        raise ValueError(f"block: must be at least 0 (0: one alpha for all), is {block}")
    if starts < 1 or alternations < 1:
        raise ValueError(f"starts, alternations: must be at least 1, are {starts} and {alternations}")
    if d is not None and (d.shape != w.shape or bool((d < 0).any())):
        raise ValueError(f"d: must be of w's shape {tuple(w.shape)} and nowhere negative, is {tuple(d.shape)}")
    flat = w.detach().reshape(-1).float().contiguous()
    weight = torch.ones_like(flat) if d is None else d.detach().reshape(-1).float().contiguous()
    if flat.numel() == 0:
        return flat.new_zeros(0), flat.to(torch.int8).view(w.shape)
    block = min(block, flat.numel()) or flat.numel()
    blocks = -(-flat.numel() // block)
    if start is not None and start.shape != (blocks,):
        raise ValueError(f"start: must have an alpha for each of {blocks} blocks, is {tuple(start.shape)}")
    if flat.device.type == "cpu":
        from . import laq_kernels

        alpha, levels = torch.empty(blocks), torch.empty(flat.numel(), dtype=torch.int8)
        own = np.empty(0, dtype=np.float32) if start is None else start.float().contiguous().numpy()
        laq_kernels.solve_blocks(
            flat.numpy(), weight.numpy(), own, alpha.numpy(), levels.numpy(), block, bits, starts, alternations
        )
    else:
        padding = (0, blocks * block - flat.numel())
        rows, weights = (torch.nn.functional.pad(x, padding).view(blocks, block) for x in (flat, weight))
        alpha = search(rows, weights, bits, start=start, starts=starts, alternations=alternations, tolerance=0.0)
        levels = (nearest(rows, alpha, bits)).to(torch.int8).flatten()[: flat.numel()]
    if not bool(torch.isfinite(alpha).all()):
        raise ValueError(f"w: must be finite, and d; block {int((~torch.isfinite(alpha)).nonzero()[0])} is not")
    return alpha, levels.view(w.shape)


def values(alpha: Tensor, levels: Tensor, bits: int, *, block: int = 0) -> Tensor:
    """The weights that alphas and levels of `solve` stand for: fp32, in the shape of `levels`."""
    flat = levels.reshape(-1).float()
    step = alpha / float(level_count(bits))
    return (flat * step.repeat_interleave(block or max(flat.numel(), 1))[: flat.numel()]).view(levels.shape)


def nearest(w: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Levels -n..n of w [blocks, elements] for alphas [blocks], ties upward: fp32. 0 where alpha is 0 or NaN."""
    n = float(level_count(bits))
    usable = (alpha > 0).unsqueeze(1)
    # A tensor by a tensor, see reference.py.
    scale = torch.full_like(alpha, n) / torch.where(alpha > 0, alpha, torch.ones_like(alpha))
    y = torch.where(usable, w, torch.zeros_like(w)) * scale.unsqueeze(1)
    return (y.clamp(-n, n) + (n + 0.5)).to(torch.int32).float() - n


def search(
    w: Tensor,
    d: Tensor,
    bits: int,
    *,
    start: Tensor | None = None,
    starts: int = STARTS,
    alternations: int = ALTERNATIONS,
    tolerance: float,
) -> Tensor:
    """The alpha of every row of w [blocks, elements] under d, in plain torch: fp32 [blocks], NaN where not finite.

    What the kernels are held to, and what runs on devices other than a CPU.
    """
    largest, heaviest = w.abs().amax(dim=1), d.amax(dim=1)
    finite = torch.isfinite(w).all(dim=1) & torch.isfinite(d).all(dim=1)
    usable = finite & (largest >= MIN_WEIGHT) & (heaviest > 0)
    one = torch.ones_like(largest)
    unit_w = torch.where(usable.unsqueeze(1), w, 0) / torch.where(usable, largest, one).unsqueeze(1)
    unit_d = torch.where(usable.unsqueeze(1), d, 0) / torch.where(usable, heaviest, one).unsqueeze(1)
    n = level_count(bits)

    def turn(alpha: Tensor) -> tuple[Tensor, Tensor]:
        """What the levels nearest for `alpha` gain, and the best alpha for them [blocks], fp64."""
        q = nearest(unit_w, alpha.float(), bits).double()
        above, below = (unit_d * q * unit_w).sum(dim=1), (unit_d * q * q).sum(dim=1)
        safe = torch.where(below > 0, below, torch.ones_like(below))
        return torch.where(below > 0, above * above / safe, -1.0), n * above / safe

    best, gained = torch.zeros_like(one, dtype=torch.float64), torch.full_like(one, -1, dtype=torch.float64)
    if start is not None:
        gained, best = turn(torch.where(usable, start.to(w.device) / torch.where(usable, largest, one), one))
    highest, worse = torch.full_like(gained, -1), torch.zeros_like(usable, dtype=torch.int32)
    for i in range(starts):
        gain, alpha = turn(one * SHRINK**i)
        better = (gain > gained) & (worse < 2)  # two in a row are downhill: smaller starts clip ever more
        best, gained = torch.where(better, alpha, best), torch.where(better, gain, gained)
        worse = torch.where(worse < 2, torch.where(gain > highest, 0, worse + 1), worse)
        highest = torch.maximum(highest, gain)
    going = torch.ones_like(usable)
    for _ in range(alternations - 1):
        gain, alpha = turn(best)
        going = going & (gain > gained * (1 + tolerance))
        best, gained = torch.where(going, alpha, best), torch.where(going, gain, gained)
    found = torch.where(usable, (best * largest).float(), torch.zeros_like(largest))
    return torch.where(finite, found, torch.full_like(found, torch.nan))


@dataclass(frozen=True)
class WeightQuantizer:
    """Turns the weights of a shard into `bits`-bit codes and back.

    Args:
        bits: bits an element, 2 to 8.
        block: elements that share an alpha, a multiple of 8.

    Raises:
        ValueError: a setting is none of these.
    """

    bits: int = 4
    block: int = 256

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"weight_bits: must be 2 to 8 to be quantized, is {self.bits}")
        if self.block < 8 or self.block % 8:
            raise ValueError(f"weight_block: must be a multiple of 8, is {self.block}")

    @property
    def span(self) -> int:
        """Elements of 8 blocks; the last span of a segment is shorter, and so are its blocks."""
        return 8 * self.block

    def layout(self, shard: Shard, chosen: np.ndarray | None = None) -> Shard:
        """The chosen segments of a shard, cut into spans of weights: the spans of gradients may be others.

        Args:
            shard: made for any span.
            chosen: bool [segments]; default all.
        """
        pick = np.ones(len(shard.table), dtype=bool) if chosen is None else chosen
        table, numels = shard.table[pick].copy(), shard.table[pick, 1]
        spans = -(-numels // self.span)
        groups = np.where(numels > 0, (spans - 1) * self.block + -(-(numels - (spans - 1) * self.span) // 8), 0)
        table[:, 2], table[:, 3] = np.cumsum(groups) - groups, np.cumsum(spans) - spans
        table[:, 4] = 0
        return Shard(
            table, shard.tensors[pick], shard.rows[pick], int(numels.sum()), int(groups.sum()), int(spans.sum())
        )

    def size(self, part: Shard) -> int:
        """Bytes of the payload of a shard that `layout` made."""
        return part.groups * self.bits + part.spans * LAQ_BYTES

    def encode(self, w: Tensor, v: Tensor, part: Shard, out: Tensor) -> None:
        """Quantizes w under the second moments v (both fp32, as long as `part` asks) into out [size(part) or more]."""
        assert out.numel() >= self.size(part), out.shape
        assert out.dtype == torch.uint8, out.dtype
        assert w.shape == v.shape, (w.shape, v.shape)
        assert w.dtype == v.dtype == torch.float32, (w.dtype, v.dtype)
        if w.device.type == "cpu":
            from . import cpu, laq_kernels

            weights, moments, codes = w.numpy(), v.numpy(), out.numpy()
            limits = STARTS, ALTERNATIONS, tolerance_of(self.bits)

            def work(rows: np.ndarray, _: np.ndarray) -> None:
                laq_kernels.encode_table(weights, moments, rows, codes, self.span, self.bits, *limits)

            cpu.spread(np.ascontiguousarray(part.table), self.span, 0, work)
        else:
            encode_table(w, v, part.table, out, self.span, self.bits)

    def decode(self, payload: Tensor, part: Shard, out: Tensor) -> None:
        """Writes the weights of a payload [size(part) or more] into out, fp32, where `part` says."""
        assert payload.numel() >= self.size(part), payload.shape
        assert payload.dtype == torch.uint8, payload.dtype
        assert out.dtype == torch.float32, out.dtype
        if out.device.type == "cpu":
            from . import cpu, laq_kernels

            codes, values_of = payload.numpy(), out.numpy()

            def work(rows: np.ndarray, _: np.ndarray) -> None:
                laq_kernels.decode_table(codes, rows, values_of, self.span, self.bits)

            cpu.spread(np.ascontiguousarray(part.table), self.span, 0, work)
        else:
            decode_table(payload, part.table, out, self.span, self.bits)


def _parts(numel: int, span: int) -> list[tuple[int, int, int]]:
    """(first element, spans, elements of each) of a segment's whole spans and of its short last one, if there are."""
    whole, rest = divmod(numel, span)
    return [part for part in ((0, whole, span), (whole * span, 1, rest)) if part[1] and part[2]]


def encode_table(w: Tensor, v: Tensor, table: np.ndarray, out: Tensor, span: int, bits: int) -> None:
    """Like the kernel's, in plain torch."""
    n = level_count(bits)
    for start, numel, groups_before, spans_before, _ in table.tolist():
        at = groups_before * bits + LAQ_BYTES * spans_before
        for first, rows, length in _parts(numel, span):
            groups, low = -(-length // 8), start + first
            pieces = (x[low : low + rows * length].view(rows, length) for x in (w, v.sqrt() + EPSILON))
            blocks, d = (torch.nn.functional.pad(x, (0, groups * 8 - length)).view(rows * 8, groups) for x in pieces)
            alpha = search(blocks, d, bits, tolerance=tolerance_of(bits))
            half = ((alpha.view(torch.int32) + 0x4000) >> 15).clamp(max=0xFEFF)
            half = torch.where(alpha.isnan(), 0xFFFF, half)
            codes = nearest(blocks, (half << 15).view(torch.float32), bits) + n
            heads = torch.stack([half & 255, half >> 8], dim=1).view(rows, LAQ_BYTES).to(torch.uint8)
            payload = torch.cat([heads, pack(codes.view(rows, 8 * groups), bits)], dim=1)
            out[at : at + payload.numel()] = payload.flatten()
            at += payload.numel()


def decode_table(payload: Tensor, table: np.ndarray, out: Tensor, span: int, bits: int) -> None:
    """Like the kernel's, in plain torch."""
    n = level_count(bits)
    for start, numel, groups_before, spans_before, _ in table.tolist():
        at = groups_before * bits + LAQ_BYTES * spans_before
        for first, rows, length in _parts(numel, span):
            groups, low = -(-length // 8), start + first
            size = LAQ_BYTES + groups * bits
            bytes_of_rows = payload[at : at + rows * size].view(rows, size)
            halves = bytes_of_rows[:, :LAQ_BYTES].reshape(rows * 8, 2).to(torch.int32)
            alpha = ((halves[:, 0] | (halves[:, 1] << 8)) << 15).view(torch.float32)
            levels = (unpack(bytes_of_rows[:, LAQ_BYTES:].contiguous(), bits) - n).view(rows * 8, groups).float()
            step = alpha / torch.full_like(alpha, float(n))
            weights = (levels * step.unsqueeze(1)).view(rows, 8 * groups)[:, :length]
            out[low : low + rows * length] = weights.flatten()
            at += rows * size
