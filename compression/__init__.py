"""A thinner model: one module a technique, one protocol for all, one packed file format.

Names are imported on first use, so that a recipe can be checked (`tenko.compression.config`) without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import activation_ranges, attach_activations
    from .config import LotteryConfig, QuantizeConfig, QuantNoiseConfig
    from .masks import Masks, PrunedWeights
    from .noise import QuantNoise
    from .packed import artefact_bytes, read_artefact, write_artefact
    from .technique import Packed, Technique, select_weights

__all__ = [
    "LotteryConfig",
    "Masks",
    "Packed",
    "PrunedWeights",
    "QuantNoise",
    "QuantNoiseConfig",
    "QuantizeConfig",
    "Technique",
    "activation_ranges",
    "artefact_bytes",
    "attach_activations",
    "read_artefact",
    "select_weights",
    "write_artefact",
]

_HOME = {
    "LotteryConfig": "config",
    "Masks": "masks",
    "PrunedWeights": "masks",
    "QuantNoise": "noise",
    "QuantNoiseConfig": "config",
    "QuantizeConfig": "config",
    "activation_ranges": "activations",
    "attach_activations": "activations",
    "artefact_bytes": "packed",
    "read_artefact": "packed",
    "write_artefact": "packed",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME.get(name, 'technique')}", __name__), name)
