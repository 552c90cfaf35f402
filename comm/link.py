"""A link moves bytes between ranks: one call hands over what goes out and where what comes in shall lie.

The exchange algorithms are generators that yield the handles of such calls. So the same straight-line code runs
pipelined over a mesh of sockets on CPUs, many buckets in flight, and in stream order over NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Generator["Handle", None, None]
"""An exchange under way: yields what it waits for, and is resumed when that is done."""


class Handle(Protocol):
    """One call of `Link.start` under way."""

    received: dict[int, Tensor]
    """By peer: what came in, complete once the handle is done."""

    def wait(self) -> None:
        """Returns once all has come in and what goes out may be overwritten; raises ConnectionError if a peer fails."""

    def then(self, call: Callable[[], None]) -> None:
        """Calls once it is done or has failed, perhaps at once, perhaps on another thread."""

    def check(self) -> None:
        """Raises ConnectionError if a peer failed."""


class Link(Protocol):
    """Between the ranks of one group."""

    rank: int
    world_size: int

    def start(self, tag: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor | None]) -> Handle:
        """Sends to some peers and receives from some, both at the same time.

        Args:
            tag: the same number on both sides, used once for a pair of ranks.
            outgoing: contiguous uint8 tensors by peer; they must stay as they are until the handle is done.
            incoming: uint8 tensors to fill, by peer; None where the length is not known.
        """

    def close(self) -> None:
        """Ends the link; a peer that still waits gets an error."""


def run(exchange: Exchange) -> None:
    """Runs an exchange to its end on this thread (and on CUDA's current stream)."""
    for handle in exchange:
        handle.wait()


class _GroupHandle:
    def __init__(self, works: list[Any], received: dict[int, Tensor]) -> None:
        self._works, self.received = works, received

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works = []

    def then(self, call: Callable[[], None]) -> None:
        self.wait()
        call()

    def check(self) -> None:
        pass


class GroupLink:
    """A link made of a process group's own sends and receives: NCCL on GPUs.

    Args:
        group: its backend decides on which devices the tensors must be.
        device: of the messages that tell lengths.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def start(self, tag: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor | None]) -> _GroupHandle:
        del tag  # every rank starts its exchanges in the same order
        unknown = [peer for peer, buffer in incoming.items() if buffer is None]
        received = {peer: buffer for peer, buffer in incoming.items() if buffer is not None}
        # All lengths or none: the call of a peer that sends one must meet a peer that expects one.
        if unknown:
            assert len(unknown) == len(incoming), "lengths are known of all peers or of none"
            sizes = {peer: torch.empty(1, dtype=torch.int64, device=self._device) for peer in unknown}
            own = {peer: torch.tensor([b.numel()], device=self._device) for peer, b in outgoing.items()}
            for work in self._batch(own, sizes):
                work.wait()
            received = {
                peer: torch.empty(int(size), dtype=torch.uint8, device=self._device) for peer, size in sizes.items()
            }
        return _GroupHandle(self._batch(outgoing, received), received)

    def _batch(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> list[Any]:
        calls = [
            dist.P2POp(op, buffer, group=self._group, group_peer=peer)
            for op, buffers in ((dist.isend, outgoing), (dist.irecv, incoming))
            for peer, buffer in sorted(buffers.items())
            if buffer.numel()
        ]
        return dist.batch_isend_irecv(calls) if calls else []

    def close(self) -> None:
        """Nothing to end: the group is the caller's."""
