"""The contestants of `links.py`: what a user could register on a DDP model, ours beside torch's own.

`torch quantization_*` do not run on gloo as they are (they index an all_gather's future as NCCL fills it); they run
here with that one call mended. `PowerSGD` deadlocks on gloo with more than one bucket in flight, so it and they get
one bucket.
"""

# No `from __future__ import annotations`: DDP compares the annotations of a hook with classes, not with their names.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, quantization_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power
from torch.nn.parallel import DistributedDataParallel


class Nothing:
    """What a peer without a meter has: nothing to read, nothing to end."""

    meter: Any = None

    def close(self) -> None:
        pass


class Served:
    """The parameter server: an exchange is not over before the owners have stepped and their weights are here."""

    def __init__(self, route: Any, optimizer: torch.optim.Optimizer) -> None:
        self.route, self.meter, self.close = route, route.meter, route.close
        self.finish = optimizer.step


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to exchange gradients."""

    name: str
    attach: Callable[[DistributedDataParallel], Any]
    """Puts it on a model; returns something with `meter` (None: has none), `close`, and perhaps `finish`, which ends an
    exchange after backward."""
    one_bucket: bool = False
    """Runs on gloo only with the whole gradient in one bucket."""
    error_at: int = 0
    """The first exchange that is compressed, and not yet helped by error feedback: its error is looked at."""
    bits: int = 0
    """Bits of the first quantization, to compare its error with; 0: has no such thing."""
    cost: float = 1.0
    """About how long an exchange takes beside fp32's at 4 hosts, for estimates of the run."""
    gradients: bool = True
    """Leaves the mean gradient; False: leaves new weights."""
    slow: bool = False
    """Left out unless named."""


def fp32(model: DistributedDataParallel) -> Nothing:
    return Nothing()


def fp16(model: DistributedDataParallel) -> Nothing:
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return Nothing()


def bf16(model: DistributedDataParallel) -> Nothing:
    """torch's own refuses CPUs; this is what it does."""
    model.register_comm_hook(None, _bf16_hook)
    return Nothing()


def _bf16_hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    half = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(half, async_op=True)
    return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))


def power_sgd(rank: int) -> Callable[[DistributedDataParallel], Nothing]:
    def attach(model: DistributedDataParallel) -> Nothing:
        state = power.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        model.register_comm_hook(state, power.powerSGD_hook)
        return Nothing()

    return attach


class _Gathered:
    """A work whose future holds what the quantization hooks expect: all ranks' tensors, first of its values."""

    def __init__(self, work: Any, gathered: list[Tensor]) -> None:
        self._work, self._gathered = work, gathered

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = self._work.get_future()
        return future.then(lambda _: [torch.stack(self._gathered)])


class MendedAllGather:
    """Stands for `torch.distributed` inside the quantization hooks, with gloo's all_gather answering as NCCL's does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_gather(self, outputs: list[Tensor], value: Tensor, **options: Any) -> _Gathered:
        return _Gathered(dist.all_gather(outputs, value, **options), outputs)


def torch_quantization(hook: Callable[..., Any]) -> Callable[[DistributedDataParallel], Nothing]:
    def attach(model: DistributedDataParallel) -> Nothing:
        quantization_hooks.dist = MendedAllGather()
        model.register_comm_hook(dist.group.WORLD, hook)
        return Nothing()

    return attach


def tenko(**settings: Any) -> Callable[[DistributedDataParallel], Any]:
    def attach(model: DistributedDataParallel) -> Any:
        from tenko.comm import QuantizedAllReduce, register

        return register(model, QuantizedAllReduce(**settings))

    return attach


def tenko_server(**settings: Any) -> Callable[[DistributedDataParallel], Any]:
    def attach(model: DistributedDataParallel) -> Any:
        from tenko.comm import ParameterServer, register

        route: Any = register(model, ParameterServer(**settings))
        return Served(route, route.optimizer(model.module.named_parameters(), lr=1e-4))

    return attach


def tenko_half(model: DistributedDataParallel) -> Any:
    from tenko.comm import HalfAllReduce, register

    return register(model, HalfAllReduce())


def tenko_fp32(model: DistributedDataParallel) -> Any:
    from tenko.comm import AllReduce, register

    return register(model, AllReduce())


_ALL = (
    Peer(name="DDP fp32", attach=fp32),
    Peer(name="torch fp16_compress", attach=fp16, cost=0.55),
    Peer(name="bf16, own 4 lines", attach=bf16, cost=0.55),
    Peer(name="PowerSGD rank 1", attach=power_sgd(1), one_bucket=True, error_at=2, cost=0.3),
    Peer(name="PowerSGD rank 4", attach=power_sgd(4), one_bucket=True, error_at=2, cost=0.45),
    Peer(
        name="torch quantization_pertensor (mended)",
        attach=torch_quantization(quantization_hooks.quantization_pertensor_hook),
        one_bucket=True,
        cost=2.0,
    ),
    Peer(
        name="torch quantization_perchannel (mended)",
        attach=torch_quantization(quantization_hooks.quantization_perchannel_hook),
        one_bucket=True,
        cost=20.0,
        slow=True,
    ),
    Peer(name="tenko 3/4", attach=tenko(bits=3, bits_down=4), bits=3, cost=0.15),
    Peer(name="tenko 3/3", attach=tenko(bits=3, bits_down=3), bits=3, cost=0.15),
    Peer(name="tenko 3/8", attach=tenko(bits=3, bits_down=8), bits=3, cost=0.2),
    Peer(name="tenko 3/8, shared scale", attach=tenko(bits=3, bits_down=8, shared_scale=True), bits=3, cost=0.25),
    Peer(name="tenko server, SQ3 + LAQ4", attach=tenko_server(bits=3, weight_bits=4), gradients=False, cost=0.3),
    Peer(name="tenko fp16", attach=tenko_half, cost=0.55),
    Peer(name="tenko fp32", attach=tenko_fp32),
)
PEERS = {peer.name: peer for peer in _ALL}
