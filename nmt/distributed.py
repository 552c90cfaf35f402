"""The few collectives that translation needs beside the gradients; all of them do nothing in a single process.

Text crosses the network as UTF-8 JSON in byte tensors: nothing that came over a wire is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Iterable[float], device: torch.device | str = "cpu") -> list[float]:
    """Element-wise sums over ranks, in float64."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


def gather_json(value: object, device: torch.device | str = "cpu") -> list:
    """Every rank's JSON-serializable `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value, ensure_ascii=False).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([payload.numel()], dtype=torch.int64, device=device))
    longest = int(max(size.item() for size in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    return [
        json.loads(bytes(part[: int(size)].cpu().numpy().tobytes()).decode())
        for part, size in zip(gathered, sizes, strict=True)
    ]


def from_rank0(value: object) -> Any:
    """Rank 0's JSON-serializable `value`, on every rank; what a rank sees on a disk may come later than what rank 0
    does."""
    return gather_json(value, "cuda" if torch.cuda.is_available() else "cpu")[0]


def checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def assert_ranks_agree(tensors: Iterable[Tensor], what: str, device: torch.device | str = "cpu") -> None:
    """Raise RuntimeError unless all ranks hold bit-identical tensors."""
    if world_size() == 1:
        return
    sums = gather_json(checksum(tensors), device)
    if len(set(sums)) > 1:
        parts = ", ".join(f"rank {r}: {s[:12]}" for r, s in enumerate(sums))
        raise RuntimeError(f"{what} differ between ranks ({parts}); the exchange of gradients is not exact")
