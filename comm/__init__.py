"""A thinner wire: quantizer, kernels, collectives, hook, wire meter. Knows nothing of translation.

    from tenko.comm import QuantizedAllReduce, register
    route = register(ddp_model, QuantizedAllReduce(bits=3, clip=3.0))

serves any model in torch's DistributedDataParallel. Importing it is light: names load on first use (a recipe is
checked without torch), numba's kernels when a route is registered.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auto import Auto
    from .config import CommConfig, SplitRule
    from .dedicated import DedicatedServer
    from .dedicated_route import DedicatedRoute
    from .hook import AllReduce, HalfAllReduce, QuantizedAllReduce
    from .make import make_route
    from .meter import WireMeter
    from .quantizer import Quantizer
    from .route import Route, register
    from .server import ParameterServer, ServerRoute

__all__ = [
    "AllReduce",
    "Auto",
    "CommConfig",
    "DedicatedRoute",
    "DedicatedServer",
    "HalfAllReduce",
    "ParameterServer",
    "QuantizedAllReduce",
    "Quantizer",
    "Route",
    "ServerRoute",
    "SplitRule",
    "WireMeter",
    "make_route",
    "register",
]

_HOME = {
    "AllReduce": "hook",
    "Auto": "auto",
    "CommConfig": "config",
    "DedicatedRoute": "dedicated_route",
    "DedicatedServer": "dedicated",
    "HalfAllReduce": "hook",
    "QuantizedAllReduce": "hook",
    "Quantizer": "quantizer",
    "ParameterServer": "server",
    "ServerRoute": "server",
    "SplitRule": "config",
    "Route": "route",
    "WireMeter": "meter",
    "make_route": "make",
    "register": "route",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
