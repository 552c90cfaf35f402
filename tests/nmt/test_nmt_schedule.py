"""The learning rate is fairseq's, update for update."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler
from fairseq.optim.lr_scheduler.inverse_square_root_schedule import InverseSquareRootSchedule
from fairseq.optim.lr_scheduler.polynomial_decay_schedule import PolynomialDecayLRSchedule

from tenko.nmt.config import TrainConfig
from tenko.nmt.schedule import learning_rate


class Optimizer:
    """Keeps the rates that a scheduler of fairseq's sets."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.param_groups = [{"lr": 1.0}]

    def set_lr(self, rate: float) -> None:
        self.rates.append(rate)

    def get_lr(self) -> float:
        return self.rates[-1]


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch) -> Optimizer:
    def init(self: FairseqLRScheduler, cfg: object, optimizer: object) -> None:  # theirs wants its own optimizer class
        self.cfg, self.optimizer = cfg, optimizer

    monkeypatch.setattr(FairseqLRScheduler, "__init__", init)
    return Optimizer()


@pytest.mark.parametrize(("lr", "warmup", "initial"), [(5e-3, 300, 1e-7), (5e-4, 1, 0.0), (1e-3, 999, 1e-5)])
def test_rate_is_that_of_fairseqs_inverse_sqrt(optimizer: Optimizer, lr: float, warmup: int, initial: float) -> None:
    theirs = InverseSquareRootSchedule(
        SimpleNamespace(lr=[lr], warmup_updates=warmup, warmup_init_lr=initial), optimizer
    )
    config = TrainConfig(lr=lr, warmup_updates=warmup, warmup_init_lr=initial)
    for updates_done in range(1001):
        theirs.step_update(updates_done)
        assert learning_rate(config, updates_done) == pytest.approx(optimizer.rates[-1], rel=1e-12), updates_done
    assert max(optimizer.rates) == pytest.approx(lr)
    assert len(set(optimizer.rates)) > 900


@pytest.mark.parametrize("warmup", [0, 1, 300])
def test_linear_is_fairseqs_polynomial_decay_of_power_1_to_0(optimizer: Optimizer, warmup: int) -> None:
    settings = {"lr": [2e-3], "warmup_updates": warmup, "end_learning_rate": 0.0, "power": 1.0}
    theirs = PolynomialDecayLRSchedule(SimpleNamespace(**settings, total_num_update=1000, force_anneal=None), optimizer)
    config = TrainConfig(lr=2e-3, lr_schedule="linear", warmup_updates=warmup, warmup_init_lr=0.0, max_update=1000)
    for updates_done in range(1100):  # beyond the end it stays 0
        if updates_done:  # before the first update theirs has the rate of the first
            theirs.step_update(updates_done)
            assert learning_rate(config, updates_done) == pytest.approx(optimizer.rates[-1], abs=1e-12), updates_done
    assert learning_rate(config, warmup) == pytest.approx(2e-3)
    assert learning_rate(config, 1000) == learning_rate(config, 1099) == 0


def test_without_warmup_the_peak_comes_first_and_nothing_divides_by_zero() -> None:
    config = TrainConfig(lr=1e-3, warmup_updates=0)
    assert [learning_rate(config, n) for n in (0, 1, 4)] == [1e-3, 1e-3, 5e-4]
