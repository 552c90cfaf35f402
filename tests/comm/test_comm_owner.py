"""The owner of a shard steps as torch's AdamW does, and what it sends is what everybody ends up with."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tenko.comm.config import WEIGHT_BITS
from tenko.comm.layout import Cut, Shard
from tenko.comm.owner import ShardOwner, WeightFormat, decode_weights, payload_size

NUMELS = [2600, 40, 700, 9, 1, 513]
ROWS = [40, 0, 7, 0, 0, 3]
STARTS = np.cumsum([0, *NUMELS[:-1]]).tolist()


def cut(parts: int = 1) -> Cut:
    return Cut(NUMELS, 64, parts, ROWS)


def shard(part: int = 0, parts: int = 1) -> Shard:
    return cut(parts).shard(range(len(NUMELS)), STARTS, part)


def numbers(seed: int, scale: float = 1.0, numel: int = sum(NUMELS)) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def owner(weights: Tensor, whole: Shard | None = None, **settings: Any) -> ShardOwner:
    whole = whole or shard().compact()
    return ShardOwner(weights, whole, matrices=whole.rows > 0, **{"weight_bits": 4, "block": 64, **settings})


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fifty_updates_equal_torch_adamw_to_the_bit(decay: float) -> None:
    parameters = [torch.nn.Parameter(piece.clone()) for piece in numbers(0).split(NUMELS)]
    torchs = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.98), eps=1e-9, weight_decay=decay, fused=True)
    ours = owner(numbers(0), betas=(0.9, 0.98), eps=1e-9, weight_decay=decay)
    for update in range(50):
        gradient, lr = numbers(update, 1e-3), 0.01 / (update + 1)
        touched = np.array([True, update % 2 == 0, True, update > 3, True, True])
        for group in torchs.param_groups:
            group["lr"] = lr
        for parameter, piece, has in zip(parameters, gradient.split(NUMELS), touched, strict=True):
            parameter.grad = piece.clone() if has else None
        torchs.step()
        ours.step(gradient, lr, None if touched.all() else touched)
    assert torch.equal(ours.weights, torch.cat([p.detach() for p in parameters]))
    assert torch.equal(ours.square, torch.cat([torchs.state[p]["exp_avg_sq"] for p in parameters]))
    assert ours.steps.tolist() == [50, 25, 50, 46, 50, 50]


@pytest.mark.parametrize("parts", [2, 3])
def test_shards_step_as_the_whole_does(parts: int) -> None:
    whole = owner(numbers(0))
    result = torch.full_like(whole.weights, torch.nan)
    own = []
    for part in range(parts):
        mine = shard(part, parts)
        picked = torch.cat([numbers(0)[low : low + n] for low, n in mine.table[:, :2]])
        own.append((mine, owner(picked, mine.compact())))
    for update in range(5):
        gradient = numbers(update + 1, 1e-2)
        whole.step(gradient, 1e-2)
        for mine, part in own:
            part.step(torch.cat([gradient[low : low + n] for low, n in mine.table[:, :2]]), 1e-2)
    for mine, part in own:
        for low, n, at in zip(mine.table[:, 0], mine.table[:, 1], mine.compact().table[:, 0], strict=True):
            result[low : low + n] = part.weights[at : at + n]
    # The last elements of a segment go through torch's scalar loop, so a cut may round them otherwise.
    torch.testing.assert_close(result, whole.weights, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_payload_decodes_to_near_weights_and_exact_vectors(bits: int) -> None:
    ours = owner(numbers(0), weight_bits=bits)
    ours.step(numbers(1, 1e-3), 1e-3)
    payload = torch.zeros(ours.payload_size + 3, dtype=torch.uint8)[3:]  # at an odd address
    ours.encode(payload)
    out = torch.full_like(ours.weights, torch.nan)
    ours.decode(payload, out)
    assert payload.numel() == payload_size(ours.shard, ours.matrices, bits, 64)
    for low, n, matrix in zip(ours.shard.table[:, 0], ours.shard.table[:, 1], ours.matrices, strict=True):
        if not matrix or bits == 32:
            assert torch.equal(out[low : low + n], ours.weights[low : low + n])
    error = float((out - ours.weights).square().mean().sqrt() / ours.weights.square().mean().sqrt())
    assert error < {2: 0.6, 3: 0.3, 4: 0.15, 5: 0.08, 6: 0.04, 7: 0.02, 8: 0.01, 16: 3e-4, 32: 1e-9}[bits]
    if bits < 32:
        assert error > 0


@pytest.mark.parametrize("bits", [3, 16, 32])
def test_weights_scatter_to_where_a_shard_says_and_nowhere_else(bits: int) -> None:
    out = torch.full((sum(NUMELS),), torch.nan)
    for part in range(3):
        mine = shard(part, 3)
        ours = owner(numbers(part, numel=mine.numel), mine.compact(), weight_bits=bits)
        payload = torch.empty(ours.payload_size, dtype=torch.uint8)
        ours.encode(payload)
        compact = torch.empty(mine.numel)
        ours.decode(payload, compact)
        before = out.clone()
        decode_weights(payload, mine, mine.rows > 0, bits, 64, out)
        written = torch.zeros_like(out, dtype=torch.bool)
        for low, n, at in zip(mine.table[:, 0], mine.table[:, 1], mine.compact().table[:, 0], strict=True):
            assert torch.equal(out[low : low + n], compact[at : at + n])
            written[low : low + n] = True
        assert torch.equal(out[~written].nan_to_num(7), before[~written].nan_to_num(7))
    assert torch.isfinite(out).all()


def test_resumed_owner_equals_uncut_one() -> None:
    uncut, cut_off = owner(numbers(0)), owner(numbers(0))
    for update in range(6):
        uncut.step(numbers(update, 1e-3), 1e-3)
        cut_off.step(numbers(update, 1e-3), 1e-3)
        if update == 2:
            saved = io.BytesIO()
            torch.save(cut_off.state_dict(), saved)
            saved.seek(0)
            cut_off = owner(torch.zeros(sum(NUMELS)))
            cut_off.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(uncut.weights, cut_off.weights)
    sent, again = (torch.empty(uncut.payload_size, dtype=torch.uint8) for _ in range(2))
    uncut.encode(sent)
    cut_off.encode(again)
    assert torch.equal(sent, again)


def test_state_of_another_shard_is_refused_whole() -> None:
    ours = owner(numbers(0))
    state = ours.state_dict()
    for name, wrong in (("weights", numbers(1)[:-1]), ("exp_avg", None), ("steps", torch.zeros(6, dtype=torch.int64))):
        with pytest.raises(ValueError, match=rf"server\.{name}: must be"):
            ours.load_state_dict({**{k: torch.ones_like(v) for k, v in state.items()}, name: wrong})
    assert torch.equal(ours.weights, numbers(0))


def test_a_model_of_vectors_or_of_nothing_travels() -> None:
    for numels, rows in (([5, 3], [0, 0]), ([], [])):
        whole = Cut(numels, 64, 1, rows).shard(range(len(numels)), np.cumsum([0, *numels])[:-1].tolist(), 0)
        ours = owner(numbers(0, numel=whole.numel), whole)
        ours.step(numbers(1, numel=whole.numel), 1e-3)
        payload = torch.empty(ours.payload_size, dtype=torch.uint8)
        ours.encode(payload)
        out = torch.empty(whole.numel)
        ours.decode(payload, out)
        assert torch.equal(out, ours.weights)
        assert ours.payload_size == 4 * whole.numel


def test_nan_in_a_weight_is_seen_by_all() -> None:
    for bits in (3, 16, 32):
        ours = owner(numbers(0), weight_bits=bits)
        ours.weights[100] = torch.nan
        payload = torch.empty(ours.payload_size, dtype=torch.uint8)
        ours.encode(payload)
        out = torch.zeros(sum(NUMELS))
        ours.decode(payload, out)
        assert out[100].isnan()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight_bits": 12}, "weight_bits: must be 2 to 8 .* is 12"),
        ({"block": 20}, "weight_block: must be a multiple of 8, is 20"),
        ({"betas": (0.9, 1.0)}, "betas: must be"),
        ({"eps": -1.0}, "eps, weight_decay: must be"),
        ({"weight_decay": float("nan")}, "eps, weight_decay: must be"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        owner(numbers(0), **wrong)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="weights: must be"):
        owner(numbers(0)[:-1])
    with pytest.raises(ValueError, match="matrices: must be"):
        WeightFormat(shard(), np.ones(2, dtype=bool), 4)
    with pytest.raises(ValueError, match="payload: must be"):
        decode_weights(torch.zeros(10, dtype=torch.uint8), shard(), shard().rows > 0, 4, 64, torch.zeros(sum(NUMELS)))


def test_what_is_sent_is_nearest_where_adams_second_moment_is_large() -> None:
    weights, gradient = numbers(0), numbers(1, 1e-3)
    weights[:2600:4] *= 0.2  # small ones, which the loss minds most
    gradient[:2600:4] *= 1e3
    ours = owner(weights, weight_bits=2)
    ours.step(gradient, 1e-9)

    def error() -> torch.Tensor:
        payload, out = torch.empty(ours.payload_size, dtype=torch.uint8), torch.empty_like(ours.weights)
        ours.encode(payload)
        ours.decode(payload, out)
        return (out - ours.weights)[:2600:4].square().sum()

    aware = error()
    ours.square.fill_(1)
    assert aware < 0.8 * error()
