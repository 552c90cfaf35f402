"""Scatter-reduce and all-gather of quantized gradients (SRA): every gradient is quantized twice, for any world
size.

The error of a ring that requantizes at every hop grows with the ring; here the owner of a shard adds n decoded
gradients in fp32, in the order of ranks, and sends one quantized mean. Owner and others decode the same bytes,
so all ranks end with bit-identical gradients; a NaN scale that one rank sent up comes down to all.

`mean_in_place` blocks until the exchange of one bucket is done. Who calls it, and on which thread, is the
hook's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Shard, joined, shards
from .meter import WireMeter
from .quantizer import Quantizer
from .reference import key_words

UP, DOWN = 0, 1
"""Parts of the rounding's key that tell the legs apart."""


@dataclass
class BucketPlan:
    """What the exchange of one bucket needs every time: its shards, their sizes, and room for the bytes."""

    tensors: tuple[int, ...]
    """Index of every tensor of the bucket in the model, in the bucket's order."""
    numels: tuple[int, ...]
    rank: int
    world_size: int
    up: Quantizer
    down: Quantizer
    device: torch.device
    parts: list[Shard] = field(init=False)
    whole: Shard = field(init=False)

    def __post_init__(self) -> None:
        assert self.up.block == self.down.block, (self.up, self.down)
        self.parts = shards(self.numels, self.up.span, self.world_size)
        self.whole = joined(self.parts)
        assert self.whole.size(self.up.bits) == sum(self.up_sizes)

    @property
    def mine(self) -> Shard:
        return self.parts[self.rank]

    @cached_property
    def up_sizes(self) -> list[int]:
        """Bytes that go up to every rank."""
        return [part.size(self.up.bits) for part in self.parts]

    @cached_property
    def down_size(self) -> int:
        """Bytes of the longest shard's mean; every owner sends that many, as all-gather wants them equal."""
        return max(part.size(self.down.bits) for part in self.parts)

    @cached_property
    def sent(self) -> Tensor:
        return torch.empty(sum(self.up_sizes), dtype=torch.uint8, device=self.device)

    @cached_property
    def received(self) -> Tensor:
        """All ranks' codes of this rank's shard [world_size, bytes]."""
        return torch.empty(self.world_size, self.up_sizes[self.rank], dtype=torch.uint8, device=self.device)

    @cached_property
    def total(self) -> Tensor:
        return torch.empty(self.mine.stop - self.mine.start, dtype=torch.float32, device=self.device)

    @cached_property
    def mean(self) -> Tensor:
        return torch.zeros(self.down_size, dtype=torch.uint8, device=self.device)

    @cached_property
    def means(self) -> Tensor:
        return torch.empty(self.world_size, self.down_size, dtype=torch.uint8, device=self.device)

    def keys(self, part: Shard, prefix: Sequence[int]) -> np.ndarray:
        """A key for every segment of `part`: of the prefix and the index of the tensor in the model."""
        return key_words(prefix, np.array(self.tensors, dtype=np.int64)[part.tensors])


def all_gather(output: Tensor, input: Tensor, group: dist.ProcessGroup | None) -> None:
    """Every rank's `input` [m], side by side in `output` [n * m]; the call was renamed in torch 2.13."""
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(output, input, group=group)


def mean_in_place(
    buffer: Tensor,
    plan: BucketPlan,
    *,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None,
    meter: WireMeter,
    residual: Tensor | None = None,
) -> None:
    """Replaces `buffer` [numel] by the quantized mean over all ranks, and counts what was sent.

    Args:
        buffer: the bucket's gradients, side by side; fp32, fp16 or bf16.
        plan: the bucket's plan.
        seed, step: parts of the rounding's key, with the tensor, the leg and (on the way up) the rank.
        group: where the collectives run.
        meter: counts the exchange.
        residual: error feedback [numel], fp32: added before the way up, left holding what the codes miss. NaN where
            the gradient was not finite: the caller clears it.
    """
    n, rank = plan.world_size, plan.rank
    keys = plan.keys(plan.whole, (seed, step, UP, rank))
    if residual is None:
        plan.up.encode_shard(buffer, plan.whole, keys, plan.sent)
    else:
        residual.add_(buffer)
        plan.up.encode_shard(residual, plan.whole, keys, plan.sent)
        plan.up.decode_shard(plan.sent, plan.whole, residual, factor=-1.0, add=True)
    mine = plan.up_sizes[rank]
    dist.all_to_all_single(plan.received.view(-1), plan.sent, [mine] * n, plan.up_sizes, group=group)

    for sender in range(n):
        plan.up.decode_shard(plan.received[sender], plan.mine, plan.total, factor=1 / n, add=sender > 0)
    plan.down.encode_shard(plan.total, plan.mine, plan.keys(plan.mine, (seed, step, DOWN)), plan.mean)
    all_gather(plan.means.view(-1), plan.mean, group)
    meter.count(up=plan.sent.numel() - mine, down=(n - 1) * plan.down_size, numel=buffer.numel(), world_size=n)

    whole = buffer if buffer.dtype == torch.float32 else torch.empty_like(buffer, dtype=torch.float32)
    for owner, part in enumerate(plan.parts):
        plan.down.decode_shard(plan.means[owner], part, whole[part.start : part.stop])
    if whole is not buffer:
        buffer.copy_(whole)
