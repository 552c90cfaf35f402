"""Ternary weights by threshold and by loss, and two levels: equal to their definitions, worked out another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tenko.comm.laq import solve
from tenko.compression.scalar import Granularity, decode
from tenko.compression.ternary import Lat, Twn, TwoMeans

GRANULARITIES: tuple[Granularity, ...] = ("channel", "tensor")


def weights(seed: int = 0, rows: int = 9, columns: int = 150) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def rows_of(weight: Tensor, granularity: Granularity) -> np.ndarray:
    return weight.double().numpy() if granularity == "channel" else weight.double().numpy().reshape(1, -1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_twn_is_the_papers_threshold_and_scale(granularity: Granularity) -> None:
    weight = weights()
    packed = Twn(granularity).quantize(weight)
    assert packed.scheme == "ternary"
    wanted = []
    for row in rows_of(weight, granularity):
        large = np.abs(row) > 0.7 * np.abs(row).mean()
        wanted.append(np.where(large, np.sign(row) * np.abs(row[large]).mean(), 0.0))
    np.testing.assert_allclose(decode(packed).numpy().reshape(len(wanted), -1), wanted, rtol=1e-5)
    assert sorted(packed.parts["codes"].unique().tolist()) == [-1, 0, 1]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_lat_without_moments_has_the_least_squared_error(granularity: Granularity) -> None:
    weight = weights(1)
    value = decode(Lat(granularity).quantize(weight)).reshape(rows_of(weight, granularity).shape)
    for row, found in zip(rows_of(weight, granularity), value.double().numpy(), strict=True):
        # With k weights kept, the largest, the best scale is their mean: all k, in closed form.
        magnitude = np.sort(np.abs(row))[::-1]
        best = (row**2).sum() - (np.cumsum(magnitude) ** 2 / np.arange(1, row.size + 1)).max()
        assert ((found - row) ** 2).sum() <= best * 1.01


def test_lat_weights_errors_by_importance_and_is_comms_solver() -> None:
    weight = weights(2)
    d = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) ** 4

    def error(value: Tensor) -> float:
        return float((d * (value - weight).square()).sum())

    plain, aware = Lat("channel").quantize(weight), Lat("channel").quantize(weight, d)
    assert error(decode(aware)) < error(decode(plain)) * 0.99
    assert error(decode(aware)) < error(decode(Twn("channel").quantize(weight))) * 0.99
    alpha, levels = solve(weight, d, 2, block=weight.shape[1])
    assert torch.equal(aware.parts["codes"], levels)
    assert torch.equal(aware.parts["scale"], alpha)
    even = Lat("channel").quantize(weight, torch.full_like(weight, 1e-8))
    assert torch.equal(even.parts["codes"], plain.parts["codes"])


@pytest.mark.parametrize("scheme", [Twn, Lat])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ternary_keeps_zeros_and_rows_of_zeros(scheme: type[Twn | Lat], granularity: Granularity) -> None:
    weight = weights()
    weight[weight.abs() < 0.3] = 0.0
    weight[4] = 0.0
    packed = scheme(granularity).quantize(weight)
    value = decode(packed)
    assert not value[weight == 0].any()
    assert value.any()
    assert bool(torch.isfinite(value).all())


def best_two_means(row: np.ndarray) -> float:
    """The least squared error of two levels: every cut of the sorted weights tried."""
    ordered = np.sort(row)
    sums, squares = np.cumsum(ordered), np.cumsum(ordered**2)
    k = np.arange(1, row.size)
    below = squares[:-1] - sums[:-1] ** 2 / k
    above = (squares[-1] - squares[:-1]) - (sums[-1] - sums[:-1]) ** 2 / (row.size - k)
    return float((below + above).min())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_binary_is_the_two_means(granularity: Granularity, shift: float) -> None:
    weight = weights(5) + shift
    packed = TwoMeans(granularity).quantize(weight)
    rows = rows_of(weight, granularity)
    assert packed.scheme == "binary"
    assert packed.parts["levels"].shape == (len(rows), 2)
    assert bool((packed.parts["levels"][:, 0] < packed.parts["levels"][:, 1]).all())
    for row, found in zip(rows, decode(packed).double().numpy().reshape(rows.shape), strict=True):
        assert len(np.unique(found)) == 2
        assert ((found - row) ** 2).sum() <= best_two_means(row) * 1.01


def test_equal_weights_have_one_level() -> None:
    weight = torch.full((3, 7), 0.1)
    weight[1] = 0.0
    assert torch.allclose(decode(TwoMeans("channel").quantize(weight)), weight)


@pytest.mark.parametrize("scheme", [Twn, Lat, TwoMeans])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_become_finite(scheme: type[Twn | Lat | TwoMeans], bad: float) -> None:
    weight = weights()
    weight[1, 2] = bad
    value = decode(scheme("channel").quantize(weight))
    assert not torch.isfinite(value[1]).all()
    assert bool(torch.isfinite(value[2:]).all())
