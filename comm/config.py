"""Settings of the communication route, as a recipe writes them under `comm:`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    route: Literal["all_reduce", "fp32"] = "all_reduce"
    """all_reduce sends clipped, quantized gradients; fp32 is plain DDP, metered."""
    bits: int = 3
    """Bits an element on the way up (worker to the owner of the shard): 2, 3, 4 or 8."""
    bits_down: int = 4
    """Bits an element on the way down (owner to all workers): 2, 3, 4 or 8."""
    clip: float = 3.0
    """Clip gradients to this many standard deviations of their block before quantizing; 0 does not clip."""
    block: int = 0
    """Elements that share a scale and a sigma; a multiple of 8. 0 takes 128, or 256 where a leg has 2 bits: then the
    scales stay below 3 % of the bytes."""
    error_feedback: bool = True
    """Add to each gradient what quantization left out of the one before; 4 bytes of memory a parameter."""

    def __post_init__(self) -> None:
        for key in ("bits", "bits_down"):
            if getattr(self, key) not in (2, 3, 4, 8):
                raise ValueError(f"{key}: must be 2, 3, 4 or 8, is {getattr(self, key)}")
        if self.clip < 0:
            raise ValueError(f"clip: must be at least 0, is {self.clip}")
        if self.block < 0 or self.block % 8:
            raise ValueError(f"block: must be a multiple of 8, or 0 for the default, is {self.block}")


def default_block(*bits: int) -> int:
    """Elements of a block where a recipe or a program says 0: scales stay below 3 % of the bytes."""
    return 256 if 2 in bits else 128
