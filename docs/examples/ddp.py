"""3-bit gradients in a plain DDP loop: a small model of the next byte, trained on the sentences that ship with tenko.

torchrun --nproc-per-node 2 docs/examples/ddp.py
torchrun --nproc-per-node 2 docs/examples/ddp.py --checkpoint /tmp/bytes --updates 400   # goes on from there
"""

import argparse
import contextlib
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tenko.comm import QuantizedAllReduce, register
from tenko.nmt.text_io import read_pairs, source_files

CONTEXT = 16


def sentences() -> Tensor:
    """The English sentences as one line of bytes."""
    text = "\n".join(english for english, _ in read_pairs(source_files("embedded", "text")))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batch(text: Tensor, key: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Contexts [size, CONTEXT] and the byte after each [size]; a key of its own for every batch and rank."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1), generator=torch.Generator().manual_seed(key))
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an update")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, and to write at the end")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(1)
    layers = [nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, 256)]
    model = DistributedDataParallel(nn.Sequential(*layers).to(device))
    route = register(model, QuantizedAllReduce(bits=3))  # the one line
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    start = 0
    if options.checkpoint and (options.checkpoint / "shared.pt").exists():
        shared = torch.load(options.checkpoint / "shared.pt", weights_only=True, map_location=device)
        start = shared["updates"]
        model.module.load_state_dict(shared["model"])
        optimizer.load_state_dict(shared["optimizer"])
        route.load_state_dict(torch.load(options.checkpoint / f"route-{rank}.pt", weights_only=True))

    text = sentences()
    for update in range(start, options.updates):
        for micro in range(options.accumulate):
            last = micro == options.accumulate - 1
            inputs, target = batch(text, (update * options.accumulate + micro) * world + rank)
            with contextlib.nullcontext() if last else model.no_sync():  # gradients travel with the last one only
                loss = nn.functional.cross_entropy(model(inputs.to(device)), target.to(device)) / options.accumulate
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (update % 50 == 0 or update == options.updates - 1):
            print(f"update {update + 1}: loss {loss.item() * options.accumulate:.3f}", flush=True)

    if options.checkpoint:
        options.checkpoint.mkdir(parents=True, exist_ok=True)
        torch.save(route.state_dict(), options.checkpoint / f"route-{rank}.pt")  # every rank has its own
        if rank == 0:
            shared = {"updates": options.updates, "model": model.module.state_dict()}
            torch.save({**shared, "optimizer": optimizer.state_dict()}, options.checkpoint / "shared.pt")

    weights = torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])
    digest = hashlib.sha256(weights.numpy().data).hexdigest()
    meter = route.meter
    print(
        f"rank {rank}: sent {meter.bytes_sent:,} bytes, fp32 {meter.fp32_bytes:,.0f} ({meter.ratio:.1f}x); "
        f"weights {digest[:16]}",
        flush=True,
    )
    route.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
