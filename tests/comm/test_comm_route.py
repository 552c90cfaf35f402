"""The parts of a route that need no second process: the meter, the worker thread, settings, world size 1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from tenko.comm import (
    AllReduce,
    Auto,
    CommConfig,
    HalfAllReduce,
    ParameterServer,
    QuantizedAllReduce,
    ServerRoute,
    SplitRule,
    WireMeter,
    make_route,
    register,
)
from tenko.comm.reshard import adopt


def test_meter_counts_a_ring_and_comes_back() -> None:
    meter = WireMeter()
    assert meter.ratio == 1
    meter.add(up=300, down=150)
    meter.add(down=50, node=1000)
    meter.instead(1000, world_size=4)
    assert (meter.bytes_sent, meter.fp32_bytes) == (500, 2 * 3 / 4 * 4 * 1000)
    assert meter.ratio == 12, "bytes inside a node are none of the network's"
    other = WireMeter()
    other.load_state_dict(meter.state_dict())
    assert other == meter
    with pytest.raises(ValueError, match=r"meter\.down_bytes: missing"):
        other.load_state_dict({"up_bytes": 1})


def test_recipe_makes_the_route() -> None:
    route = make_route(CommConfig(bits=4, bits_down=8, clip=2.5, block=512), seed=7)
    assert isinstance(route, QuantizedAllReduce)
    assert (route.up.bits, route.down.bits, route.up.clip, route.down.clip, route.up.block) == (4, 8, 2.5, 2.5, 512)
    assert route.seed == 7
    assert isinstance(make_route(CommConfig(route="fp32"), seed=7), AllReduce)
    with pytest.raises(ValueError, match=r"^bits_down: must be 1 to 8, is 9"):
        QuantizedAllReduce(bits_down=9)


def test_state_without_a_key_is_refused() -> None:
    route = QuantizedAllReduce(seed=3)
    state = route.state_dict()
    for key in ("step", "seed", "meter"):
        with pytest.raises(ValueError, match=rf"comm\.{key}: missing"):
            route.load_state_dict({k: v for k, v in state.items() if k != key})


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_rank_sends_nothing_and_changes_nothing() -> None:
    assert dist.get_world_size() == 1
    torch.manual_seed(0)
    module = torch.nn.Linear(30, 20)
    x = torch.randn(4, 30)
    module(x).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    model = DistributedDataParallel(module)
    route = register(model, QuantizedAllReduce(bits=2))
    model(x).square().sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert (route.meter.bytes_sent, route.meter.fp32_bytes, route.meter.updates) == (0, 0, 1)
    route.close()
    with pytest.raises(ValueError, match=r"^hook: the route is closed"):
        model(x).sum().backward()
    with pytest.raises(ValueError, match=r"^route: is closed; make a new one"):
        register(DistributedDataParallel(module), route)


@pytest.mark.usefixtures("alone")
def test_gradients_that_a_route_cannot_send_are_refused_at_once() -> None:
    spectrum = torch.nn.ParameterDict({"spectrum": torch.zeros(3, dtype=torch.complex64)})
    table = torch.nn.ModuleDict({"table": torch.nn.Embedding(9, 4, sparse=True)})
    for module, line in ((spectrum, "spectrum is complex"), (table, "table has sparse=True")):
        model = DistributedDataParallel(module)
        for route in (QuantizedAllReduce(), ParameterServer(), Auto()):
            with pytest.raises(ValueError, match=f"^model: {line}"):
                register(model, route)
        register(model, AllReduce())


@pytest.mark.parametrize("timeout", [None, timedelta(minutes=5), -1, 0, float("inf"), float("nan"), True])
@pytest.mark.parametrize("make", [QuantizedAllReduce, ParameterServer, HalfAllReduce])
def test_a_timeout_is_seconds(make: Any, timeout: Any) -> None:
    with pytest.raises(ValueError, match=r"^timeout: must be seconds, finite and above 0, is "):
        make(timeout=timeout)


def test_settings_of_a_class_are_checked_as_those_of_a_recipe() -> None:
    with pytest.raises(ValueError, match=r"^bits_down: 1 loses .* must be 2 to 8$"):
        QuantizedAllReduce(bits_down=1)
    with pytest.raises(ValueError, match=r"^bits: must be 1 to 8, is 3\.0$"):
        QuantizedAllReduce(bits=3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^dtype: must be torch\.float16 or torch\.bfloat16, is torch\.int8$"):
        HalfAllReduce(torch.int8)


@pytest.mark.usefixtures("alone")
def test_the_state_of_another_route_or_model_is_refused_when_it_is_loaded() -> None:
    route = register(DistributedDataParallel(torch.nn.Linear(3, 2)), QuantizedAllReduce())
    state = route.state_dict()
    for residuals in ({"0": torch.zeros(5)}, {"0": torch.zeros(1)}, {"2": torch.zeros(6)}):
        with pytest.raises(ValueError, match=r"^comm\.feedback: the saved state is of another model: parameter "):
            route.load_state_dict({**state, "feedback": residuals})
    route.load_state_dict({**state, "feedback": {"0": torch.ones(2, 3), "1": torch.ones(2)}})
    auto = register(DistributedDataParallel(torch.nn.Linear(3, 2)), Auto())
    with pytest.raises(ValueError, match=r"^comm\.auto: candidates is missing in the saved state"):
        auto.load_state_dict(state)


@pytest.mark.usefixtures("alone")
def test_one_rank_alone_is_its_own_server() -> None:
    module = torch.nn.Linear(300, 20)
    route = register(DistributedDataParallel(module), ParameterServer(weight_bits=4))
    optimizer = route.optimizer(module.named_parameters(), lr=1e-2)
    x = torch.randn(4, 300)
    first = float(module(x).square().sum().detach())
    for _ in range(30):
        optimizer.zero_grad()
        assert route._model is not None
        route._model(x).square().sum().backward()
        assert torch.isfinite(route.total_norm(module.parameters()))
        optimizer.step()
    assert float(module(x).square().sum().detach()) < first / 4
    assert len(module.weight.detach().view(-1)[:256].unique()) <= 15
    before = module.weight.detach().clone()
    route._model(x.index_fill(0, torch.tensor([1]), torch.inf)).sum().backward()
    optimizer.step()
    assert not route.finite
    assert torch.equal(module.weight, before), "skipped, as several ranks do"
    with pytest.raises(ValueError, match="has one already"):
        route.optimizer(module.named_parameters(), lr=1e-2)


@pytest.mark.usefixtures("alone")
def test_shards_of_a_weight_stored_by_columns_are_put_together() -> None:
    module = torch.nn.Linear(300, 20)
    module.weight = torch.nn.Parameter(module.weight.detach().t().contiguous().t())
    model = DistributedDataParallel(module)
    route = register(model, ParameterServer(weight_bits=32))
    optimizer = route.optimizer(model.named_parameters(), lr=1e-2)
    model(torch.randn(4, 300)).square().sum().backward()
    optimizer.step()
    saved = [p.detach().clone() for p in module.parameters()]
    states, parameters = [route.state_dict()], list(module.parameters())
    with torch.no_grad():
        module.weight.zero_()
    adopt(None, torch.optim.AdamW(parameters), parameters, optimizer.state_dict(), states)
    assert all(torch.equal(now, before) for now, before in zip(parameters, saved, strict=True))
    optimizer.owner.weights.zero_()
    adopt(route, optimizer, parameters, optimizer.state_dict(), states)
    assert all(torch.equal(now, states[0]["server"][k]) for k, now in route.state_dict()["server"].items())
    route.close()


@pytest.mark.usefixtures("alone")
def test_rules_name_a_parametrized_weight_as_a_plain_one() -> None:
    module = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2) for name in ("noisy", "normed")})
    parametrize.register_parametrization(module["noisy"], "weight", torch.nn.Identity())
    weight_norm(module["normed"])
    rules = (
        SplitRule(route="server", match=("noisy.weight",)),
        SplitRule(route="fp32", match=("*.bias", "normed.parametrizations.weight.original?")),
    )
    route = ServerRoute(rules, CommConfig(route="split", split=rules))
    register(DistributedDataParallel(module), route)
    assert set(route.routes) == {
        *("noisy.weight", "noisy.bias", "normed.bias"),
        *(f"normed.parametrizations.weight.original{i}" for i in range(2)),
    }
    route.close()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"bits": 9}, "bits: must be 1 to 8, is 9"),
        ({"bits": 1, "error_feedback": False}, "bits: 1 is a sign"),
        ({"bits_down": 1}, "bits_down: 1 loses"),
        ({"weight_bits": 12}, "weight_bits: must be 2 to 8, 16 or 32, is 12"),
        ({"weights": "deltas"}, "weights: must be laq or delta, is deltas"),
        ({"route": "split"}, "split: route split needs rules"),
        ({"split": (SplitRule(route="fp32"),)}, "split: needs route: split"),
        ({"route": "server", "levels": "node"}, "levels: node goes with route: all_reduce only"),
        ({"shared_scale": True, "levels": "node"}, "shared_scale: not together"),
        ({"servers": "dedicated"}, "servers: dedicated goes with route: server only"),
        ({"route": "server", "staleness": 2}, "staleness: 2 goes with servers: dedicated only"),
        ({"route": "server", "servers": "dedicated", "staleness": -1}, "staleness: must be at least 0"),
        (
            {"route": "server", "servers": "dedicated", "weights": "delta"},
            "weights: must be laq with servers: dedicated",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        CommConfig(**settings)


THIN = "3/4 bits"


class Two:
    """A link to one other rank, which has measured these seconds."""

    rank, world_size = 0, 2

    def __init__(self, theirs: list[float]) -> None:
        self.theirs = torch.tensor(theirs, dtype=torch.float64).view(torch.uint8)

    def start(self, tag: int, outgoing: Any, incoming: Any) -> Two:
        incoming[1].copy_(self.theirs)
        return self

    def wait(self) -> None: ...


@pytest.mark.parametrize(
    ("ours", "theirs", "seconds", "choice"),
    [
        ([2.0, 1.0, 0.5], [2.0, 1.0, 3.0], [2.0, 1.0, 3.0], "fp16"),  # the slowest rank's count
        ([1.01, 1.0, 1.0], [0.1, 0.1, 0.1], [1.01, 1.0, 1.0], "fp32"),  # as good as: what loses least
        ([1.5, 1.2, 1.0], [0.1, 0.1, 0.1], [1.5, 1.2, 1.0], THIN),
    ],
)
def test_auto_takes_the_fastest_on_the_slowest_rank(
    ours: list[float], theirs: list[float], seconds: list[float], choice: str
) -> None:
    route = Auto()
    route.rank, route.world_size, route._link = 0, 2, Two(theirs)  # type: ignore[assignment]
    # The first turn is not counted, however quick: kernels are loaded then, buckets rebuilt.
    route._times = {n: [0.0, 0.9 * s, 1.1 * s, 0.9 * s, 1.1 * s] for n, s in zip(route.candidates, ours, strict=True)}
    route._choose(torch.device("cpu"))
    assert route.choice == route._current == choice
    assert [*route.seconds.values()] == pytest.approx(seconds)


@pytest.mark.usefixtures("alone")
def test_auto_goes_on_with_its_choice_and_measures_anew_with_other_ranks() -> None:
    def auto() -> Auto:
        route = register(DistributedDataParallel(torch.nn.Linear(3, 2)), Auto())
        assert isinstance(route, Auto)
        return route

    state = auto().state_dict()
    state |= {"choice": THIN, "seconds": {"fp32": 2.0, "fp16": 2.0, THIN: 1.0}}
    state["candidates"][THIN] |= {"step": 7, "feedback": {"0": torch.ones(2, 3)}}
    again, other = auto(), auto()
    again.load_state_dict(state)
    assert again.choice == again._current == THIN
    kept = again.candidates[THIN].state_dict()
    assert (kept["step"], kept["feedback"]["0"].sum()) == (7, 6)
    other.adopt([state, state, state])
    assert other.choice is None
    kept = other.candidates[THIN].state_dict()
    assert (kept["step"], kept["feedback"]) == (7, {})
