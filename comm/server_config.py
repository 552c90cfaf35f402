"""What dedicated servers are told: settings and the model's table, as JSON that both sides check; and what follows
from them, which shard is whose."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from .config import BITS, WEIGHT_BITS
from .layout import Cut, Shard, single
from .quantizer import Quantizer

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    bits: int = 3
    """Bits of a gradient on the way up, 1 to 8. 1 needs error_feedback."""
    clip: float = 3.0
    """Clip gradients to so many standard deviations of a block before quantizing; 0 does not clip."""
    block: int = 0
    """Gradients that share a scale, a multiple of 8; 0 takes the default of `bits`."""
    error_feedback: bool = True
    """Workers add to a gradient what quantization left out of the one before."""
    weight_bits: int = 4
    """Bits of a matrix's weight on the way down: 2 to 8 (LAQ), 16 (fp16) or 32 (fp32)."""
    weight_block: int = 256
    """Weights that share an alpha, a multiple of 8."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    weight_decay: float = 0.01
    """AdamW's, decoupled."""
    clip_norm: float = 0.0
    """Scale the mean gradient down to this norm, of the whole model; 0 does not. Asynchronous: each worker's own."""
    staleness: int = 0
    """0: synchronous. Else servers apply each gradient as it comes, and a worker is at most so many updates ahead of
    the slowest; then it waits."""
    seed: int = 0
    """Of the stochastic rounding."""
    timeout: float = 60.0
    """Seconds of silence after which a server counts as dead."""
    worker_timeout: float = 1800.0
    """Seconds that the other workers wait for one that pushes nothing."""

    def __post_init__(self) -> None:
        for key, choices in (("bits", BITS), ("weight_bits", WEIGHT_BITS)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: must be one of {', '.join(map(str, choices))}, is {getattr(self, key)}")
        for key in ("clip", "eps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}: must be finite and at least 0, is {getattr(self, key)}")
        if self.block < 0 or self.block % 8:
            raise ValueError(f"block: must be a multiple of 8, or 0 for the default, is {self.block}")
        if self.weight_block < 8 or self.weight_block % 8:
            raise ValueError(f"weight_block: must be a multiple of 8, is {self.weight_block}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: must be two numbers from 0 to below 1, are {self.betas}")
        if self.staleness < 0:
            raise ValueError(f"staleness: must be at least 0 (0: synchronous), is {self.staleness}")
        for key in ("timeout", "worker_timeout"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}: must be finite and above 0, is {getattr(self, key)}")
        if self.bits == 1 and not self.error_feedback:
            raise ValueError("bits: 1 is a sign, whose error must be fed back; set error_feedback=True")

    @property
    def quantizer(self) -> Quantizer:
        """Of the gradients."""
        return Quantizer(bits=self.bits, clip=self.clip, block=self.block)


@dataclass(frozen=True)
class Tensors:
    """The parameters that are trained, in the model's order."""

    names: tuple[str, ...]
    numels: tuple[int, ...]
    rows: tuple[int, ...]
    """Elements of a row; 0 for fewer than two dimensions: those are sent as fp32."""

    @property
    def starts(self) -> list[int]:
        """Where each begins in a flat buffer of all."""
        return (np.cumsum([0, *self.numels])[:-1]).tolist()

    @property
    def numel(self) -> int:
        return sum(self.numels)


def to_json(config: ServerConfig, tensors: Tensors) -> str:
    """What a worker tells a server."""
    return json.dumps({"version": VERSION, "config": asdict(config), "tensors": asdict(tensors)})


def from_json(text: str) -> tuple[ServerConfig, Tensors]:
    """Reads what a worker told.

    Raises:
        ValueError: it is no JSON, of another version, or a setting is unknown, missing or wrong.
    """
    try:
        told = json.loads(text)
    except ValueError as error:
        raise ValueError(f"settings: must be JSON: {error}") from None
    if not isinstance(told, dict) or told.get("version") != VERSION:
        version = told.get("version") if isinstance(told, dict) else None
        raise ValueError(f"version: must be {VERSION}, is {version}: workers and servers must run the same tenko")
    config, table = told.get("config"), told.get("tensors")
    if not isinstance(config, dict) or not isinstance(table, dict):
        raise ValueError("settings: must hold config and tensors")
    defaults = {field.name: field.default for field in fields(ServerConfig)}
    for key in sorted(config.keys() ^ defaults.keys()):
        raise ValueError(f"{key}: {'missing' if key in defaults else 'no such setting'}")
    values: dict[str, Any] = {}
    for key, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        kinds = (int, float) if isinstance(defaults[key], float) else type(defaults[key])
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(defaults[key], bool)):
            raise ValueError(f"{key}: must be {type(defaults[key]).__name__}, is {value!r}")
        if isinstance(value, tuple) and not all(type(item) in (int, float) for item in value):
            raise ValueError(f"{key}: must be numbers, is {value!r}")
        values[key] = value
    names, numels, rows = (table.get(key) for key in ("names", "numels", "rows"))
    if not isinstance(names, list) or not isinstance(numels, list) or not isinstance(rows, list):
        raise ValueError("tensors: must hold lists of names, numels and rows")
    if not len(names) == len(numels) == len(rows) or not all(type(n) is int and n >= 0 for n in [*numels, *rows]):
        raise ValueError("tensors: names, numels and rows must be of one length, and sizes whole numbers")
    return ServerConfig(**values), Tensors(tuple(map(str, names)), tuple(numels), tuple(rows))


def difference(first: Tensors, other: Tensors) -> str:
    """The first parameter in which two models differ; empty if none does."""
    for a, b in zip(
        zip(first.names, first.numels, first.rows, strict=True),
        zip(other.names, other.numels, other.rows, strict=True),
        strict=False,
    ):
        if a != b:
            return f"{a[0]} [{a[1]}] and {b[0]} [{b[1]}]"
    if len(first.names) != len(other.names):
        return f"{len(first.names)} parameters and {len(other.names)}"
    return ""


class Plan:
    """Which server owns what, and what a push of some of the parameters looks like. The same on both sides."""

    def __init__(self, config: ServerConfig, tensors: Tensors, servers: int) -> None:
        self.config, self.tensors, self.servers = config, tensors, servers
        self.quantizer = config.quantizer
        self._cut = Cut(tensors.numels, self.quantizer.span, servers, tensors.rows)
        every = range(len(tensors.numels))
        self.shards = [self._cut.shard(every, tensors.starts, server) for server in range(servers)]
        """Of every server, starts in the flat buffer of all parameters."""
        self.bitmap = -(-len(tensors.numels) // 8)
        """Bytes at the front of a push: a bit for every parameter that has a gradient."""
        self._parts: dict[tuple[int, bool, bytes], Shard] = {}

    def part(self, server: int, present: np.ndarray, *, compact: bool = False) -> Shard:
        """What a push holds for a server: of its shard, the parameters that have a gradient.

        Args:
            server: index.
            present: bool [parameters].
            compact: starts in the server's own buffer of its whole shard, not in that of all parameters.

        Returns:
            A shard whose `tensors` are indices in the model.
        """
        key = (server, compact, np.packbits(present).tobytes())
        if key not in self._parts:
            if len(self._parts) > 64:  # pushes seldom differ; in a program in which they do, do not hoard
                self._parts.clear()
            shard, indices = self.shards[server], np.flatnonzero(present)
            starts = np.array(self.tensors.starts, dtype=np.int64)
            if compact:
                moved = np.zeros_like(starts)
                moved[shard.tensors] = shard.compact().table[:, 0] - shard.table[:, 0]
                starts = starts + moved
            part = self._cut.shard(indices.tolist(), starts[indices].tolist(), server)
            self._parts[key] = Shard(part.table, indices[part.tensors], part.rows, part.numel, part.groups, part.spans)
        return self._parts[key]

    def push_size(self, server: int, present: np.ndarray) -> int:
        """Bytes of a push's body."""
        return self.bitmap + self.part(server, present).size(self.config.bits)

    def warm_up(self) -> None:
        """Has all kernels compiled or loaded: nobody shall wait for an answer meanwhile."""
        from . import laq_kernels  # noqa: F401

        numel = self.quantizer.span + 9
        part = single(numel, self.quantizer.span)
        x, codes = torch.ones(numel), torch.empty(part.size(self.config.bits), dtype=torch.uint8)
        keys = np.zeros((len(part.table), 2), dtype=np.uint32)
        self.quantizer.encode_shard(x, part, keys, codes)
        self.quantizer.encode_feedback(x, torch.zeros_like(x), part, keys, codes)
        self.quantizer.decode_shard(codes, part, x, factor=0.5, add=True)

    def matrices(self, server: int) -> np.ndarray:
        """Which segments of a server's shard are sent in `weight_bits`."""
        return self.shards[server].rows > 0
