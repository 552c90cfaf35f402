"""Which exchanges keep both directions of a shaped link busy? Times over the floor, gloo's beside plain sockets'.

    python benchmarks/duplex.py [--hosts 2 4] [--rate 1gbit] [--megabytes 20] [--repeat 5]

Every rank sends `--megabytes` to every other one and receives as much, each way at once; the floor is the bytes a rank
sends over the shaped rate. A time is that of the slowest rank. All ways run in turns in the same processes; the table
has the median and the range over the turns. 1.05 is what TCP's and Ethernet's headers leave.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types
from lab import Lab, bits_per_second, missing

CHUNK = 1 << 20
MESH_PORT = 29700


class Sockets:
    """Plain TCP between all ranks, moved by one loop that sends and receives at once.

    Args:
        port: where every rank listens, on its address in the lab.
        connections: per pair of ranks; with 2, each carries one direction.
        sndbuf: SO_SNDBUF in bytes; 0 leaves it to the kernel.
    """

    def __init__(self, port: int, *, connections: int = 1, sndbuf: int = 0) -> None:
        self.rank, self.n = dist.get_rank(), dist.get_world_size()
        self.out: dict[int, socket.socket] = {}
        self.into: dict[int, socket.socket] = {}
        listener = socket.create_server((f"10.77.0.{self.rank + 1}", port), backlog=64)
        dist.barrier()
        dialled = {}
        for peer in range(self.n):
            if peer == self.rank or (connections == 1 and peer > self.rank):
                continue
            s = dialled[peer] = socket.create_connection((f"10.77.0.{peer + 1}", port))
            s.sendall(bytes([self.rank]))
            self.out[peer] = s
            if connections == 1:
                self.into[peer] = s
        expected = self.n - 1 if connections == 2 else self.n - 1 - self.rank
        for _ in range(expected):
            s, _address = listener.accept()
            peer = s.recv(1)[0]
            self.into[peer] = s
            if connections == 1:
                self.out[peer] = s
        for s in {*self.out.values(), *self.into.values()}:
            s.setblocking(False)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sndbuf:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
        listener.close()

    def exchange(self, send: dict[int, Tensor], receive: dict[int, Tensor], step: int = 0) -> None:
        """Sends and receives everything; `step` bounds the bytes of one call (0: as much as the kernel takes)."""
        step = step or 1 << 40
        outgoing = {self.out[p]: memoryview(t.numpy()) for p, t in send.items()}
        incoming = {self.into[p]: memoryview(t.numpy()) for p, t in receive.items()}
        with selectors.DefaultSelector() as waiting:
            events: dict[socket.socket, int] = {}
            for s in outgoing:
                events[s] = events.get(s, 0) | selectors.EVENT_WRITE
            for s in incoming:
                events[s] = events.get(s, 0) | selectors.EVENT_READ
            for s, mask in events.items():
                waiting.register(s, mask)
            while events:
                for key, ready in waiting.select():
                    s = key.fileobj
                    assert isinstance(s, socket.socket)
                    done = 0
                    if ready & selectors.EVENT_READ:
                        view = incoming[s]
                        view = incoming[s] = view[s.recv_into(view[:step]) :]
                        done |= 0 if view else selectors.EVENT_READ
                    if ready & selectors.EVENT_WRITE:
                        view = outgoing[s]
                        view = outgoing[s] = view[s.send(view[:step]) :]
                        done |= 0 if view else selectors.EVENT_WRITE
                    if done:
                        events[s] &= ~done
                        if events[s]:
                            waiting.modify(s, events[s])
                        else:
                            waiting.unregister(s)
                            del events[s]


def ways(numel: int) -> dict[str, Callable[[], object]]:
    """Every way to exchange `numel` bytes with each other rank, ready to run."""
    rank, n = dist.get_rank(), dist.get_world_size()
    sent = torch.randint(0, 255, (n, numel), dtype=torch.uint8)
    got = torch.zeros(n, numel, dtype=torch.uint8)
    others = [(rank + i) % n for i in range(1, n)]
    send = {p: sent[p] for p in others}
    receive = {p: got[p] for p in others}
    second = dist.new_group(list(range(n)))

    def chunked() -> None:
        for at in range(0, numel, CHUNK):
            a, b = got[:, at : at + CHUNK].contiguous(), sent[:, at : at + CHUNK].contiguous()
            dist.all_to_all_single(a.view(-1), b.view(-1))

    def point_to_point(piece: int, sends_first: bool = False) -> None:
        receives, sends = [], []
        for i in range(1, n):
            to, source = (rank + i) % n, (rank - i) % n
            receives += [(dist.irecv, got[source, at : at + piece], source) for at in range(0, numel, piece)]
            sends += [(dist.isend, sent[to, at : at + piece], to) for at in range(0, numel, piece)]
        ordered = sends + receives if sends_first else receives + sends
        works = [post(piece_of, peer) for post, piece_of, peer in ordered]
        for work in works:
            work.wait()

    def two_groups() -> None:
        """Each connection carries one direction: the lower rank sends in the first group, the higher in the second."""
        works = []
        for peer in others:
            works.append(dist.irecv(got[peer], peer, group=second if rank < peer else None))
        for peer in others:
            works.append(dist.isend(sent[peer], peer, group=None if rank < peer else second))
        for work in works:
            work.wait()

    one, two = Sockets(MESH_PORT), Sockets(MESH_PORT + 1, connections=2)
    bounded = {kib: Sockets(MESH_PORT + kib, sndbuf=kib << 10) for kib in (64, 256, 1024)}
    return {
        "gloo all_to_all_single": lambda: dist.all_to_all_single(got.view(-1), sent.view(-1)),
        "gloo all_to_all_single, 1 MiB chunks": chunked,
        "gloo all_gather": lambda: dist.all_gather_into_tensor(got.view(-1), sent[0]),
        "gloo, all irecv, then isend": lambda: point_to_point(numel),
        "gloo, all isend, then irecv": lambda: point_to_point(numel, sends_first=True),
        "gloo, all irecv, then isend, 1 MiB chunks": lambda: point_to_point(CHUNK),
        "gloo, all irecv, then isend, two groups": two_groups,
        "sockets, epoll": lambda: one.exchange(send, receive),
        "sockets, epoll, 256 KiB a call": lambda: one.exchange(send, receive, 1 << 18),
        "sockets, epoll, one connection a way": lambda: two.exchange(send, receive, 1 << 18),
    } | {
        f"sockets, epoll, SO_SNDBUF {kib} KiB": lambda sockets=sockets: sockets.exchange(send, receive, 1 << 18)
        for kib, sockets in bounded.items()
    }


def rank_main(numel: int, repeat: int) -> None:
    """One rank; rank 0 prints every way's times."""
    dist.init_process_group("gloo")
    took: dict[str, list[float]] = {}
    all_ways = ways(numel)
    for turn in range(repeat + 1):
        for name, way in all_ways.items():
            dist.barrier()
            begin = time.perf_counter()
            way()
            seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if turn:
                took.setdefault(name, []).append(float(seconds))
    if dist.get_rank() == 0:
        print(json.dumps(took))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=types.hosts, nargs="+", default=[2, 4])
    parser.add_argument("--rate", type=types.shaped_rate, default="1gbit")
    parser.add_argument("--megabytes", type=types.positive, default=20.0, help="to each other rank")
    parser.add_argument("--repeat", type=types.integer(1), default=5)
    parser.add_argument("--congestion", nargs="+", default=["cubic", "bbr"], help="TCP's congestion control")
    options = parser.parse_args()
    numel = max(1, int(options.megabytes * 1e6))
    if "RANK" in os.environ:
        rank_main(numel, options.repeat)
        return 0
    if (why := missing()) is not None:
        print(f"duplex: {why}", file=sys.stderr)
        return 2
    for n in options.hosts:
        for congestion in options.congestion:
            floor = numel * (n - 1) * 8 / bits_per_second(options.rate)
            with Lab(n, options.rate, congestion=congestion) as lab:
                ended = lab.run([sys.executable, *sys.argv], timeout=600)
            if any(one.code for one in ended):
                print("\n".join(one.output for one in ended), file=sys.stderr)
                return 1
            print(f"\n{n} hosts, {options.rate}, {congestion}; floor {floor:.3f} s\n\n| way | time / floor | range |")
            print("|---|---|---|")
            took = json.loads(ended[0].output.splitlines()[-1])
            for name, seconds in took.items():
                ratios = sorted(s / floor for s in seconds)
                print(f"| {name} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
