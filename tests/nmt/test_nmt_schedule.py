"""The learning rate is fairseq's, update for update."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler
from fairseq.optim.lr_scheduler.inverse_square_root_schedule import InverseSquareRootSchedule

from tenko.nmt.config import TrainConfig
from tenko.nmt.schedule import learning_rate


@pytest.mark.parametrize(("lr", "warmup", "initial"), [(5e-3, 300, 1e-7), (5e-4, 1, 0.0), (1e-3, 999, 1e-5)])
def test_rate_is_that_of_fairseqs_inverse_sqrt(
    monkeypatch: pytest.MonkeyPatch, lr: float, warmup: int, initial: float
) -> None:
    rates: list[float] = []
    optimizer = SimpleNamespace(set_lr=rates.append)

    def init(self: FairseqLRScheduler, cfg: object, optimizer: object) -> None:  # theirs wants its own optimizer class
        self.cfg, self.optimizer = cfg, optimizer

    monkeypatch.setattr(FairseqLRScheduler, "__init__", init)
    theirs = InverseSquareRootSchedule(
        SimpleNamespace(lr=[lr], warmup_updates=warmup, warmup_init_lr=initial), optimizer
    )
    config = TrainConfig(lr=lr, warmup_updates=warmup, warmup_init_lr=initial)
    for updates_done in range(1001):
        theirs.step_update(updates_done)
        assert learning_rate(config, updates_done) == pytest.approx(rates[-1], rel=1e-12), updates_done
    assert max(rates) == pytest.approx(lr)
    assert len(set(rates)) > 900


def test_without_warmup_the_peak_comes_first_and_nothing_divides_by_zero() -> None:
    config = TrainConfig(lr=1e-3, warmup_updates=0)
    assert [learning_rate(config, n) for n in (0, 1, 4)] == [1e-3, 1e-3, 5e-4]
