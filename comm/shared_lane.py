"""All-reduce under scales that the ranks share (shared_scale.py): two more short messages, and no second error.

Four messages a portion: scales to the owners, merged scales back, codes to the owners, sums back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .lanes import DOWN, UP, Context, Portion, QuantizedLane, first_elements
from .layout import Shard, joined
from .link import Exchange
from .reference import key_words
from .shared_scale import SharedScale


@dataclass(frozen=True)
class _Plan:
    """Of one portion."""

    parts: list[Shard]
    whole: Shard
    tensors: np.ndarray
    first_elements: Tensor


class SharedScaleLane(QuantizedLane):
    """`QuantizedLane` with integer sums."""

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.shared = SharedScale(self.up, self.down, context.world_size)
        self._shared_plans: dict[Portion, _Plan] = {}

    def _shared_plan(self, portion: Portion) -> _Plan:
        if portion not in self._shared_plans:
            parts = [self.cut.shard(portion.pieces, portion.starts, rank) for rank in range(self.context.world_size)]
            whole = joined(parts)
            self._shared_plans[portion] = _Plan(
                parts,
                whole,
                np.array(portion.tensors, dtype=np.int64),
                first_elements(whole, self.up.span).to(self.context.device),
            )
        return self._shared_plans[portion]

    def exchange(self, buffer: Tensor, portion: Portion, step: int, tag: int) -> Exchange:
        context, plan, shared = self.context, self._shared_plan(portion), self.shared
        rank, device = context.rank, buffer.device
        others = [peer for peer in range(context.world_size) if peer != rank]
        mine = plan.parts[rank]
        residual = context.residual(portion.bucket)

        def empty(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.uint8, device=device)

        def keys(part: Shard, *prefix: int) -> np.ndarray:
            return key_words((context.seed, step, *prefix), plan.tensors[part.tensors])

        def to_owners(tag: int, whole: Tensor, sizes: list[int]) -> Exchange:
            """Sends every part of `whole` to its owner; leaves everybody's of this rank's part in `received`."""
            parts = whole.split(sizes)
            for peer in others:
                received[peer] = empty(sizes[rank])
            received[rank] = parts[rank]
            outgoing = {peer: parts[peer] for peer in others if sizes[peer]}
            context.meter.add(up=sum(part.numel() for part in outgoing.values()))
            yield context.link.start(tag, outgoing, {peer: received[peer] for peer in others if sizes[rank]})

        def to_all(tag: int, own: Tensor, whole: Tensor, sizes: list[int]) -> Exchange:
            """Sends this rank's part to everybody; leaves everybody's in `whole`."""
            parts = whole.split(sizes)
            parts[rank].copy_(own)
            outgoing = dict.fromkeys(others, own) if sizes[rank] else {}
            context.meter.add(down=own.numel() * len(outgoing))
            yield context.link.start(tag, outgoing, {peer: parts[peer] for peer in others if sizes[peer]})

        received: dict[int, Tensor] = {}
        scale_sizes = [shared.scale_size(part) for part in plan.parts]
        scales = empty(shared.scale_size(plan.whole))
        shared.scales(buffer, plan.whole, scales, residual)
        yield from to_owners(tag, scales, scale_sizes)
        merged = shared.merge(torch.stack([received[peer] for peer in range(context.world_size)]))
        yield from to_all(tag + 1, merged, scales, scale_sizes)

        codes = empty(shared.up_size(plan.whole))
        shared.encode(buffer, plan.whole, keys(plan.whole, UP, rank), scales, codes, residual)
        yield from to_owners(tag + 2, codes, [shared.up_size(part) for part in plan.parts])
        sums = shared.sums(mine, device)
        for peer in range(context.world_size):
            shared.add(received[peer], mine, sums, first=peer == 0)
        own = empty(shared.down_size(mine))
        shared.encode_sums(sums, mine, merged, keys(mine, DOWN), own)
        everybody = empty(shared.down_size(plan.whole))
        yield from to_all(tag + 3, own, everybody, [shared.down_size(part) for part in plan.parts])
        shared.decode_sums(everybody, plan.whole, scales, buffer)

    def finite(self, buffer: Tensor, portion: Portion) -> Tensor:
        return torch.isfinite(buffer[self._shared_plan(portion).first_elements]).all()
