"""A thinner model: one module a technique, one protocol for all, one packed file format.

Names are imported on first use, so that a recipe can be checked (`tenko.compression.config`) without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import activation_ranges, attach_activations
    from .config import IpqConfig, LotteryConfig, PqConfig, PqNoiseConfig, QuantizeConfig, QuantNoiseConfig
    from .ipq import Ipq
    from .masks import Masks, PrunedWeights
    from .noise import QuantNoise
    from .packed import artefact_bytes, read_artefact, write_artefact
    from .pq import PostTrainingPq
    from .pq_noise import PqNoise
    from .technique import Packed, Technique, select_weights

__all__ = [
    "Ipq",
    "IpqConfig",
    "LotteryConfig",
    "Masks",
    "Packed",
    "PostTrainingPq",
    "PqConfig",
    "PqNoise",
    "PqNoiseConfig",
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
    "Ipq": "ipq",
    "IpqConfig": "config",
    "LotteryConfig": "config",
    "Masks": "masks",
    "PostTrainingPq": "pq",
    "PqConfig": "config",
    "PqNoise": "pq_noise",
    "PqNoiseConfig": "config",
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
