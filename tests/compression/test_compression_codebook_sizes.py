"""Centroids by what errors cost: a budget held, the largest gain first, sensitive weights first, sizes of the file."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import toy_model

from tenko.compression import Technique, write_artefact
from tenko.compression.codebook_sizes import SIZES, choose_centroids, least_bits, spend, stored_bits
from tenko.compression.config import IpqConfig, PqConfig, PqNoiseConfig, QuantizeConfig, QuantNoiseConfig
from tenko.compression.contents import read_contents
from tenko.compression.ipq import Ipq
from tenko.compression.pq import Blocks, PostTrainingPq, PqScheme, select_blocks
from tenko.compression.pq_noise import PqNoise
from tenko.nmt.corpus import Corpus

CONFIG = PqConfig(blocks={"ffn": 4, "embedding": 2, "attention": 4}, iterations=3)
WIDTHS = {"embed_dim": 64, "ffn_dim": 128}


def selected(corpus: Corpus) -> tuple[torch.nn.Module, list[Blocks]]:
    model = toy_model(corpus, **WIDTHS)
    return model, select_blocks(model, ("*",), (), CONFIG)


def ones(items: list[Blocks]) -> dict[str, torch.Tensor]:
    return {item.weight.name: torch.ones_like(item.weight.tensor) for item in items}


def bits_of(items: list[Blocks], chosen: dict[str, int], scheme: PqScheme = "pq") -> float:
    sizes = [(item.weight.tensor.numel(), item.block, chosen[item.weight.name]) for item in items]
    return sum(stored_bits(n // block, block, size, scheme) for n, block, size in sizes) / sum(n for n, _, _ in sizes)


def test_what_is_spent_gains_as_much_as_any_choice_of_convex_costs() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        costs = np.cumsum(generator.integers(1, 9, (4, 4)), axis=1).astype(float)
        # Each further bit gains less than the one before, as more centroids do.
        slopes = -np.sort(-generator.random((4, 3)), axis=1)
        gains = np.cumsum(slopes * np.diff(costs, axis=1), axis=1)
        errors = np.concatenate([np.full((4, 1), gains.max() + 1), gains.max() + 1 - gains], axis=1)
        budget = costs[:, 0].sum() + generator.integers(0, 40)
        chosen = spend(costs, errors, budget)

        def total(table: np.ndarray, columns: Any) -> float:
            return float(sum(table[i, j] for i, j in enumerate(columns)))

        spent = total(costs, chosen)
        assert spent <= budget
        # Optimal for what it spends; only the last few bits may be left over.
        fewest = min(total(errors, c) for c in product(range(4), repeat=4) if total(costs, c) <= spent)
        largest_step = float((slopes * np.diff(costs, axis=1)).max())
        assert total(errors, chosen) <= fewest + largest_step
        left = budget - spent
        steps = [costs[i, j + 1] - costs[i, j] for i, j in enumerate(chosen) if j < 3]
        assert all(step > left for step in steps), "nothing that would fit is left unbought"


def test_the_budget_is_held_and_nearly_spent(small_corpus: Corpus) -> None:
    _, items = selected(small_corpus)
    least = least_bits(items, "pq")
    fewest = dict.fromkeys(ones(items), SIZES[0])
    assert bits_of(items, fewest) == pytest.approx(least)
    assert choose_centroids(items, ones(items), least, scheme="pq", seed=1) == fewest
    errors = []
    for bits in (1.25, 1.75, 2.5):
        chosen = choose_centroids(items, ones(items), bits, scheme="pq", seed=1)
        assert bits - 0.1 < bits_of(items, chosen) <= bits
        model, _ = selected(small_corpus)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        config = QuantizeConfig(scheme="pq", pq=CONFIG)
        technique = PostTrainingPq(config, seed=1, centroids=chosen)
        technique.attach(model)
        technique.bake(model)
        errors.append(sum(float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters()))
    assert errors == sorted(errors, reverse=True), "more bits, less error"


def test_a_weight_that_the_loss_minds_more_gets_more_centroids(small_corpus: Corpus) -> None:
    _, items = selected(small_corpus)
    minded, unminded = "decoder.layers.0.fc1.weight", "encoder.layers.0.fc1.weight"
    equal = choose_centroids(items, ones(items), 1.5, scheme="pq", seed=1)
    assert equal[minded] == equal[unminded]
    gradients = ones(items)
    gradients[minded] *= 100
    gradients[unminded] *= 0
    chosen = choose_centroids(items, gradients, 1.5, scheme="pq", seed=1)
    assert chosen[minded] > equal[minded]
    assert chosen[unminded] == SIZES[0], "its errors cost nothing"
    scaled = {name: values * 1e-12 for name, values in gradients.items()}
    assert choose_centroids(items, scaled, 1.5, scheme="pq", seed=1) == chosen


def test_errors_count_where_they_are(small_corpus: Corpus) -> None:
    _, items = selected(small_corpus)
    item = next(item for item in items if item.weight.name == "encoder.layers.0.fc1.weight")
    with torch.no_grad():
        item.weight.tensor[:64] = 0.5  # exact with any codebook
    gradients = ones(items)
    gradients[item.weight.name][:64] *= 1e6
    gradients[item.weight.name][64:] = 0
    assert choose_centroids(items, gradients, 1.5, scheme="pq", seed=1)[item.weight.name] <= 4


@pytest.mark.parametrize("scheme", ["pq", "pq_int8"])
def test_bits_are_those_of_the_file(small_corpus: Corpus, tmp_path: Path, scheme: PqScheme) -> None:
    model, items = selected(small_corpus)
    chosen = choose_centroids(items, ones(items), 1.6, scheme=scheme, seed=1)
    technique = PostTrainingPq(QuantizeConfig(scheme=scheme, pq=CONFIG), seed=1, centroids=chosen)
    technique.attach(model)
    technique.bake(model)
    write_artefact(tmp_path / "file", model.state_dict(), metadata={}, technique=technique)
    found = sum(row.bytes for row in read_contents(tmp_path / "file").rows if row.scheme == scheme)
    expected = sum(
        stored_bits(item.weight.tensor.numel() // item.block, item.block, chosen[item.weight.name], scheme) / 8
        for item in items
    )
    assert expected <= found <= expected + 8 * len(items), "but for the last byte of each tensor"


@pytest.mark.parametrize("kind", [PqNoise, Ipq, PostTrainingPq])
def test_techniques_take_the_centroids_that_were_chosen(small_corpus: Corpus, kind: Any) -> None:
    model, items = selected(small_corpus)
    chosen = {item.weight.name: (4, 16, 64)[i % 3] for i, item in enumerate(items)}
    fields = {"blocks": CONFIG.blocks, "iterations": 3}
    config = {
        PqNoise: QuantNoiseConfig(scheme="pq", p=1, pq=PqNoiseConfig(**fields)),  # type: ignore[arg-type]
        Ipq: IpqConfig(**fields),  # type: ignore[arg-type]
        PostTrainingPq: QuantizeConfig(scheme="pq", pq=PqConfig(**fields)),  # type: ignore[arg-type]
    }[kind]
    technique: Technique = kind(config, centroids=chosen)
    technique.attach(model)
    if isinstance(technique, PqNoise):
        technique.before_update(0)
    if isinstance(technique, Ipq):
        for group in technique.groups:
            technique.quantize_group(group)
    technique.bake(model)
    for name, count in chosen.items():
        packed = technique.pack(name)
        assert packed is not None
        assert len(packed.parts["codebook"]) == count


def test_a_weight_that_holds_nan_is_named(small_corpus: Corpus) -> None:
    _, items = selected(small_corpus)
    with torch.no_grad():
        items[3].weight.tensor[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{items[3].weight.name}: holds inf or NaN"):
        choose_centroids(items, ones(items), 1.5, scheme="pq", seed=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": -1.0}, "bits: must be 0 to 8, is -1.0"),
        ({"bits": 9.0}, "bits: must be 0 to 8, is 9.0"),
        ({"bits": 1.5, "noise": "zero"}, "bits: must be 0 with noise: zero, which has no codebooks"),
        ({"bits": 1.5, "centroids": 64}, "centroids: are chosen with bits above 0; leave them out, or bits"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PqNoiseConfig(**fields)
