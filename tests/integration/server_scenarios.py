"""Scenarios of `hook_worker.py` for the parameter server: its shards, its state, and the gradients it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hook_worker import DEVICE, assert_ranks_agree, exact_mean, flat, loss_of, poisoned, wrapped
from lane_scenarios import Heads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tenko.comm import CommConfig, ParameterServer, SplitRule, make_route, register
from tenko.comm.lanes import gather
from tenko.comm.server import ServerRoute


def server(folder: Path) -> None:
    """Owners of shards step: like AdamW on every rank where nothing is quantized; ranks agree; cut and resumed."""
    rank = dist.get_rank()
    plain, thin = make_route(CommConfig(route="fp32"), 0), ParameterServer(bits=8, weight_bits=32, clip=0)
    models = [wrapped(plain), wrapped(thin)]
    optimizers = [
        route.optimizer(m.named_parameters(), lr=1e-2, weight_decay=0.1)
        for route, m in zip((plain, thin), models, strict=True)
    ]
    for step in range(8):
        for model, optimizer, route in zip(models, optimizers, (plain, thin), strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            norm = route.total_norm(model.parameters())
            assert_ranks_agree(norm.view(1))
            optimizer.step()
            assert_ranks_agree(flat(model))
    assert (flat(models[0]) - flat(models[1])).norm() < 0.05 * flat(models[0]).norm()
    thin.close()
    delta = ParameterServer(weights="delta", bits_down=4)
    model = wrapped(delta)
    optimizer = delta.optimizer(model.named_parameters(), lr=1e-2)
    before = float(loss_of(model.module, 0).detach())
    for step in range(25):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        assert_ranks_agree(flat(model))
    assert float(loss_of(model.module, 0).detach()) < before / 4, "it learns"
    held = gather(optimizer._flat, optimizer._shards[rank])
    error = (held - optimizer.owner.weights).norm() / optimizer.owner.weights.norm()
    assert 0 < error < 0.01, "workers follow the owner's weights, closer than 4 bits could say them"
    delta.close()

    def fresh() -> tuple[ServerRoute, DistributedDataParallel, torch.optim.Optimizer]:
        route = ParameterServer(bits=3, weight_bits=4, seed=3)
        model = wrapped(route)
        return route, model, route.optimizer(model.named_parameters(), lr=1e-2)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    route, model, optimizer = fresh()
    weight = model.module.layers[2].weight.detach().flatten()[:256]
    assert len(weight.unique()) <= 15, "4 bits, from the beginning"
    first = float(loss_of(model.module, 0).detach())
    go(model, optimizer, range(5))
    saved = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "route": route.state_dict()}
    torch.save(saved, folder / f"server-{rank}.pt")
    go(model, optimizer, range(5, 25))
    assert_ranks_agree(flat(model))
    assert float(loss_of(model.module, 0).detach()) < first / 4, "it learns"
    end = flat(model).clone()
    owner = route.state_dict()["server"]
    assert owner["weights"].numel() < 0.75 * flat(model).numel(), "a shard, not the whole"
    route.close()
    saved = torch.load(folder / f"server-{rank}.pt", weights_only=True)
    route, model, optimizer = fresh()
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    route.load_state_dict(saved["route"])
    go(model, optimizer, range(5, 25))
    assert torch.equal(flat(model), end), "resumed equals uncut"
    route.close()


def server_overflow(_: Path) -> None:
    """An inf on one rank, in a shard of another: the loss scaler skips on all ranks, and the next update is taken."""
    rules = (SplitRule(route="server", min_dims=2), SplitRule(route="all_reduce", max_dims=1))
    for config in (CommConfig(route="server"), CommConfig(route="split", split=rules)):
        route = make_route(config, 1)
        model = wrapped(route)
        optimizer = route.optimizer(model.named_parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
        poison = poisoned(model)
        for step in range(4):
            poison["on"] = step == 2
            before, scale = flat(model).clone(), scaler.get_scale()
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            assert torch.isfinite(route.total_norm(model.parameters())) == (not poison["on"])
            scaler.step(optimizer)
            scaler.update()
            assert_ranks_agree(flat(model))
            assert torch.equal(flat(model), before) is poison["on"]
            assert scaler.get_scale() == (scale / 2 if poison["on"] else scale)
        route.close()


def server_by_columns(_: Path) -> None:
    """Owners and gradients mean the same elements where a weight is not stored by rows: all of it is trained."""
    module = nn.Linear(64, 256, bias=False)
    module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    route = ParameterServer(bits=8, weight_bits=32, clip=0)
    model = DistributedDataParallel(module.to(DEVICE))
    register(model, route)
    optimizer = route.optimizer(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    before = module.weight.detach().clone()
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(dist.get_rank())).to(DEVICE)
    model(x).square().mean().backward()
    optimizer.step()
    assert_ranks_agree(module.weight.detach().contiguous())
    assert (module.weight != before).float().mean() > 0.95, "but for gradients that round to zero"
    route.close()


def server_accumulates(_: Path) -> None:
    """Nothing is added to a mean that is spread over the ranks: no_sync, or a gradient that was cleared."""
    route = ParameterServer(bits=8, weight_bits=32, clip=0)
    model = DistributedDataParallel(nn.Linear(64, 256, bias=False).to(DEVICE))
    register(model, route)
    optimizer = route.optimizer(model.named_parameters(), lr=1e-2)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(dist.get_rank())).to(DEVICE)

    def mean(batches: int) -> Tensor:
        with model.no_sync():
            for _ in range(batches - 1):
                model(x).square().mean().backward()
        model(x).square().mean().backward()
        whole: Tensor = model.module.weight.grad.clone()
        dist.all_reduce(whole)
        return whole

    once = mean(1)
    for to_none in (True, False):
        optimizer.zero_grad(set_to_none=to_none)
        thrice = mean(3)
        assert (thrice - 3 * once).norm() < 0.02 * thrice.norm()
    optimizer.step()
    optimizer.zero_grad()
    mean(1)
    with pytest.raises(ValueError, match=r"^backward: weight\.grad holds .* must be under model\.no_sync\(\)$"):
        mean(1)
    route.close()


def server_state_is_a_ranks_own(folder: Path) -> None:
    """The shard of another rank is refused, whenever it is loaded, although it has the same shape."""
    module = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)).to(DEVICE)
    route = ParameterServer(weight_bits=4)
    model = DistributedDataParallel(module)
    register(model, route)
    with pytest.raises(ValueError, match=r"^optimizer: must be given all parameters .*; 1\.weight is missing$"):
        route.optimizer(module[0].named_parameters(), lr=1e-2)
    optimizer = route.optimizer(model.named_parameters(), lr=1e-2)
    model(torch.ones(4, 128, device=DEVICE)).square().sum().backward()
    optimizer.step()
    rank, others = dist.get_rank(), (dist.get_rank() + 1) % dist.get_world_size()
    torch.save(route.state_dict(), folder / f"own-{rank}.pt")
    dist.barrier()
    states = [torch.load(folder / f"own-{number}.pt", weights_only=True) for number in (rank, others)]
    assert states[0]["server"]["weights"].shape == states[1]["server"]["weights"].shape
    with pytest.raises(ValueError, match=r"^comm\.server: the saved shard is another rank's"):
        route.load_state_dict(states[1])
    route.load_state_dict(states[0])
    route.close()
    late = ParameterServer(weight_bits=4)
    model = DistributedDataParallel(module)
    register(model, late)
    late.load_state_dict(states[1])
    with pytest.raises(ValueError, match=r"^comm\.server: the saved shard is another rank's"):
        late.optimizer(model.named_parameters(), lr=1e-2)
    late.close()


def server_settings(_: Path) -> None:
    """Settings of the optimizer's group count, as in every optimizer; what DDP ignores is no server's."""
    weights = []
    for decay, betas in ((0.0, (0.9, 0.999)), (50.0, (0.9, 0.999)), (0.0, (0.0, 0.5))):
        route = ParameterServer(bits=8, weight_bits=32, clip=0)
        model = wrapped(route)
        optimizer = route.optimizer(model.named_parameters(), lr=1e-3, weight_decay=0.0)
        for step in range(3):
            optimizer.param_groups[0].update(weight_decay=decay, betas=betas)
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        weights.append(flat(model).clone())
        route.close()
    plain, decayed, others = weights
    assert decayed.norm() < 0.95 * plain.norm()
    assert not torch.equal(others, plain)
    module = nn.Linear(8, 8).to(DEVICE)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["bias"])
    with pytest.raises(ValueError, match=r"^model: DDP ignores bias, "):
        register(DistributedDataParallel(module), ParameterServer())


RULES = (SplitRule(route="server", min_dims=2), SplitRule(route="fp32", max_dims=1))


def server_norm(_: Path) -> None:
    """It is of the whole gradient, though each rank holds its own shard of that: clipping goes by it."""
    for config in (
        CommConfig(route="server", bits=8, clip=0),
        CommConfig(route="split", split=RULES, bits=8, clip=0),
    ):
        route = make_route(config, 1)
        model = wrapped(route)
        loss_of(model, 0).backward()
        exact = torch.cat([mean.reshape(-1) for mean in exact_mean(0)[0]]).norm()
        assert float(route.total_norm(model.parameters())) == pytest.approx(float(exact), rel=0.01)
        route.close()


def server_unused(_: Path) -> None:
    """A weight without a gradient is left alone by its owners: no decay, no momentum, no step."""
    route = ParameterServer(bits=8, weight_bits=32, clip=0)
    model = DistributedDataParallel(Heads().to(DEVICE), find_unused_parameters=True)
    register(model, route)
    optimizer = route.optimizer(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    x = torch.ones(4000, device=DEVICE)
    weights = []
    for use_a in (True, False):
        optimizer.zero_grad()
        model(x, use_a).backward()
        optimizer.step()
        weights.append(model.module.a.detach().clone())
    assert weights[0].any()
    assert torch.equal(*weights)
    assert set(optimizer.owner.steps.tolist()) == {1.0}
    route.close()


def server_rate(_: Path) -> None:
    """The learning rate of the group, which a schedule sets, is that of the other routes' parameters, too."""
    route = make_route(CommConfig(route="split", split=RULES), 1)
    model = wrapped(route)
    optimizer = route.optimizer(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    vectors = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
    before = [p.detach().clone() for p in vectors]
    for rate, stay in ((0.0, True), (1e-2, False)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
        assert all(torch.equal(p, was) == stay for p, was in zip(vectors, before, strict=True)), rate
    route.close()


SCENARIOS = {
    f.__name__: f
    for f in (
        server,
        server_overflow,
        server_by_columns,
        server_accumulates,
        server_state_is_a_ranks_own,
        server_settings,
        server_norm,
        server_unused,
        server_rate,
    )
}
