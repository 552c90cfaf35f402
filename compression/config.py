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
