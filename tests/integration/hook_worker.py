"""One rank of the hook's tests: `torchrun hook_worker.py WORLD_SIZE FOLDER SCENARIO ...`; fails if one is broken."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import leave

from tenko.comm import AllReduce, CommConfig, QuantizedAllReduce, Route, make_route, register
from tenko.comm.hook import TAGS, LaneRoute
from tenko.comm.link import Handle

BUCKET_MB = 0.005
DEVICE = torch.device("cpu")
if os.environ.get("TENKO_TEST_DEVICE") == "cuda":
    DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))


class Model(nn.Module):
    """Embedding, three layers of odd sizes and a frozen one: 12 tensors, several buckets of BUCKET_MB."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(211, 24)
        self.layers = nn.Sequential(nn.Linear(24, 37), nn.Tanh(), nn.Linear(37, 261), nn.Tanh(), nn.Linear(261, 11))
        self.frozen = nn.Linear(11, 11).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.layers(self.embedding(tokens).mean(dim=1))
        return self.frozen(hidden) * self.scale


def batch(step: int) -> Tensor:
    """Another batch on every rank and at every step [8, 5]."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(0, 211, (8, 5), generator=generator).to(DEVICE)


def loss_of(model: nn.Module, step: int) -> Tensor:
    output: Tensor = model(batch(step)).float()
    return (output - 1).square().mean()


def wrapped(route: Route | None, dtype: torch.dtype = torch.float32, view: bool = False) -> DistributedDataParallel:
    model = DistributedDataParallel(Model().to(DEVICE, dtype), bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=view)
    if route is not None:
        assert register(model, route) is route
    return model


def flat(model: nn.Module, *, gradients: bool = False) -> Tensor:
    tensors = [p.grad if gradients else p for p in model.parameters() if not gradients or p.grad is not None]
    return torch.cat([t.detach().reshape(-1).float() for t in tensors if t is not None])


def assert_ranks_agree(values: Tensor) -> None:
    everybody = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, values)
    for rank, other in enumerate(everybody):
        # as bits: NaN must agree as well
        assert torch.equal(other.view(torch.int32), values.view(torch.int32)), f"rank {rank} has other values"


def exact_mean(step: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[float]]:
    """Mean gradient over the ranks in fp32, and the largest magnitude on any rank, of every tensor that trains."""
    model = Model().to(DEVICE, dtype)
    loss_of(model, step).backward()
    means, largest = [], []
    for parameter in model.parameters():
        if parameter.grad is not None:
            mean, peak = parameter.grad.float().clone(), parameter.grad.float().abs().max()
            dist.all_reduce(mean)
            dist.all_reduce(peak, dist.ReduceOp.MAX)
            means.append(mean / dist.get_world_size())
            largest.append(float(peak))
    return means, largest


@contextmanager
def counted_bytes(route: LaneRoute) -> Iterator[dict[str, int]]:
    """Counts the bytes that a route hands to its link, up and down."""
    sent = {"up": 0, "down": 0}
    link = route._link
    assert link is not None
    start = link.start

    def counting(tag: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor | None]) -> Handle:
        assert dist.get_rank() not in outgoing
        sent["down" if tag % TAGS else "up"] += sum(buffer.numel() for buffer in outgoing.values())
        return start(tag, outgoing, incoming)

    link.start = counting  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        link.start = start  # type: ignore[method-assign]


def agree(_: Path) -> None:
    """All ranks hold the same bits after every update, through the rebuilding of buckets; also in bf16 and in views."""
    for dtype, view in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        route = QuantizedAllReduce(bits=3, clip=3.0, block=64)
        model = wrapped(route, dtype, view)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        first = float(loss_of(model.module, 0))
        for step in range(25):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            assert_ranks_agree(flat(model, gradients=True))
            optimizer.step()
            assert_ranks_agree(flat(model))
        buckets = list(route._portions)
        assert len(buckets) >= 4, f"several buckets: {buckets}"
        assert sum(map(len, buckets)) > 8, f"DDP rebuilt them, tensors are in several: {buckets}"
        assert route.step == route.meter.updates == 25
        assert float(loss_of(model.module, 0)) < first / 4, "it learns"
        route.close()


def bounds(_: Path) -> None:
    """Without a clip, no element is farther from the exact mean than one level up and one level down."""
    for bits, bits_down in ((2, 8), (3, 4), (4, 4), (8, 8)):
        means, largest = exact_mean(3)
        route = QuantizedAllReduce(bits=bits, bits_down=bits_down, clip=0.0)
        model = wrapped(route)
        loss_of(model, 3).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == len(means) == 8
        level = 1 / (2 ** (bits - 1) - 1)
        # a mean of quantized values is at most the peak, so the second leg's level is at most this
        level_down = 1 / (2 ** (bits_down - 1) - 1)
        errors = []
        for parameter, mean, peak in zip(trained, means, largest, strict=True):
            assert parameter.grad is not None
            error = (parameter.grad - mean).abs().max().item()
            assert error <= (level + level_down) * peak * 1.001, (bits, error, peak)
            errors.append(error / peak)
            # where no rank has a gradient (rows of the embedding), there is none afterwards
            assert not parameter.grad[mean == 0].any()
        assert max(errors) > level / 100, "it was quantized at all"
        route.close()


def poisoned(model: DistributedDataParallel) -> dict[str, bool]:
    """While its `on` is set, the last rank's gradient of a weight has an inf in it."""
    poison = {"on": False}

    def spoil(gradient: Tensor) -> Tensor:
        if poison["on"] and dist.get_rank() == dist.get_world_size() - 1:
            gradient = gradient.clone()
            gradient.view(-1)[5] = float("inf")
        return gradient

    model.module.layers[2].weight.register_hook(spoil)
    return poison


def overflow(_: Path) -> None:
    """An inf in one element on one rank makes the loss scaler skip the update on all ranks; the next one is taken."""
    route = QuantizedAllReduce(bits=3, clip=3.0)
    model = wrapped(route)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    poison = poisoned(model)
    for step in range(4):
        poison["on"] = step == 2
        before, scale = flat(model).clone(), scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        assert_ranks_agree(flat(model, gradients=True))
        scaler.step(optimizer)
        scaler.update()
        assert_ranks_agree(flat(model))
        if poison["on"]:
            assert torch.equal(flat(model), before), "skipped"
            assert scaler.get_scale() == scale / 2
        else:
            assert not torch.equal(flat(model), before), "taken"
            assert scaler.get_scale() == scale
    route.close()


def no_sync(_: Path) -> None:
    """Accumulation sends nothing but on the last micro-batch, and sends the sum."""
    route = QuantizedAllReduce(bits=8, bits_down=8, clip=0.0)
    model = wrapped(route)
    for _update in range(2):
        model.zero_grad()
        sent = route.meter.bytes_sent
        with model.no_sync():
            for step in (0, 1):
                loss_of(model, step).backward()
                assert route.meter.bytes_sent == sent
        loss_of(model, 2).backward()
        assert route.meter.bytes_sent > sent
    exact = sum(
        (torch.cat([m.reshape(-1) for m in exact_mean(step)[0]]) for step in (0, 1, 2)), torch.zeros((), device=DEVICE)
    )
    got = flat(model, gradients=True)
    assert (got - exact).norm() < 0.02 * exact.norm(), "the sum of three micro-batches"
    assert route.meter.updates == 2
    route.close()


def meter(_: Path) -> None:
    """The meter reports what went into the collectives, which is what bits, scales and blocks amount to."""
    n = dist.get_world_size()
    numels = [p.numel() for p in Model().parameters() if p.requires_grad]
    for bits, bits_down, block in ((3, 4, 256), (8, 2, 1024), (2, 3, 64)):
        route = QuantizedAllReduce(bits=bits, bits_down=bits_down, block=block)
        model = wrapped(route)
        with counted_bytes(route) as counted:
            for step in range(3):
                loss_of(model, step).backward()
        assert route.meter.up_bytes == counted["up"]
        assert route.meter.down_bytes == counted["down"]
        assert route.meter.fp32_bytes == 3 * 2 * (n - 1) / n * 4 * sum(numels)

        def payload(bits: int, span: int = 8 * block) -> int:
            return sum(9 + -(-min(span, m - at) // 8) * bits for m in numels for at in range(0, m, span))

        total = torch.tensor([route.meter.up_bytes, route.meter.down_bytes])
        dist.all_reduce(total)
        assert total[0] == 3 * (n - 1) * payload(bits), "over all ranks, all but every rank's own shard"
        assert total[1] == 3 * (n - 1) * payload(bits_down)
        route.close()


def plain(_: Path) -> None:
    """The fp32 route gives what DDP gives without a hook, and counts a ring's bytes."""
    n = dist.get_world_size()
    route = make_route(CommConfig(route="fp32"), seed=1)
    assert isinstance(route, AllReduce)
    model, bare = wrapped(route), wrapped(None)
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for step in range(3):
        for each in (model, bare):
            each.zero_grad()
            loss_of(each, step).backward()
        assert torch.equal(flat(model, gradients=True), flat(bare, gradients=True))
    assert abs(route.meter.bytes_sent - 3 * 2 * (n - 1) / n * 4 * numel) < 100  # whole bytes a bucket
    assert abs(route.meter.ratio - 1) < 0.01


def train(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        with model.no_sync():
            loss_of(model, 2 * step).backward()
        loss_of(model, 2 * step + 1).backward()
        optimizer.step()


def cut(folder: Path) -> None:
    """Leaves behind the state after 3 updates and the weights after 7."""
    route = QuantizedAllReduce(bits=3, block=64, seed=5)
    model = wrapped(route)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "route": route.state_dict()}
    torch.save(state, folder / f"state-{dist.get_rank()}.pt")
    train(model, optimizer, range(3, 7))
    torch.save({"weights": flat(model), "route": route.state_dict()}, folder / f"end-{dist.get_rank()}.pt")
    route.close()


def resume(folder: Path) -> None:
    """Goes on from that state in new processes, and ends at the same bits."""
    rank = dist.get_rank()
    state = torch.load(folder / f"state-{rank}.pt", weights_only=True)
    end = torch.load(folder / f"end-{rank}.pt", weights_only=True)
    for saved_route in (True, False):
        route = QuantizedAllReduce(bits=3, block=64, seed=99)
        model = wrapped(route)
        model.module.load_state_dict(state["model"])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        optimizer.load_state_dict(state["optimizer"])
        if saved_route:
            route.load_state_dict(state["route"])
        train(model, optimizer, range(3, 7))
        assert torch.equal(flat(model), end["weights"]) is saved_route, "bit-equal, and only with the route's state"
        if saved_route:
            now, uncut = route.state_dict(), end["route"]
            assert (now["step"], now["seed"]) == (uncut["step"], uncut["seed"]) == (7, 5)
            assert now["meter"] == uncut["meter"], "to the byte, though a new DDP's first buckets are others"
        route.close()


def refuse(_: Path) -> None:
    """A route goes on one DDP model, once."""
    route = QuantizedAllReduce()
    with pytest.raises(ValueError, match="this is a Model"):
        register(Model(), route)
    model = wrapped(route)
    with pytest.raises(ValueError, match="has a communication hook already"):
        register(model, AllReduce())
    with pytest.raises(ValueError, match="on a model already"):
        register(wrapped(None), route)
    route.close()


def fail(_: Path) -> None:
    """An exchange that fails on rank 1 ends backward there with the reason."""
    route = QuantizedAllReduce()
    model = wrapped(route)
    loss_of(model, 0).backward()
    if dist.get_rank() == 1:

        def broken(*_: object, **__: object) -> None:
            raise OSError("broken on purpose")

        route._link.start = broken  # type: ignore[method-assign, union-attr, assignment]
    loss_of(model, 1).backward()  # rank 0 waits for its peer, which ends


SCENARIOS = {f.__name__: f for f in (agree, bounds, overflow, no_sync, meter, plain, cut, resume, refuse, fail)}

if __name__ == "__main__":
    sys.modules["hook_worker"] = sys.modules["__main__"]  # the other scenarios import from here
    from lane_scenarios import SCENARIOS as OF_LANES
    from server_scenarios import SCENARIOS as OF_SERVER

    SCENARIOS |= OF_LANES | OF_SERVER
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    assert dist.get_world_size() == int(sys.argv[1]), dist.get_world_size()
    for name in sys.argv[3:]:
        SCENARIOS[name](Path(sys.argv[2]))
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"holds: {name}", flush=True)
    dist.destroy_process_group()
    leave()
