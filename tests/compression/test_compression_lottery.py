"""The lottery's rounds, what each begins with, and its controls, without any training of a translation model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenko.compression.config import LotteryConfig
from tenko.compression.lottery import (
    Round,
    Start,
    constant,
    mask_feedback,
    mask_optimizer,
    masks_of_round,
    reinit_seed,
    round_of,
    rounds,
    start_of,
)
from tenko.compression.masks import Masks, PrunedWeights


@pytest.fixture
def trained() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"a": torch.randn(10, 10, generator=generator), "b": torch.randn(5, 20, generator=generator) * 0.1}


def ones(of: dict[str, Tensor]) -> Masks:
    return Masks({name: torch.ones_like(w) for name, w in of.items()})


def test_iterative_pruning_has_as_many_rounds_as_prunings_and_one_shot_has_one() -> None:
    assert rounds(LotteryConfig(rounds=3)) == [Round(1, 1), Round(2, 2), Round(3, 3)]
    assert rounds(LotteryConfig(rounds=3, one_shot=True)) == [Round(1, 3)]
    assert round_of(LotteryConfig(rounds=3), 2) == Round(2, 2)
    assert round_of(LotteryConfig(rounds=3, one_shot=True), 3) == Round(1, 3)
    with pytest.raises(ValueError, match="not in tuple"):
        round_of(LotteryConfig(rounds=3, one_shot=True), 2)
    assert Round(7, 7).folder == "round-07"


def test_one_shot_leaves_as_many_as_all_rounds_together(trained: dict[str, Tensor]) -> None:
    one_shot = LotteryConfig(rounds=5, one_shot=True)
    masks = masks_of_round(one_shot, rounds(one_shot)[0], trained, ones(trained), seed=1)
    assert masks.remaining == round(200 * 0.8**5) == 66


def test_rounds_are_nested_whatever_is_trained_in_between(trained: dict[str, Tensor]) -> None:
    for scope in ("global", "module"):
        config = LotteryConfig(rounds=4, scope=scope)  # type: ignore[arg-type]
        before, weights = ones(trained), dict(trained)
        for this in rounds(config):
            masks = masks_of_round(config, this, weights, before, seed=1)
            assert masks.is_within(before)
            assert masks.remaining == round(200 * 0.8**this.number)
            generator = torch.Generator().manual_seed(this.number)
            weights = {n: torch.randn(w.shape, generator=generator) * masks[n] for n, w in weights.items()}
            before = masks


def test_a_random_control_prunes_as_many_of_each_tensor_as_the_ticket(trained: dict[str, Tensor]) -> None:
    ticket, control = LotteryConfig(rounds=2), LotteryConfig(rounds=2, control="random", masks_of="lottery")
    before: tuple[Masks, Masks] = (ones(trained), ones(trained))
    for this in rounds(ticket):
        found = masks_of_round(ticket, this, trained, before[0], seed=1)
        random = masks_of_round(control, this, {}, before[1], seed=1, given=found)
        assert random.counts == found.counts
        assert found.counts["a"] > found.counts["b"], "global magnitudes prune the small tensor more"
        assert random != found
        assert random.is_within(before[1])
        before = found, random
    assert masks_of_round(control, this, {}, before[1], seed=2, given=found) != before[1]


def test_a_random_control_alone_takes_its_counts_from_what_it_trained(trained: dict[str, Tensor]) -> None:
    config = LotteryConfig(rounds=2, control="random")
    before = ones(trained)
    for this in rounds(config):
        masks = masks_of_round(config, this, trained, before, seed=1)
        assert masks.remaining == round(200 * 0.8**this.number)
        assert masks.is_within(before)
        before = masks


def test_reinit_takes_the_ticket_s_masks_and_draws_other_weights(trained: dict[str, Tensor]) -> None:
    config = LotteryConfig(control="reinit", masks_of="lottery")
    found = masks_of_round(LotteryConfig(), Round(1, 1), trained, ones(trained), seed=1)
    assert masks_of_round(config, Round(1, 1), {}, ones(trained), seed=1, given=found) == found
    assert len({reinit_seed(1), reinit_seed(2), 1, 2}) == 4


def test_what_a_round_begins_with() -> None:
    def begin(**settings: Any) -> Start:
        return start_of(LotteryConfig(rewind_to=100, **settings))

    assert begin() == begin(control="random") == begin(control="constant") == Start("dense", 100, "dense")
    assert begin(moments="zero") == Start("dense", 100, "zero")
    assert begin(control="reinit") == Start("fresh", 0, "zero")
    assert begin(control="stabilised") == Start("last", 0, "zero")
    assert begin(control="no_rewind") == Start("trained", 100, "trained")
    assert begin(control="no_rewind", moments="zero") == Start("trained", 100, "zero")
    assert start_of(LotteryConfig()) == Start("dense", 0, "dense")


def test_constant_tickets_keep_signs_in_one_magnitude_a_tensor() -> None:
    weights = {"fc": torch.tensor([[0.3, -0.1, 0.0], [2.0, 5.0, -7.0]]), "norm": torch.tensor([0.5, 2.0])}
    masks = Masks({"fc": torch.tensor([[1, 1, 1], [0, 1, 1]])})
    found = constant(weights, masks)
    alpha = math.sqrt(6 / (3 + 2))
    torch.testing.assert_close(found["fc"], alpha * torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -1.0]]))
    assert torch.equal(found["norm"], weights["norm"]), "what has no mask stays"
    assert weights["fc"][0, 0] == 0.3, "not in place"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, r"^rounds: must be at least 1, is 0$"),
        ({"fraction": 1.0}, r"^fraction: must be in \[0, 1\), is 1\.0$"),
        ({"fraction": -0.1}, r"^fraction: must be in \[0, 1\), is -0\.1$"),
        ({"rewind_to": -1}, r"^rewind_to: must be at least 0, is -1$"),
        ({"include": ()}, r"^include: must name at least one pattern"),
        ({"control": "stabilised"}, r"^rewind_to: must be above 0 with control: stabilised"),
        ({"masks_of": "lottery"}, r"^masks_of: needs control: random, reinit or constant, is none$"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LotteryConfig(**settings)


def test_restored_moments_are_masked_and_no_longer_move_what_is_pruned() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
    bias = optimizer.state[model.bias]["exp_avg"].clone()
    mask = torch.rand(4, 6) < 0.5
    technique = PrunedWeights(Masks({"weight": mask}))
    technique.attach(model)
    mask_optimizer(optimizer, dict(model.named_parameters()), technique.masks)
    for key in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[model.weight][key]
        assert torch.equal(moment, before[key] * mask)
        assert moment.any()
    assert optimizer.state[model.weight]["step"] == before["step"]
    assert torch.equal(optimizer.state[model.bias]["exp_avg"], bias)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert not model.weight.detach()[~mask].any(), "no moment is left to revive them"


def test_error_feedback_owes_nothing_to_pruned_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    parameters = list(model.parameters())
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    feedback = {"0": torch.arange(1.0, 7), "1": torch.ones(2), "3": torch.ones(2)}
    state = {"step": 4, "feedback": feedback, "candidates": {"all_reduce": {"feedback": {"0": torch.ones(6)}}}}
    mask_feedback(state, parameters, {id(parameters[0]): mask})
    assert feedback["0"].tolist() == [1, 0, 3, 0, 0, 6]
    assert feedback["1"].tolist() == feedback["3"].tolist() == [1, 1]
    assert state["candidates"]["all_reduce"]["feedback"]["0"].tolist() == [1, 0, 1, 0, 0, 1]  # type: ignore[index]
    mask_feedback({"step": 0, "feedback": None}, parameters, {})
