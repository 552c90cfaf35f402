"""Settings of the compression stages, as a recipe writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    scheme: Literal["int8"] = "int8"
    """int8: symmetric, one scale per output channel."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns of the weights to quantize, by parameter name; only tensors of two or more dimensions count."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of weights to leave in fp32; a pattern that matches none is an error, in both lists."""

    def __post_init__(self) -> None:
        if not self.include:
            raise ValueError("include: must name at least one pattern, for instance ['*']")


@dataclass(frozen=True, kw_only=True)
class QuantNoiseConfig:
    scheme: Literal["int8"] = "int8"
    """int8: symmetric, one scale per output channel."""
    p: float = 0.5
    """Fraction of the weights that each update sees quantized; 1 is quantization-aware training."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns of the weights to quantize, by parameter name."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of weights to leave in fp32."""

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p: must be above 0 and at most 1, is {self.p}")


@dataclass(frozen=True, kw_only=True)
class IpqConfig:
    centroids: int = 256
    """Centroids of a codebook, at most 256."""

    def __post_init__(self) -> None:
        if not 2 <= self.centroids <= 256:
            raise ValueError(f"centroids: must be 2 to 256, is {self.centroids}")


@dataclass(frozen=True, kw_only=True)
class LotteryConfig:
    rounds: int = 5
    """Times that weights are pruned, rewound and trained again."""
    fraction: float = 0.2
    """Fraction of the surviving weights that each round prunes."""
    rewind_to: int = 0
    """Update whose weights a round begins with; one of the stage train's keep_updates."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: must be at least 1, is {self.rounds}")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction: must be in [0, 1), is {self.fraction}")
        if self.rewind_to < 0:
            raise ValueError(f"rewind_to: must be at least 0, is {self.rewind_to}")
