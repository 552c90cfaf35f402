"""Settings of the communication route, as a recipe writes them under `comm:`. Light: importing it loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

BITS = range(1, 9)
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which parameters take which route: all conditions of a rule must hold."""

    route: Literal["all_reduce", "server", "rows", "fp32", "fp16"]
    """rows: only the rows of a matrix that a batch touched travel, quantized. The others are as in `CommConfig`."""
    match: tuple[str, ...] = ("*",)
    """Shell patterns of parameters' names, one of which must match."""
    exclude: tuple[str, ...] = ()
    """Shell patterns, none of which may match."""
    min_numel: int = 0
    """At least so many elements."""
    max_numel: int = 0
    """At most so many elements; 0 sets no limit."""
    min_dims: int = 0
    """At least so many dimensions: 2 takes matrices."""
    max_dims: int = 0
    """At most so many dimensions; 0 sets no limit."""
    min_sparsity: float = 0.0
    """At least this share of the gradient's rows was zero, on average over the ranks, in the first update."""
    max_sparsity: float = 1.0
    """Below this share; 1 sets no limit."""

    def __post_init__(self) -> None:
        for key in ("min_numel", "max_numel", "min_dims", "max_dims"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: must be at least 0, is {getattr(self, key)}")
        for key in ("min_sparsity", "max_sparsity"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: must be between 0 and 1, is {getattr(self, key)}")
        if self.measured and self.route == "server":
            raise ValueError("min_sparsity: not with route server, whose shards must be known before the first update")

    @property
    def measured(self) -> bool:
        """Whether the rule depends on the first gradient."""
        return self.min_sparsity > 0 or self.max_sparsity < 1


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    route: Literal["all_reduce", "server", "split", "auto", "fp16", "fp32"] = "all_reduce"
    """all_reduce sends clipped, quantized gradients up and their quantized mean down; server sends the same up, and
    quantized weights down, stepped by the owner of each shard; split gives each parameter a route by `split`; auto
    measures fp32, fp16 and all_reduce in the first updates and takes the fastest; fp16 and fp32 are not quantized."""
    bits: int = 3
    """Bits an element on the way up (worker to the owner of the shard): 1 to 8. 1 needs error_feedback."""
    bits_down: int = 4
    """Bits an element on the way down (owner to all workers): 1 to 8."""
    clip: float = 3.0
    """Clip gradients to this many standard deviations before quantizing; 0 does not clip."""
    sigma: Literal["block", "row", "tensor"] = "block"
    """Over what the standard deviation is taken."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """stochastic is unbiased; nearest has the smaller error, and a bias that error feedback mends."""
    block: int = 0
    """Elements that share a scale; a multiple of 8. 0 takes 128, 256 where a leg has 2 bits, 512 where one has 1: then
    the scales stay below 3 % of the bytes."""
    error_feedback: bool = True
    """Add to each gradient what quantization left out of the one before; 4 bytes of memory a parameter."""
    shared_scale: bool = False
    """All ranks round to the same scales, agreed on beforehand: the owner adds integers, without a second error where
    bits_down holds the sum."""
    levels: Literal["flat", "node"] = "flat"
    """node: full precision inside a node, quantized between nodes."""
    weights: Literal["laq", "delta"] = "laq"
    """server: what comes down. laq: the weights, by loss-aware quantization, so that workers compute with few bits;
    delta: what weights changed by, in bits_down, and what that left out the next time, so that workers follow the
    full-precision weights closely."""
    weight_bits: int = 4
    """weights: laq: bits of a weight on the way down, 2 to 8, or 16 or 32, unquantized."""
    servers: Literal["sharded", "dedicated"] = "sharded"
    """server: who owns the shards. sharded: the workers, each one; dedicated: processes of their own, over MPI."""
    staleness: int = 0
    """servers: dedicated: so many updates a worker may be ahead of the slowest; 0 is synchronous, more does not repeat
    to the bit."""
    overlap: bool = True
    """Exchange gradients in buckets, while backward computes those before; false sends them in one piece at its end."""
    split: tuple[SplitRule, ...] = ()
    """split: the rules. A parameter that none takes, or two, is an error."""

    def __post_init__(self) -> None:
        for key in ("bits", "bits_down"):
            if getattr(self, key) not in BITS:
                raise ValueError(f"{key}: must be 1 to 8, is {getattr(self, key)}")
        if self.clip < 0:
            raise ValueError(f"clip: must be at least 0, is {self.clip}")
        if self.block < 0 or self.block % 8:
            raise ValueError(f"block: must be a multiple of 8, or 0 for the default, is {self.block}")
        if self.weights not in ("laq", "delta"):  # a program's; recipes are checked when they are read
            raise ValueError(f"weights: must be laq or delta, is {self.weights}")
        if self.weight_bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits: must be 2 to 8, 16 or 32, is {self.weight_bits}")
        if 1 in (self.bits, self.bits_down) and not self.error_feedback:
            raise ValueError("bits: 1 is a sign, whose error must be fed back; set error_feedback: true")
        if self.bits_down == 1:
            raise ValueError("bits_down: 1 loses what no error feedback gives back on this leg; must be 2 to 8")
        if bool(self.split) != (self.route == "split"):
            raise ValueError("split: route split needs rules" if not self.split else "split: needs route: split")
        for route, keys in (("all_reduce", ("shared_scale", "levels")), ("server", ("servers", "staleness"))):
            for key in keys if self.route != route else ():
                if getattr(self, key) != _default(key):
                    raise ValueError(f"{key}: {getattr(self, key)} goes with route: {route} only")
        if self.staleness < 0:
            raise ValueError(f"staleness: must be at least 0 (0: synchronous), is {self.staleness}")
        if self.staleness and self.servers == "sharded":
            raise ValueError(f"staleness: {self.staleness} goes with servers: dedicated only")
        for key in ("sigma", "rounding", "weights") if self.servers == "dedicated" else ():
            if getattr(self, key) != _default(key):
                raise ValueError(f"{key}: must be {_default(key)} with servers: dedicated, is {getattr(self, key)}")
        if self.shared_scale and self.levels == "node":
            raise ValueError("shared_scale: not together with levels: node")


def _default(key: str) -> object:
    return next(field.default for field in fields(CommConfig) if field.name == key)


def default_block(*bits: int) -> int:
    """Elements of a block where a recipe or a program says 0: scales stay below 3 % of the bytes."""
    return {1: 512, 2: 256}.get(min(bits), 128)
