"""A worker's end of the exchange with dedicated servers: flat buffers, error feedback, pushes and pulls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from . import mpi_link as wire
from .feedback import ErrorFeedback
from .meter import WireMeter
from .mpi_link import Link, Message
from .owner import WeightFormat
from .reference import key_words
from .server_config import Plan, ServerConfig, Tensors, to_json

UP = 0
"""Part of the rounding's key, as in the other routes."""


class WorkerEnd:
    """What a worker sends to the servers and gets from them.

    Args:
        link: this rank's.
        config: the same on all workers.
        tensors: the parameters, in the order of the tensors that the methods are given.
    """

    def __init__(self, link: Link, config: ServerConfig, tensors: Tensors) -> None:
        self.link, self.config, self.tensors = link, config, tensors
        self.index = link.workers.index(link.rank)
        self.plan = Plan(config, tensors, len(link.servers))
        self.feedback = ErrorFeedback() if config.error_feedback else None
        self.meter = WireMeter()
        self.norm = 0.0
        """Of the mean gradient in the last update that was made, before it was clipped."""
        self.failed = False
        """Whether a server was found dead: the job cannot end in peace then."""
        self._formats = [
            WeightFormat(shard, self.plan.matrices(server), config.weight_bits, config.weight_block)
            for server, shard in enumerate(self.plan.shards)
        ]
        self._gradient = torch.zeros(tensors.numel)
        self._weights = torch.zeros(tensors.numel)
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in link.servers]

    def hello(self, parameters: Sequence[Tensor], frozen: Sequence[Tensor]) -> None:
        """Introduces this worker to the servers; worker 0 gives them the weights to begin with.

        Args:
            parameters: those that are trained.
            frozen: the others, which come from worker 0 once and for all.
        """
        self.plan.warm_up()
        for server in self.link.servers:
            self.link.send(server, wire.note(wire.HELLO, to_json(self.config, self.tensors)))
        if self.index == 0:
            self._flatten(self._weights, parameters)
            for peer, shard in zip(self.link.servers, self.plan.shards, strict=True):
                pieces = [self._weights[start : start + numel] for start, numel in shard.table[:, :2].tolist()]
                body = torch.cat([torch.empty(0), *pieces])
                buffer = wire.packet(4 * body.numel())
                buffer[wire.HEADER :] = body.view(torch.uint8)
                self.link.send(peer, wire.sealed(buffer, wire.INIT))
        self._share(frozen)

    def _share(self, tensors: Sequence[Tensor]) -> None:
        """Makes tensors equal on all workers: those of worker 0."""
        first, *others = self.link.workers
        flats = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        buffer = wire.packet(sum(flat.numel() for flat in flats))
        if self.index == 0:
            torch.cat([torch.empty(0, dtype=torch.uint8), *flats], out=buffer[wire.HEADER :])
            for peer in others:
                self.link.send(peer, wire.sealed(buffer, wire.INIT))
            return

        def take(peer: int, message: Message) -> bool:
            if message.kind != wire.INIT or message.body.numel() != buffer.numel() - wire.HEADER:
                raise RuntimeError(f"{self.link.name(peer)} has other parameters that need no gradient")
            for tensor, piece in zip(tensors, message.body.split([flat.numel() for flat in flats]), strict=True):
                tensor.data.copy_(piece.clone().view(tensor.dtype).view(tensor.shape))
            return True

        self.link.wait([first], take, wire.JOIN_TIMEOUT)

    def push(self, gradients: Sequence[Tensor | None], *, update: int, lr: float, weight: float) -> None:
        """Sends every server its part of the gradients; None where a parameter has none.

        Args:
            gradients: one a parameter.
            update: part of the rounding's key.
            lr, weight: go along.
        """
        present = np.array([gradient is not None for gradient in gradients])
        self._flatten(self._gradient, gradients)
        pieces = self._gradient.split(list(self.tensors.numels))
        mine = [piece for piece, has in zip(pieces, present, strict=True) if has]
        # A sum may leave fp32 where no element has: only then look at them all.
        finite = all(bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all()) for x in mine)
        if finite and self.config.clip_norm and self.config.staleness:
            norm = math.sqrt(math.fsum(float(x.double().square().sum()) for x in mine))
            for x in mine:
                x.mul_(min(1.0, self.config.clip_norm / (norm + 1e-6)))
        for server, peer in enumerate(self.link.servers):
            buffer = self._encode(server, present, update) if finite else wire.packet(0)
            flags = wire.FINITE if finite else 0
            self.link.send(peer, wire.sealed(buffer, wire.PUSH, flags=flags, update=update, lr=lr, weight=weight))
            self.meter.add(up=buffer.numel())
        self.meter.updates += 1
        self.meter.instead(int(np.dot(present, self.tensors.numels)), len(self.link.workers))

    def _encode(self, server: int, present: np.ndarray, update: int) -> Tensor:
        """A push: which parameters there are, a bit each, and their codes."""
        part = self.plan.part(server, present)
        size = wire.HEADER + self.plan.push_size(server, present)
        if self._buffers[server].numel() < size:
            self._buffers[server] = torch.empty(size, dtype=torch.uint8)
        buffer = self._buffers[server][:size]
        bitmap, codes = buffer[wire.HEADER :][: self.plan.bitmap], buffer[wire.HEADER + self.plan.bitmap :]
        bitmap.copy_(torch.from_numpy(np.packbits(present, bitorder="little")))
        keys = key_words((self.config.seed, update, UP, self.index), part.tensors)
        if self.feedback is None:
            self.plan.quantizer.encode_shard(self._gradient, part, keys, codes)
        else:
            residual = self.feedback.flat(
                tuple(range(len(self.tensors.names))), self.tensors.numels, torch.device("cpu")
            )
            self.plan.quantizer.encode_feedback(self._gradient, residual, part, keys, codes)
        return buffer

    def _flatten(self, flat: Tensor, tensors: Iterable[Tensor | None]) -> None:
        """Copies tensors to where they begin in a flat buffer."""
        for start, tensor in zip(self.tensors.starts, tensors, strict=True):
            if tensor is not None:
                tensor = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
                flat[start : start + tensor.numel()] = tensor.reshape(-1)

    def pull(self, parameters: Sequence[Tensor], timeout: float) -> None:
        """Asks for the weights as they are and puts them into the parameters."""
        for peer in self.link.servers:
            self.link.send(peer, wire.sealed(wire.packet(0), wire.PULL))
        self.receive(parameters, timeout)

    def receive(self, parameters: Sequence[Tensor], timeout: float) -> bool:
        """Waits for all servers' weights and puts them into the parameters; False where the update was skipped."""
        applied = True
        squares = dict.fromkeys(self.link.servers, 0.0)

        def take(peer: int, message: Message) -> bool:
            nonlocal applied
            squares[peer] = message.weight
            if message.kind != wire.WEIGHTS:
                raise RuntimeError(f"{self.link.name(peer)} answered {wire.NAMES[message.kind]}, not weights")
            form = self._formats[self.link.servers.index(peer)]
            if message.flags & wire.APPLIED:
                if message.body.numel() != form.size:
                    raise RuntimeError(f"{self.link.name(peer)} sent {message.body.numel()} bytes, not {form.size}")
                form.decode(message.body, self._weights)
            else:
                applied = False
            self.meter.add(down=wire.HEADER + message.body.numel())
            return True

        self._wait(take, timeout)
        if applied:
            self.norm = math.sqrt(math.fsum(squares.values()))
            pieces = self._weights.split(list(self.tensors.numels))
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.data.copy_(piece.view(parameter.shape))
        return applied

    def ask(self, kind: int, folder: str) -> str:
        """Has all servers save to a folder (empty: this worker could not) or load; what went wrong, or nothing."""
        return self._order({peer: wire.note(kind, folder) for peer in self.link.servers})

    def _order(self, orders: Mapping[int, Tensor]) -> str:
        failures: list[str] = []

        def take(peer: int, message: Message) -> bool:
            if message.kind == wire.FAILED:
                failures.append(f"{self.link.name(peer)}: {message.text}")
            return message.kind in (wire.DONE, wire.FAILED)

        for peer, order in orders.items():
            self.link.send(peer, order)
        self._wait(take, self._long)
        return "; ".join(sorted(failures))

    @property
    def _long(self) -> float:
        """Seconds of silence where a server packs its state or writes it to a disk, and cannot say that it lives."""
        return max(self.config.timeout, 600.0)

    def fetch(self) -> dict[int, Tensor]:
        """The states of those servers that this worker keeps, uint8, by index; all workers together."""
        states: dict[int, Tensor] = {}

        def take(peer: int, message: Message) -> bool:
            if message.kind == wire.STATE and message.body.numel():
                states[self.link.servers.index(peer)] = message.body.clone()
            return message.kind == wire.STATE

        for peer in self.link.servers:
            self.link.send(peer, wire.note(wire.FETCH))
        self._wait(take, self._long)
        return states

    def put(self, states: Mapping[int, Tensor]) -> str:
        """Gives servers their states back, by index; each must come from one worker. What went wrong, or nothing."""
        orders: dict[int, Tensor] = {}
        for server, peer in enumerate(self.link.servers):
            state = states.get(server, torch.empty(0, dtype=torch.uint8))
            order = wire.packet(state.numel())
            order[wire.HEADER :] = state
            orders[peer] = wire.sealed(order, wire.PUT)
        return self._order(orders)

    def _wait(self, take: wire.Taker, timeout: float) -> None:
        try:
            self.link.wait(self.link.servers, take, timeout)
        except BaseException:
            self.failed = True
            raise

    def bye(self, *, last: bool = True) -> None:
        """Lets the servers go, or, where another training may follow, wait for it."""
        if self.failed:
            self.link.abort(1)
        goodbye(self.link, self.config.timeout, last=last)


def goodbye(link: Link, timeout: float, *, last: bool) -> None:
    """Tells all servers that this worker leaves; `last`: for good."""
    for server in link.servers:
        link.send(server, wire.sealed(wire.packet(0), wire.BYE, flags=wire.LAST if last else 0))
    link.flush(timeout)
