"""A parameter server on a rank of its own: `python -m tenko.comm.dedicated` runs it.

It holds the full-precision weights and Adam's state of its shard. Synchronous: it adds the gradients of all workers in
the order of ranks, makes one update, and sends the same quantized weights to all. Asynchronous: it makes an update of
each gradient as it comes, and lets a worker that is too far ahead of the slowest wait for its answer.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import mpi_link as wire
from . import server_state
from .mpi_link import Link, Message
from .owner import ShardOwner
from .server_config import Plan, difference, from_json

logger = logging.getLogger(__name__)


def greetings(link: Link) -> dict[int, str] | None:
    """What every worker tells in its hello; None where they have gone, as no other training follows.

    A program may prepare its data for hours before the first of them says hello.

    Raises:
        ValueError: some train, others have gone.
        Silence: only some said anything.
    """
    told: dict[int, str | None] = {}
    limit = math.inf
    while len(told) < len(link.workers):
        for peer in link.workers:
            if peer in told or (message := link.poll(peer)) is None:
                continue
            if message.kind not in (wire.HELLO, wire.BYE):
                raise ValueError(f"{link.name(peer)} said {wire.NAMES[message.kind]} before hello")
            told[peer] = message.text if message.kind == wire.HELLO else None
            limit = min(limit, time.monotonic() + wire.JOIN_TIMEOUT)
        if time.monotonic() > limit:
            missing = ", ".join(link.name(peer) for peer in link.workers if peer not in told)
            raise wire.Silence(f"{missing} said nothing for {wire.JOIN_TIMEOUT:g} s; it is dead or hangs")
        link.rest()
    said = {peer: text for peer, text in told.items() if text is not None}
    if len(said) not in (0, len(told)):
        gone = ", ".join(link.name(peer) for peer in told if peer not in said)
        raise ValueError(f"{gone}: left, while others begin a training")
    return said or None


class Server:
    """Serves one shard until all workers have said goodbye.

    Args:
        link: this rank's.
        told: the workers' hellos.

    Raises:
        ValueError: what the workers told is wrong, or they disagree.
        Silence: a worker or another server is not there any more.
    """

    def __init__(self, link: Link, told: dict[int, str]) -> None:
        self._link = link
        self.index = link.servers.index(link.rank)
        first, *others = link.workers
        self.config, tensors = from_json(told[first])
        for peer in others:
            config, theirs = from_json(told[peer])
            for key, value in asdict(config).items():
                if value != (mine := getattr(self.config, key)):
                    raise ValueError(f"{key}: {link.name(first)} has {mine}, {link.name(peer)} {value}")
            if where := difference(tensors, theirs):
                raise ValueError(f"model: {link.name(first)} and {link.name(peer)} differ: {where}")
        self.plan = Plan(self.config, tensors, len(link.servers))
        self.shard = self.plan.shards[self.index].compact()
        self.plan.warm_up()
        weights = torch.empty(self.shard.numel)

        def begin(peer: int, message: Message) -> bool:
            if message.kind != wire.INIT or message.body.numel() != 4 * weights.numel():
                raise ValueError(f"{link.name(peer)}: the initial weights are missing or of another size")
            weights.view(torch.uint8).copy_(message.body)
            return True

        link.wait([first], begin, wire.JOIN_TIMEOUT)
        self.owner = ShardOwner(
            weights,
            self.shard,
            matrices=self.plan.matrices(self.index),
            weight_bits=self.config.weight_bits,
            block=self.config.weight_block,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )
        self.updates = dict.fromkeys(link.workers, 0)
        """Pushes of every worker that has not left."""
        self._total = torch.empty(self.shard.numel)
        self._square = 0.0
        """Of the norm of this shard's last mean gradient, before it was clipped."""
        self._asking: dict[int, Message] = {}
        """Messages that wait for an answer."""
        self._since: dict[int, float] = {}
        self._told = time.monotonic()
        self._answers: dict[int, Tensor] = {}

    def run(self) -> bool:
        """Serves; returns whether another training may follow."""
        over = False
        while self.updates:
            heard = False
            for peer in list(self.updates):
                if peer in self._asking:
                    continue
                message = self._link.poll(peer)
                if message is None:
                    continue
                heard = True
                if message.kind == wire.BYE:
                    over = over or bool(message.flags & wire.LAST)
                    del self.updates[peer]
                    continue
                self._asking[peer], self._since[peer] = message, time.monotonic()
                if message.kind == wire.PUSH:
                    self.updates[peer] += 1
                    if self.config.staleness:
                        self._apply([peer])
            if heard:
                self._answer()
            self._keep_waiting()
            self._link.rest()
        self._link.flush(self.config.timeout)
        return not over

    def _answer(self) -> None:
        """Answers all who need not wait longer."""
        if not self.updates:
            return
        kinds = {peer: message.kind for peer, message in self._asking.items()}
        everybody = len(kinds) == len(self.updates)
        for peer in [peer for peer, kind in kinds.items() if kind == wire.PULL]:
            self._send_weights([peer])
        if not everybody and not self.config.staleness:
            return
        pushed = [peer for peer in sorted(kinds) if kinds[peer] == wire.PUSH]
        if self.config.staleness:
            slowest = min(self.updates.values())
            self._reply([peer for peer in pushed if self.updates[peer] - slowest <= self.config.staleness])
        elif len(pushed) == len(self.updates):
            self._apply(pushed)
            self._reply(pushed)
        kinds = {peer: message.kind for peer, message in self._asking.items()}
        if len(kinds) < len(self.updates) or not kinds:
            return
        what = set(kinds.values())
        if what == {wire.SAVE} or what == {wire.LOAD}:
            self._store(what == {wire.SAVE})
        elif what == {wire.FETCH}:
            self._hand_out()
        elif what == {wire.PUT}:
            self._take_in()
        else:
            said = ", ".join(f"{self._link.name(peer)} {wire.NAMES[kind]}" for peer, kind in sorted(kinds.items()))
            raise ValueError(f"workers wait for each other: {said}; all must do the same after as many updates")

    def _reply(self, peers: list[int]) -> None:
        """Sends weights to those whose gradient was applied, and a word to those whose was not."""
        applied = [peer for peer in peers if self._asking[peer].flags & wire.FINITE]
        for peer in peers:
            if peer not in applied:
                self._done(peer, wire.sealed(wire.packet(0), wire.WEIGHTS))
        if applied:
            self._send_weights(applied)

    def _send_weights(self, peers: list[int]) -> None:
        # One buffer where all get the same; a buffer each where a slow one may still be read when the next is written.
        everybody = len(peers) == len(self.updates)
        answer = self._buffer(-1 if everybody else peers[0])
        self.owner.encode(answer[wire.HEADER :])
        wire.sealed(answer, wire.WEIGHTS, flags=wire.APPLIED, weight=self._square)
        for peer in peers:
            self._done(peer, answer if everybody or peer == peers[0] else self._buffer(peer).copy_(answer))

    def _buffer(self, peer: int) -> Tensor:
        if peer not in self._answers:
            self._answers[peer] = wire.packet(self.owner.payload_size)
        return self._answers[peer]

    def _done(self, peer: int, answer: Tensor) -> None:
        self._link.send(peer, answer)
        del self._asking[peer], self._since[peer]

    def _apply(self, peers: list[int]) -> None:
        """One update with the mean of these gradients; none if one of them is not finite, which all are told."""
        messages = [self._asking[peer] for peer in peers]
        if not all(message.flags & wire.FINITE for message in messages):
            for message in messages:
                message.flags &= ~wire.FINITE
            return
        if len({message.lr for message in messages}) > 1:
            said = ", ".join(f"{self._link.name(p)} {m.lr}" for p, m in zip(peers, messages, strict=True))
            raise ValueError(f"lr: must be the same on all workers, is {said}")
        weight = math.fsum(message.weight for message in messages)
        touched = np.zeros(len(self.plan.tensors.names), dtype=bool)
        self._total.zero_()
        for message in messages:
            bits = np.unpackbits(message.body[: self.plan.bitmap].numpy(), count=len(touched), bitorder="little")
            present = bits.astype(bool)
            part = self.plan.part(self.index, present, compact=True)
            codes = message.body[self.plan.bitmap :]
            if codes.numel() != part.size(self.config.bits):
                raise ValueError(
                    f"a push of {codes.numel()} bytes, where its gradients need {part.size(self.config.bits)}"
                )
            factor = message.weight / weight if weight > 0 else 0.0
            self.plan.quantizer.decode_shard(codes, part, self._total, factor=factor, add=True)
            touched |= present
        self._square = float(torch.linalg.vector_norm(self._total)) ** 2
        if self.config.clip_norm and not self.config.staleness:
            norm = self._norm()
            self._total.mul_(min(1.0, self.config.clip_norm / (norm + 1e-6)))
        self.owner.step(self._total, messages[0].lr, touched[self.shard.tensors])

    def _norm(self) -> float:
        """Of the mean gradient of the whole model; the squares are added in the order of servers, the same on all."""
        squares = {self.index: float(self._total.double().square().sum())}
        others = [peer for peer in self._link.servers if peer != self._link.rank]
        for peer in others:
            self._link.send(peer, wire.sealed(wire.packet(0), wire.NORM, weight=squares[self.index]))

        def take(peer: int, message: Message) -> bool:
            squares[self._link.servers.index(peer)] = message.weight
            return message.kind == wire.NORM

        self._link.wait(others, take, self.config.timeout, self._keep_waiting)
        return math.sqrt(math.fsum(squares[server] for server in sorted(squares)))

    def _keep_waiting(self) -> None:
        """Tells those who wait that this server lives; gives up a worker that others have waited for too long."""
        now = time.monotonic()
        if now - self._told < self.config.timeout / 4:
            return
        self._told = now
        for peer in self.updates:
            if peer in self._asking or self._link.receiving(peer):
                self._link.send(peer, wire.sealed(wire.packet(0), wire.WAIT))
        missing = [peer for peer in self.updates if peer not in self._asking]
        if missing and any(now - since > self.config.worker_timeout for since in self._since.values()):
            names = ", ".join(map(self._link.name, missing))
            raise wire.Silence(f"{names} pushed nothing for {self.config.worker_timeout:g} s, and others wait")

    def _store(self, save: bool) -> None:
        """Saves or loads this server's state, and tells all workers how it went."""
        asked = {message.text for message in self._asking.values()}
        answer = wire.note(wire.DONE)
        try:
            if "" in asked:
                raise OSError("a worker could not write its part")
            if len(asked) > 1:
                raise ValueError(f"folder: workers name different ones: {', '.join(sorted(asked))}")
            path = Path(asked.pop()) / f"server-{self.index}.safetensors"
            self._save(path) if save else self._load(path)
        except (OSError, ValueError) as error:
            answer = wire.note(wire.FAILED, str(error))
        for peer in list(self._asking):
            self._done(peer, answer)

    def _hand_out(self) -> None:
        """Gives this server's state to one of the workers, which keeps it with its own; the others get a word."""
        keeper = self._link.workers[self.index % len(self._link.workers)]
        for peer in list(self._asking):
            self._done(peer, wire.note(wire.STATE, save(self._state()) if peer == keeper else b""))

    def _take_in(self) -> None:
        """Goes on from the state that a worker has kept, whichever does, and tells all how it went."""
        bodies = [message.body for _, message in sorted(self._asking.items()) if message.body.numel()]
        answer = wire.note(wire.DONE)
        try:
            if len(bodies) != 1:
                raise ValueError(f"{len(bodies)} workers have its state")
            self._take(load(bytes(bodies[0].numpy())), "its state")
        except (ValueError, SafetensorError) as error:
            answer = wire.note(wire.FAILED, str(error))
        for peer in list(self._asking):
            self._done(peer, answer)

    def _state(self) -> dict[str, Tensor]:
        state = self.owner.state_dict()
        state["table"] = torch.from_numpy(self.shard.table.copy())
        state["tensors"] = torch.from_numpy(self.shard.tensors.copy())
        state["updates"] = torch.tensor([self.updates.get(peer, 0) for peer in self._link.workers])
        return state

    def _take(self, state: dict[str, Tensor], where: Path | str) -> None:
        for name, mine in (("table", self.shard.table), ("tensors", self.shard.tensors)):
            if name not in state or not np.array_equal(state[name].numpy(), mine):
                raise ValueError(f"{where}: {name}: of another model, number of servers or block size")
        self.owner.load_state_dict(state)
        # As many as any has made: workers save after as many updates, and others may go on than have saved.
        self.updates = dict.fromkeys(self.updates, int(state["updates"].max()))

    def _save(self, path: Path) -> None:
        server_state.write(path, self._state(), {"format": "tenko-server-1"})

    def _load(self, path: Path) -> None:
        state, facts = server_state.read(path)
        if facts.get("format") != "tenko-server-1":
            raise ValueError(f"{path}: format: must be tenko-server-1, is {facts.get('format')}")
        if "updates" not in state or state["updates"].shape != (len(self._link.workers),):
            raise ValueError(f"{path}: updates: must be of {len(self._link.workers)} workers")
        self._take(state, path)


def main() -> int:
    """Serves, on this rank of an MPI job. Exit status 2 for wrong settings, 1 for a peer that died."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    link = None
    # mpirun sends USR1 on to every rank. It is a notice to the workers: they save, and then let this server go. TERM is
    # one too where SLURM sends it, by `srun --mpi=pmix`; mpirun itself ends ranks by it when another has failed.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if "SLURM_STEP_ID" in os.environ and not {"OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"} & os.environ.keys():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wire.end_with_parent()
    wire.abort_on_exceptions()
    try:
        link = wire.join(wire.SERVER)
        while (told := greetings(link)) is not None and Server(link, told).run():
            pass
    except (ValueError, RuntimeError) as error:
        who = link.name(link.rank) if link is not None else "server"
        logger.error("%s: %s", who, str(error).splitlines()[0])
        code = 2 if isinstance(error, ValueError) else 1
        if link is not None:
            link.abort(code)
        return code
    return 0
