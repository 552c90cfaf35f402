"""Scenarios of `hook_worker.py` for the routes beyond flat quantized all-reduce."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hook_worker import (
    BUCKET_MB,
    DEVICE,
    Model,
    assert_ranks_agree,
    batch,
    counted_bytes,
    exact_mean,
    flat,
    loss_of,
    wrapped,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tenko.comm import (
    Auto,
    CommConfig,
    HalfAllReduce,
    ParameterServer,
    QuantizedAllReduce,
    SplitRule,
    make_route,
    register,
)
from tenko.comm.hook import LaneRoute
from tenko.comm.lanes import PORTION
from tenko.comm.link import Exchange, GroupLink, run
from tenko.comm.nodes import find_nodes
from tenko.comm.server import ServerRoute


def relative_error(model: DistributedDataParallel, step: int) -> float:
    exact = torch.cat([mean.reshape(-1) for mean in exact_mean(step)[0]])
    return float((flat(model, gradients=True) - exact).norm() / exact.norm())


def half(_: Path) -> None:
    """fp16 and bf16 numbers both ways: half the bytes, almost the exact mean."""
    for dtype, most in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        route = HalfAllReduce(dtype)
        model = wrapped(route)
        loss_of(model, 0).backward()
        assert_ranks_agree(flat(model, gradients=True))
        error = relative_error(model, 0)
        assert 0 < error < most, error
        sent = torch.tensor([float(route.meter.bytes_sent), route.meter.fp32_bytes])
        dist.all_reduce(sent)
        assert sent[0] * 2 == sent[1], "over all ranks, exactly half of a ring's fp32"
        route.close()


def nodes(_: Path) -> None:
    """Two nodes: what is quantized is the nodes' mean, so ranks of a node add no error, and few bytes cross."""
    n = dist.get_world_size()
    os.environ["GROUP_RANK"] = str(dist.get_rank() * 2 // n)
    os.environ["LOCAL_WORLD_SIZE"] = str(n // 2)
    node, flat_route = QuantizedAllReduce(levels="node", block=64), QuantizedAllReduce(block=64)
    models = [wrapped(node), wrapped(flat_route)]
    for step in range(4):
        for model in models:
            model.zero_grad()
            loss_of(model, step).backward()
            assert_ranks_agree(flat(model, gradients=True))
    assert relative_error(models[0], 3) < 1.1 * relative_error(models[1], 3) + 0.05
    sent = torch.tensor([node.meter.bytes_sent, flat_route.meter.bytes_sent, node.meter.node_bytes]).double()
    dist.all_reduce(sent)
    # over all ranks everything crosses N - 1 times each way, N nodes or ranks
    assert sent[0] / sent[1] == pytest.approx((2 - 1) / (n - 1), rel=0.01), sent
    numel = sum(p.numel() for p in Model().parameters() if p.requires_grad)
    assert sent[2] == 4 * 2 * 4 * numel * (n - 2), "fp32 inside the nodes, both ways"
    exact = QuantizedAllReduce(levels="node")
    os.environ["GROUP_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", str(n)
    model = wrapped(exact)
    loss_of(model, 0).backward()
    assert relative_error(model, 0) > 1e-3, "one node alone still quantizes once, as its owner would"
    for route in (node, flat_route, exact):
        route.close()


def two_nodes(_: Path) -> None:
    """Started by two torchrun agents: nodes are what the launcher says, and only half the ranks' slices cross."""
    n = dist.get_world_size()
    assert find_nodes(None, DEVICE) == [list(range(n // 2)), list(range(n // 2, n))]
    route = QuantizedAllReduce(levels="node")
    model = wrapped(route)
    loss_of(model, 0).backward()
    assert_ranks_agree(flat(model, gradients=True))
    assert relative_error(model, 0) < 0.5
    assert route.meter.node_bytes > route.meter.bytes_sent > 0
    route.close()


def shared(_: Path) -> None:
    """Under a shared scale the owner's sum is exact: less error than with scales of one's own and a second rounding."""
    n = dist.get_world_size()
    bits_down = 4 if n == 2 else 5
    errors = {}
    for name, route in {
        "shared": QuantizedAllReduce(3, bits_down, shared_scale=True, error_feedback=False),
        "own": QuantizedAllReduce(3, bits_down, error_feedback=False),
        "one more rounding": QuantizedAllReduce(3, 3, shared_scale=True, error_feedback=False),
    }.items():
        model = wrapped(route)
        found = []
        for step in range(6):
            model.zero_grad()
            loss_of(model, step).backward()
            assert_ranks_agree(flat(model, gradients=True))
            found.append(relative_error(model, step) ** 2)
        errors[name] = sum(found)
        route.close()
    assert errors["shared"] < errors["own"] < errors["one more rounding"], errors
    route = QuantizedAllReduce(8, 8, 0, shared_scale=True)
    model = wrapped(route)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = float(loss_of(model.module, 0).detach())
    for step in range(25):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert_ranks_agree(flat(model))
    assert float(loss_of(model.module, 0).detach()) < first / 4, "it learns"
    route.close()


def rows(_: Path) -> None:
    """Only touched rows of the embedding travel; the others have no gradient afterwards."""
    rules = (
        SplitRule(route="rows", match=("embedding*",)),
        SplitRule(route="all_reduce", match=("*",), exclude=("embedding*",)),
    )
    config = CommConfig(route="split", split=rules, bits=8, bits_down=8, clip=0)
    route = ServerRoute(rules, config)
    model = wrapped(route)
    assert route.routes["embedding.weight"] == "rows"
    everywhere = QuantizedAllReduce(8, 8, 0)
    other = wrapped(everywhere)
    for step in range(3):
        for each in (model, other):
            each.zero_grad()
            loss_of(each, step).backward()
        assert_ranks_agree(flat(model, gradients=True))
        assert relative_error(model, step) < 0.03
        touched = torch.zeros(211, device=DEVICE)
        touched[batch(step).flatten()] = 1
        dist.all_reduce(touched)
        gradient = model.module.embedding.weight.grad
        assert torch.equal(gradient.any(dim=1), touched > 0)
    assert route.meter.bytes_sent < 0.95 * everywhere.meter.bytes_sent
    for each in (route, everywhere):
        each.close()


def sparsity(_: Path) -> None:
    """A rule by sparsity decides after the first gradient, on all ranks alike; the decision is in the state."""
    rules = (
        SplitRule(route="rows", min_dims=2, min_sparsity=0.2),
        SplitRule(route="all_reduce", min_dims=2, max_sparsity=0.2),
        SplitRule(route="fp32", max_dims=1),
    )
    route = ServerRoute(rules, CommConfig(route="split", split=rules))
    model = wrapped(route)
    assert route.routes["layers.0.weight"] == "first gradient"
    loss_of(model, 0).backward()
    assert relative_error(model, 0) < 1e-5, "the first gradient is exact"
    assert route.routes["embedding.weight"] == "rows"
    assert {route.routes[f"layers.{i}.weight"] for i in (0, 2, 4)} == {"all_reduce"}
    assert route.routes["layers.0.bias"] == "fp32"
    again = ServerRoute(rules, CommConfig(route="split", split=rules))
    other = wrapped(again)
    again.load_state_dict(route.state_dict())
    assert again.routes == route.routes
    for each in (model, other):
        each.zero_grad()
        loss_of(each, 1).backward()
    assert torch.equal(flat(model, gradients=True), flat(other, gradients=True))
    assert_ranks_agree(flat(model, gradients=True))
    for each in (route, again):
        each.close()
    dense = (SplitRule(route="fp32", max_dims=1), SplitRule(route="all_reduce", min_dims=2))
    changed = ServerRoute(dense, CommConfig(route="split", split=dense))
    wrapped(changed)
    line = r"^comm\.routes: embedding\.weight went by rows when this was saved, the rules now say all_reduce"
    with pytest.raises(ValueError, match=line):
        changed.load_state_dict(route.state_dict())
    changed.close()
    narrow = (SplitRule(route="fp32", match=("layers*",)),)
    with pytest.raises(ValueError, match="no rule takes scale"):
        wrapped(ServerRoute(narrow, CommConfig(route="split", split=narrow)))


class Branches(nn.Module):
    """A branch that changes from step to step, a frozen one, and a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.ways = nn.ModuleList([nn.Linear(30, 40), nn.Linear(30, 40), nn.Linear(30, 40).requires_grad_(False)])
        self.nothing = nn.Parameter(torch.zeros(0, 7))
        self.out = nn.Linear(40, 5)

    def forward(self, x: Tensor, way: int) -> Tensor:
        result: Tensor = self.out(self.ways[way](x).tanh()) + self.nothing.sum()
        return result


def unused(_: Path) -> None:
    """Parameters that no rank, or only some ranks, used; frozen and empty ones; what plain DDP makes of them."""
    fine = CommConfig(bits=8, bits_down=8, clip=0, error_feedback=False)
    for config in (fine, CommConfig(route="fp16"), CommConfig(route="server")):
        route = make_route(config, 1)
        models = [
            DistributedDataParallel(Branches().to(DEVICE), find_unused_parameters=True, bucket_cap_mb=BUCKET_MB)
            for _ in range(2)
        ]
        register(models[0], route)
        optimizer = route.optimizer(models[0].module.named_parameters(), lr=1e-2)
        for step in range(7):
            # both ranks the same way, or each its own; the third way is frozen
            way = (step + dist.get_rank() * (step > 3)) % 3
            x = torch.randn(6, 30, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())).to(DEVICE)
            for model in models:
                model.zero_grad()
                model(x, way).square().sum().backward()
            if config.route != "server":  # there a rank holds its own shard's gradient only
                for ours, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
                    assert (ours.grad is None) == (plain.grad is None)
                    if plain.grad is not None and plain.numel():
                        error, size = (ours.grad - plain.grad).norm(), plain.grad.norm()
                        assert error <= 0.05 * size, (step, tuple(ours.shape), float(error), float(size))
                continue
            optimizer.step()
            assert_ranks_agree(flat(models[0]))
        route.close()


class Heads(nn.Module):
    """Two weights whose gradients are the same whenever they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(4000)) for _ in range(2))

    def forward(self, x: Tensor, use_a: bool) -> Tensor:
        return (self.a if use_a else self.b) @ x


def feedback_waits(_: Path) -> None:
    """Error feedback of a weight that an update does not use is not spent on it: DDP drops what the exchange gives.

    The mean over 40 uses is as close where there is an update without it between them.
    """
    rank = dist.get_rank()
    x = torch.randn(4000, generator=torch.Generator().manual_seed(rank)).to(DEVICE)
    exact = x.clone()
    dist.all_reduce(exact)
    exact /= dist.get_world_size()
    routes: list[Callable[[], LaneRoute]] = [
        lambda: QuantizedAllReduce(bits=1),
        lambda: QuantizedAllReduce(bits=2, bits_down=8, rounding="nearest"),
        lambda: QuantizedAllReduce(bits=2, bits_down=8, rounding="nearest", shared_scale=True),
    ]
    for make in routes:
        errors = []
        for pause in (0, 1):
            route = make()
            model = DistributedDataParallel(Heads().to(DEVICE), find_unused_parameters=True)
            register(model, route)
            total, uses = torch.zeros_like(exact), 0
            for step in range(40 * (1 + pause)):
                model.zero_grad()
                use_a = not pause or step % 2 == 0
                model(x, use_a).backward()
                assert (model.module.a.grad is not None) == use_a
                if use_a:
                    total += model.module.a.grad
                    uses += 1
            assert uses == 40
            assert_ranks_agree(total)
            errors.append(float((total / uses - exact).norm() / exact.norm()))
            route.close()
        assert errors[1] < 1.1 * errors[0], errors


def never_used(_: Path) -> None:
    """A branch that no step uses, in a static graph, whose buckets DDP rebuilds after the first step."""
    route = make_route(CommConfig(bits=8, bits_down=8, clip=0, error_feedback=False), 1)
    ours, plain = (
        DistributedDataParallel(Branches().to(DEVICE), static_graph=True, bucket_cap_mb=BUCKET_MB) for _ in range(2)
    )
    register(ours, route)
    for step in range(5):
        x = torch.randn(6, 30, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())).to(DEVICE)
        for model in (ours, plain):
            model.zero_grad()
            model(x, 0).square().sum().backward()
        used = 0
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if theirs.grad is not None and theirs.grad.norm() > 0:
                used += 1
                assert (mine.grad - theirs.grad).norm() <= 0.05 * theirs.grad.norm(), (step, tuple(mine.shape))
        assert 0 < used < len(list(plain.parameters()))
    route.close()


def frees(_: Path) -> None:
    """A closed route and its model go when nobody holds them: their memory does not add up over many."""
    for make in (QuantizedAllReduce, ParameterServer):
        route = make()
        model = wrapped(route)
        optimizer = route.optimizer(model.named_parameters(), lr=1e-2)
        loss_of(model, 0).backward()
        optimizer.step()
        route.close()
        gone = [weakref.ref(model), weakref.ref(route)]
        del model, route, optimizer
        gc.collect()
        assert [reference() for reference in gone] == [None, None]


def portions(_: Path) -> None:
    """A tensor larger than a portion travels in several, and arrives as one."""
    torch.manual_seed(3)
    module = nn.Embedding(3 * PORTION // 512 + 7, 512)
    route = QuantizedAllReduce(8, 8, clip=0)
    model = DistributedDataParallel(module.to(DEVICE))
    register(model, route)
    generator = torch.Generator().manual_seed(dist.get_rank())
    weight = torch.randn(module.weight.shape, generator=generator).to(DEVICE)
    with counted_bytes(route) as sent:
        (model(torch.arange(module.num_embeddings, device=DEVICE)) * weight).sum().backward()
    exact = weight.clone()
    dist.all_reduce(exact)
    exact /= dist.get_world_size()
    if DEVICE.type == "cpu":
        assert len(next(iter(route._portions.values()))) >= 3
    assert module.weight.grad is not None
    assert (module.weight.grad - exact).norm() < 0.02 * exact.norm()
    assert_ranks_agree(module.weight.grad.view(-1))
    assert sent["up"] == route.meter.up_bytes
    route.close()


def group(_: Path) -> None:
    """The way over a process group's own sends, which NCCL takes, gives the bits that the mesh gives."""
    rules = (
        SplitRule(route="rows", match=("embedding*",)),
        SplitRule(route="server", min_dims=2, exclude=("embedding*",)),
        SplitRule(route="fp16", max_dims=1),
    )
    configs = (
        CommConfig(),
        CommConfig(levels="node"),
        CommConfig(route="split", split=rules),
        CommConfig(bits=1),
        CommConfig(route="server", weights="delta"),
        CommConfig(shared_scale=True),
    )
    for config in configs:
        over_mesh, over_group = make_route(config, 5), make_route(config, 5)
        assert isinstance(over_group, LaneRoute)
        models = [wrapped(over_mesh)]
        connect(over_group)
        models.append(wrapped(over_group))
        optimizers = [
            route.optimizer(model.named_parameters(), lr=1e-2)
            for route, model in zip((over_mesh, over_group), models, strict=True)
        ]
        for step in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
            assert_ranks_agree(flat(models[1]))
        assert torch.equal(flat(models[0]), flat(models[1]))
        assert over_mesh.meter == over_group.meter
        over_mesh.close()


class Inline:
    """Runs exchanges at once, as the exchanger of CUDA does in stream order."""

    def submit(self, exchanges: Sequence[Exchange], finish: Callable[[], Tensor]) -> torch.futures.Future[Tensor]:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        with torch.no_grad():
            for exchange in exchanges:
                run(exchange)
            done.set_result(finish())
        return done

    def close(self) -> None:
        """Nothing to end."""


def connect(route: LaneRoute) -> None:
    """Puts a route over a process group of its own."""

    def over_group(device: torch.device) -> None:
        route._link = GroupLink(dist.new_group(), device)
        route._exchanger = Inline()

    route._connect = over_group  # type: ignore[method-assign]


def auto(_: Path) -> None:
    """Measures each candidate in turn, then all ranks go on with the same one, also after a resume."""
    route = Auto(CommConfig(bits=3))
    model = wrapped(route)
    sent: list[int] = []
    while route.choice is None:
        assert len(sent) <= 15, "three candidates, five turns each"
        model.zero_grad()
        before = route.meter.bytes_sent
        loss_of(model, len(sent)).backward()
        sent.append(route.meter.bytes_sent - before)
        assert_ranks_agree(flat(model, gradients=True))
    assert len(sent) == 16
    assert len(set(sent[:15])) == 3, "three kinds of updates, each with its own number of bytes"
    assert sent[0] > sent[1] > sent[2]
    assert_ranks_agree(torch.tensor([float(list(route.candidates).index(route.choice)), *route.seconds.values()]))
    fastest = min(route.seconds.values())
    assert route.seconds[route.choice] <= 1.02 * fastest
    again = Auto(CommConfig(bits=3))
    other = wrapped(again)
    again.load_state_dict(route.state_dict())
    for each in (model, other):
        each.zero_grad()
        loss_of(each, 20).backward()
    assert again.choice == route.choice
    # gloo's own sum of four depends on the buckets, which a new DDP has not rebuilt yet
    ours, theirs = flat(model, gradients=True), flat(other, gradients=True)
    assert (ours - theirs).norm() < 1e-5 * ours.norm()
    assert again.meter.bytes_sent == pytest.approx(route.meter.bytes_sent, rel=1e-3)
    for each in (route, again):
        each.close()


SCENARIOS = {
    f.__name__: f
    for f in (
        half,
        two_nodes,
        shared,
        nodes,
        rows,
        sparsity,
        portions,
        unused,
        feedback_waits,
        never_used,
        frees,
        group,
        auto,
    )
}
