"""PQ noise: stored weights untouched, masks by update alone, codewords, zeros, attention reached, cut and resumed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_training import differing, snapshot, toy_model, toy_trainer, train

from tenko.compression import Technique, read_artefact, write_artefact
from tenko.compression.config import IpqConfig, PqNoiseConfig, QuantNoiseConfig
from tenko.compression.ipq import Ipq
from tenko.compression.pq import centroid_values
from tenko.compression.pq_noise import PqNoise
from tenko.nmt.corpus import Corpus

ATTENTION = [
    f"{side}.layers.0.{kind}.{name}"
    for side, kind in (("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn"))
    for name in ("q_proj", "k_proj", "v_proj", "out_proj")
]


def noise(p: float = 0.5, seed: int = 0, scheme: Any = "pq", **fields: Any) -> PqNoise:
    pq = PqNoiseConfig(**{"centroids": 16, "iterations": 4, **fields})
    return PqNoise(QuantNoiseConfig(scheme=scheme, p=p, pq=pq), seed=seed)


def attached(corpus: Corpus, technique: PqNoise) -> nn.Module:
    model = toy_model(corpus).train()
    technique.attach(model)
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace("parametrizations.", "").replace(".original", ""): p.detach().clone()
        for name, p in model.named_parameters()
    }


def weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.detach().clone()


def changed_blocks(model: nn.Module, name: str, block: int) -> torch.Tensor:
    """Which blocks of a weight are read as something else than is stored, bool [blocks]."""
    original = model.get_submodule(name).parametrizations.weight.original.detach()
    return (weight(model, name) != original).reshape(-1, block).any(1)


@pytest.mark.parametrize("kind", ["codeword", "zero"])
def test_noise_replaces_a_fraction_of_whole_blocks_and_leaves_stored_weights(small_corpus: Corpus, kind: str) -> None:
    technique = noise(0.2, noise=kind)
    assert isinstance(technique, Technique)
    model = attached(small_corpus, technique)
    before = stored(model)
    fractions = []
    for update in range(20):
        technique.before_update(update)
        changed = changed_blocks(model, "encoder.embed_tokens", 8)
        fractions.append(float(changed.float().mean()))
        read = weight(model, "encoder.embed_tokens").reshape(-1, 8)
        if kind == "zero":
            assert not read[changed].any()
        else:
            reader = model.encoder.embed_tokens.parametrizations.weight[0]
            values = centroid_values(reader.codebook, "pq")
            original = model.encoder.embed_tokens.parametrizations.weight.original.detach().reshape(-1, 8)
            codewords = values[torch.cdist(original.double(), values.double()).argmin(1)]
            assert torch.equal(read[changed], codewords[changed])
        technique.after_update(update)
    assert sum(fractions) / 20 == pytest.approx(0.2, abs=0.02)
    assert len(set(fractions)) > 5
    assert differing(stored(model), before) == []


@pytest.mark.parametrize("kind", ["codeword", "zero"])
def test_every_kind_of_weight_is_reached_and_changes_the_output(small_corpus: Corpus, kind: str) -> None:
    technique = noise(0.5, noise=kind)
    model = attached(small_corpus, technique).train()
    technique.before_update(0)
    tokens = torch.tensor([[5, 6, 7, 2]])
    for name in [*ATTENTION, "encoder.layers.0.fc1", "decoder.layers.0.fc2", "decoder.output_projection"]:
        module = model.get_submodule(name)
        assert changed_blocks(model, name, 4).any(), name
        noisy = model(tokens, torch.tensor([4]), tokens)[0].detach()
        reader = module.parametrizations.weight[0]
        exact = module.parametrizations.weight.original
        reader._value = exact.detach().clone()  # what the output would be if this weight alone were exact
        assert not torch.equal(model(tokens, torch.tensor([4]), tokens)[0], noisy), name
        reader.forget()


def test_the_mask_depends_on_seed_and_update_only(small_corpus: Corpus) -> None:
    name = "decoder.layers.0.fc1"

    def mask(update: int, seed: int = 0, before: int | None = None) -> torch.Tensor:
        technique = noise(0.3, seed=seed, noise="zero")
        model = attached(small_corpus, technique)
        if before is not None:
            technique.before_update(before)
            weight(model, name)
        technique.before_update(update)
        return changed_blocks(model, name, 8)

    assert torch.equal(mask(7), mask(7, before=3)), "not on what was drawn before"
    assert not torch.equal(mask(7), mask(8))
    assert not torch.equal(mask(7), mask(7, seed=1))


def test_all_reads_of_an_update_see_one_model_and_tied_sites_one_weight(small_corpus: Corpus) -> None:
    technique = noise(0.3)
    model = attached(small_corpus, technique)
    technique.before_update(0)
    first = weight(model, "encoder.embed_tokens")
    assert torch.equal(weight(model, "encoder.embed_tokens"), first)
    assert torch.equal(weight(model, "decoder.output_projection"), first)
    technique.before_update(1)
    assert not torch.equal(weight(model, "encoder.embed_tokens"), first)


def test_gradients_pass_straight_through_replaced_blocks_too(small_corpus: Corpus) -> None:
    technique = noise(0.5, noise="zero")
    model = attached(small_corpus, technique)
    technique.before_update(0)
    fc1 = model.encoder.layers[0].fc1
    probe = torch.randn(fc1.weight.shape, generator=torch.Generator().manual_seed(0))
    (fc1.weight * probe).sum().backward()
    assert torch.equal(fc1.parametrizations.weight.original.grad, probe)


@pytest.mark.parametrize("scheme", ["pq", "pq_int8"])
def test_evaluation_reads_the_nearest_codeword_of_every_block(small_corpus: Corpus, scheme: str) -> None:
    technique = noise(0.1, scheme=scheme)
    model = attached(small_corpus, technique)
    technique.before_update(0)
    model.eval()
    fc1 = model.encoder.layers[0].fc1
    values = centroid_values(fc1.parametrizations.weight[0].codebook, scheme)  # type: ignore[arg-type]
    for _ in range(2):
        blocks = fc1.parametrizations.weight.original.detach().reshape(-1, 8)
        nearest = values[torch.cdist(blocks.double(), values.double()).argmin(1)]
        assert torch.equal(fc1.weight, nearest.reshape(fc1.weight.shape))
        with torch.no_grad():  # weights of another update: other codes, the same codebook
            fc1.parametrizations.weight.original.neg_()


@pytest.mark.parametrize("p", [0.9, 1.0])
@pytest.mark.parametrize("centroids", [16, 256])  # 16: no codeword has the number that faiss gives a NaN
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_training_and_evaluation(
    small_corpus: Corpus, p: float, centroids: int, value: float
) -> None:
    technique = noise(p, centroids=centroids, refit_interval=0)
    model = attached(small_corpus, technique)
    technique.before_update(0)
    fc1 = model.encoder.layers[0].fc1
    with torch.no_grad():
        fc1.parametrizations.weight.original[3] = value
    for training in (True, False):
        technique.before_update(1)
        model.train(training)
        finite = torch.isfinite(fc1.weight)
        assert not finite[3].any()
        assert finite.sum() == finite.numel() - finite[3].numel()


def test_evaluation_under_zero_noise_reads_exact_weights(small_corpus: Corpus) -> None:
    technique = noise(0.5, noise="zero")
    model = attached(small_corpus, technique)
    technique.before_update(0)
    assert changed_blocks(model, "encoder.layers.0.fc1", 8).any()
    model.eval()
    assert not changed_blocks(model, "encoder.layers.0.fc1", 8).any()


@pytest.mark.parametrize(
    ("interval", "kept"), [(3, [True, True, False, True, True, False]), (0, [True] * 6)], ids=["each 3rd", "once"]
)
def test_codebooks_are_fitted_again_at_the_interval_and_not_between(
    small_corpus: Corpus, interval: int, kept: list[bool]
) -> None:
    technique = noise(refit_interval=interval)
    model = attached(small_corpus, technique)
    reader = model.encoder.layers[0].fc1.parametrizations.weight[0]
    fitted = []
    for update in range(7):
        technique.before_update(update)
        fitted.append(reader.codebook.clone())
        with torch.no_grad():
            model.encoder.layers[0].fc1.parametrizations.weight.original.mul_(1.5)
        technique.after_update(update)
    same = [torch.equal(one, next) for one, next in pairwise(fitted)]
    assert same == kept


def test_codewords_follow_weights_that_move_between_refits(small_corpus: Corpus) -> None:
    technique = noise(1.0, refit_interval=100)
    model = attached(small_corpus, technique)
    fc1 = model.encoder.layers[0].fc1
    technique.before_update(0)
    first = weight(model, "encoder.layers.0.fc1")
    with torch.no_grad():
        fc1.parametrizations.weight.original.neg_()
    technique.after_update(0)
    technique.before_update(1)
    second = weight(model, "encoder.layers.0.fc1")
    original = fc1.parametrizations.weight.original.detach()
    assert (second - original).norm() < 0.9 * original.norm()
    assert (first - original).norm() > 1.5 * original.norm(), "what was read before was of the weights before"


def test_bake_leaves_exact_weights_plain_tied_and_dense(small_corpus: Corpus) -> None:
    plain = toy_model(small_corpus)
    technique = noise(0.5)
    model = attached(small_corpus, technique)
    technique.before_update(0)
    technique.bake(model)
    assert differing(dict(model.state_dict()), dict(plain.state_dict())) == []
    assert model.encoder.embed_tokens.weight is model.decoder.output_projection.weight
    assert technique.pack("encoder.embed_tokens.weight") is None


@pytest.mark.parametrize("scheme", ["pq", "pq_int8"])
def test_at_p_1_bake_leaves_and_packs_what_evaluation_has_read(
    small_corpus: Corpus, tmp_path: Path, scheme: str
) -> None:
    technique = noise(1.0, scheme=scheme)
    model = attached(small_corpus, technique)
    technique.before_update(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # away from where the codebooks were fitted
    technique.after_update(0)
    model.eval()
    read = {name: weight(model, name) for name in ("encoder.embed_tokens", *ATTENTION)}
    vectors = {name: p.detach().half().float() for name, p in model.named_parameters() if p.dim() < 2}
    technique.bake(model)
    for name, values in read.items():
        assert torch.equal(model.get_submodule(name).weight, values), name
    assert {name: p for name, p in model.named_parameters() if p.dim() < 2}.keys() == vectors.keys()
    for name, values in vectors.items():
        assert torch.equal(model.get_parameter(name), values), name
    assert model.encoder.embed_tokens.weight is model.decoder.output_projection.weight
    write_artefact(tmp_path, model.state_dict(), metadata={}, technique=technique)
    state, metadata = read_artefact(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert {entry["scheme"] for entry in metadata["tensors"].values()} == {"dense", scheme}

    # Iterative product quantization goes on from those codewords: k-means finds them again.
    ipq = Ipq(IpqConfig(centroids=16))  # of blocks as large
    ipq.attach(model)
    assert max(ipq.quantize_group(group) for group in ipq.groups) < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["codeword", "zero"])
def test_a_training_that_is_cut_ends_as_an_uncut_one(
    small_corpus: Corpus, tmp_path: Path, kind: str, precision: str
) -> None:
    settings: dict[str, Any] = {
        "max_update": 8,
        "save_interval": 3,
        "valid_interval": 8,
        "update_freq": 2,
        "precision": precision,
    }

    def run(folder: str, cut: int | None = None) -> Any:
        technique = noise(0.3, noise=kind, refit_interval=5)
        model = attached(small_corpus, technique)
        trainer = toy_trainer(small_corpus, tmp_path / folder, model=model, techniques=[technique], **settings)
        trainer.resume()
        train(trainer, small_corpus, cut=cut)
        return trainer

    whole = run("whole")
    assert run("cut", cut=4).updates == 4
    again = run("cut")
    assert again.updates == 8
    assert differing(snapshot(again), snapshot(whole)) == []


def test_noise_changes_the_training(small_corpus: Corpus, tmp_path: Path) -> None:
    ends = []
    for name, p in (("exact", None), ("some", 0.1), ("more", 0.5)):
        technique = None if p is None else noise(p)
        model = toy_model(small_corpus)
        if technique is not None:
            technique.attach(model)
        techniques = [] if technique is None else [technique]
        trainer = toy_trainer(small_corpus, tmp_path / name, model=model, techniques=techniques, max_update=2)
        for _ in range(2):
            trainer.update()
        ends.append(stored(model)["encoder.layers.0.fc1.weight"])
    assert not any(torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])
