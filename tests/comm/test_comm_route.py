"""The parts of a route that need no second process: the meter, the worker thread, settings, world size 1."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tenko.comm import AllReduce, CommConfig, QuantizedAllReduce, WireMeter, make_route, register
from tenko.comm.worker import Worker


def test_meter_counts_a_ring_and_comes_back() -> None:
    meter = WireMeter()
    assert meter.ratio == 1
    meter.count(up=300, down=200, numel=1000, world_size=4)
    assert (meter.bytes_sent, meter.fp32_bytes) == (500, 2 * 3 / 4 * 4 * 1000)
    assert meter.ratio == 12
    other = WireMeter()
    other.load_state_dict(meter.state_dict())
    assert other == meter
    with pytest.raises(ValueError, match=r"meter\.down_bytes: missing"):
        other.load_state_dict({"up_bytes": 1})


def test_worker_keeps_the_order_off_the_callers_thread() -> None:
    worker = Worker("test")
    seen: list[tuple[int, str]] = []

    def job(i: int) -> torch.Tensor:
        time.sleep(0.002 * (5 - i))
        seen.append((i, threading.current_thread().name))
        return torch.tensor(i)

    futures = [worker.submit(lambda i=i: job(i)) for i in range(5)]
    assert [int(future.wait()) for future in futures] == [0, 1, 2, 3, 4]
    assert seen == [(i, "test") for i in range(5)]
    worker.close()


def test_worker_passes_a_failure_on_to_all_later_jobs() -> None:
    worker = Worker("test")

    def broken() -> torch.Tensor:
        raise OSError("the wire is cut")

    first, second = worker.submit(broken), worker.submit(lambda: torch.zeros(1))
    for future in (first, second):
        with pytest.raises(Exception, match="the wire is cut"):
            future.wait()
    worker.close()


def test_recipe_makes_the_route() -> None:
    route = make_route(CommConfig(bits=4, bits_down=8, clip=2.5, block=512), seed=7)
    assert isinstance(route, QuantizedAllReduce)
    assert (route.up.bits, route.down.bits, route.up.clip, route.down.clip, route.up.block) == (4, 8, 2.5, 2.5, 512)
    assert route.seed == 7
    assert isinstance(make_route(CommConfig(route="fp32"), seed=7), AllReduce)
    with pytest.raises(ValueError, match=r"^bits_down: must be 2, 3, 4 or 8, is 5"):
        QuantizedAllReduce(bits_down=5)


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
