"""Two levels: full precision between the ranks of a node, quantized between nodes.

With 16 nodes of 4 GPUs, one level of 3/4 bits sends 3.3 bytes an element through a node's network card, two levels
0.82. Rank l of a node owns slice l of the model: it adds up its node's gradients there, exchanges the slice with the
ranks l of the other nodes, and hands the mean to its node. Error feedback belongs to the slice's owner; which elements
those are is a function of the model (layout.py), so residuals survive a rebuild of the buckets.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .lanes import Context, Portion, QuantizedLane, SraPlan, all_finite, gather, scatter
from .layout import Shard
from .link import Exchange


@dataclass(frozen=True)
class _Slices:
    """Of one portion."""

    shards: list[Shard]
    """By local rank, in the bucket."""
    own: Shard
    """This rank's, in a buffer of its own."""
    between: SraPlan


class NodesLane(QuantizedLane):
    """`QuantizedLane` between nodes."""

    def bind(self, context: Context) -> None:
        super().bind(context)
        nodes = context.nodes
        self.node = next(i for i, ranks in enumerate(nodes) if context.rank in ranks)
        self.local = nodes[self.node].index(context.rank)
        self.mates = nodes[self.node]
        self.across = [ranks[self.local] for ranks in nodes]
        self.cut = self._cut(len(nodes) * len(self.mates))
        self._slices: dict[Portion, _Slices] = {}

    def _slices_of(self, portion: Portion) -> _Slices:
        if portion not in self._slices:
            n = len(self.across)
            shards = [
                self.cut.shard(portion.pieces, portion.starts, local * n, (local + 1) * n)
                for local in range(len(self.mates))
            ]
            own = shards[self.local].compact()
            # The slice lies in a buffer of its own: where would the tensor of each piece begin there?
            pieces = [portion.pieces[position] for position in own.tensors]
            starts = (own.table[:, 0] - own.table[:, 4] * self.cut.span).tolist()
            between = SraPlan(
                self.cut, pieces, starts, self.across, self.context, self.up, self.down, first=self.local * n
            )
            self._slices[portion] = _Slices(shards, own, between)
        return self._slices[portion]

    def exchange(self, buffer: Tensor, portion: Portion, step: int, tag: int) -> Exchange:
        context, slices = self.context, self._slices_of(portion)
        others = [mate for mate in self.mates if mate != context.rank]
        outgoing = {
            mate: gather(buffer, shard).view(torch.uint8)
            for mate, shard in zip(self.mates, slices.shards, strict=True)
            if mate != context.rank and shard.numel
        }
        size = slices.own.numel
        incoming = {mate: buffer.new_empty(size) for mate in others if size}
        context.meter.add(node=sum(o.numel() for o in outgoing.values()))
        yield context.link.start(tag, outgoing, {m: values.view(torch.uint8) for m, values in incoming.items()})

        own = gather(buffer, slices.shards[self.local])
        node_mean = torch.zeros_like(own)
        for mate in self.mates if size else []:
            node_mean += own if mate == context.rank else incoming[mate]
        node_mean /= len(self.mates)
        residual = context.residual(portion.bucket)
        mine = None if residual is None else gather(residual, slices.shards[self.local])
        yield from slices.between.up_leg(node_mean, step, tag + 1, mine)
        if residual is not None and mine is not None:
            scatter(mine, slices.shards[self.local], residual)
        yield from slices.between.down_leg(node_mean, step, tag + 2)

        outgoing = {mate: node_mean.view(torch.uint8) for mate in others if size}
        means = {
            mate: buffer.new_empty(shard.numel)
            for mate, shard in zip(self.mates, slices.shards, strict=True)
            if mate != context.rank and shard.numel
        }
        context.meter.add(node=sum(o.numel() for o in outgoing.values()))
        yield context.link.start(tag + 3, outgoing, {m: values.view(torch.uint8) for m, values in means.items()})
        for mate, shard in zip(self.mates, slices.shards, strict=True):
            if shard.numel:
                scatter(node_mean if mate == context.rank else means[mate], shard, buffer)

    def finite(self, buffer: Tensor, portion: Portion) -> Tensor:
        return all_finite(buffer, portion)


def find_nodes(group: dist.ProcessGroup | None, device: torch.device) -> list[list[int]]:
    """The ranks of every node, as the launcher tells them: torchrun, SLURM, or else by host name.

    Raises:
        ValueError: the nodes have different numbers of ranks.
    """
    if "LOCAL_WORLD_SIZE" in os.environ and "GROUP_RANK" in os.environ:
        name = f"torchrun {os.environ['GROUP_RANK']}"
    elif "SLURM_NODEID" in os.environ and "SLURM_PROCID" in os.environ:
        name = f"slurm {os.environ['SLURM_NODEID']}"
    else:
        name = f"host {socket.gethostname()}"
    mine = torch.tensor(list(name.encode()[:128].ljust(128)), dtype=torch.uint8, device=device)
    names = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(names, mine, group=group)
    by_node: dict[bytes, list[int]] = {}
    for rank, other in enumerate(names):
        by_node.setdefault(bytes(other.tolist()), []).append(rank)
    nodes = list(by_node.values())
    if len({len(ranks) for ranks in nodes}) > 1:
        sizes = ", ".join(str(len(ranks)) for ranks in nodes)
        raise ValueError(f"levels: node wants the same number of ranks on every node, they have {sizes}; use flat")
    return nodes
