"""A thinner wire: quantizer, kernels, collectives, hook, wire meter. Knows nothing of translation.

    from tenko.comm import QuantizedAllReduce, register
    route = register(ddp_model, QuantizedAllReduce(bits=3, clip=3.0))

serves any model in torch's DistributedDataParallel. Importing it is light: numba's kernels load when first
needed.
"""

from .config import CommConfig
from .hook import AllReduce, QuantizedAllReduce, make_route
from .meter import WireMeter
from .quantizer import Quantizer
from .route import Route, register

__all__ = [
    "AllReduce",
    "CommConfig",
    "QuantizedAllReduce",
    "Quantizer",
    "Route",
    "WireMeter",
    "make_route",
    "register",
]
