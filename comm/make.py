"""From a recipe's `comm:` to a route."""

from __future__ import annotations

from .config import CommConfig
from .hook import AllReduce, HalfAllReduce, QuantizedAllReduce
from .route import Route


def make_route(config: CommConfig, seed: int, timeout: float = 1800.0) -> Route:
    """The route that a recipe asks for.

    Args:
        config: a recipe's `comm:`.
        seed: of the stochastic rounding.
        timeout: seconds to wait for a rank before giving it up.
    """
    if config.route == "fp32":
        return AllReduce()
    if config.route == "fp16":
        return HalfAllReduce(timeout=timeout)
    if config.route == "auto":
        from .auto import Auto

        return Auto(config, seed=seed, timeout=timeout)
    if config.route in ("server", "split"):
        from .server import ServerRoute

        return ServerRoute(config.split, config, seed=seed, timeout=timeout)
    return QuantizedAllReduce(
        config.bits,
        config.bits_down,
        config.clip,
        config.block,
        error_feedback=config.error_feedback,
        sigma=config.sigma,
        rounding=config.rounding,
        shared_scale=config.shared_scale,
        levels=config.levels,
        seed=seed,
        timeout=timeout,
    )
