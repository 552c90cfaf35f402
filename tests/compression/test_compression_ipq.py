"""iPQ: a codebook in the weight's place, mean gradients, groups in order, ties, the file, cut and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_training import differing, snapshot, toy_model, toy_trainer, train

from tenko.comm.config import SplitRule
from tenko.comm.split import assign, plain_name, weight_shapes
from tenko.compression import Technique, read_artefact, write_artefact
from tenko.compression.config import IpqConfig
from tenko.compression.ipq import Ipq
from tenko.compression.pq import centroid_values
from tenko.nmt.corpus import Corpus

GROUPS = ["ffn", "embedding", "attention"]
TOKENS = torch.tensor([[5, 6, 7, 8, 2]])


def ipq(seed: int = 0, **fields: Any) -> Ipq:
    return Ipq(IpqConfig(**{"centroids": 16, **fields}), seed=seed)


def quantized(corpus: Corpus, *groups: str, **fields: Any) -> tuple[nn.Module, Ipq]:
    model, technique = toy_model(corpus), ipq(**fields)
    technique.attach(model)
    for group in groups:
        technique.quantize_group(group)
    return model, technique


def logits(model: nn.Module) -> Tensor:
    return model.eval()(TOKENS, torch.tensor([5]), TOKENS)[0]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def parametrized(name: str) -> str:
    return name.removesuffix("weight") + "parametrizations.weight.original"


def test_attach_finds_the_groups_in_order_and_changes_nothing(small_corpus: Corpus) -> None:
    model, technique = quantized(small_corpus)
    assert isinstance(technique, Technique)
    assert technique.groups == GROUPS
    assert differing(parameters(model), parameters(toy_model(small_corpus))) == []
    model, technique = quantized(small_corpus, blocks={"attention": 2, "embedding": 4, "ffn": 8})
    assert technique.groups == ["attention", "embedding", "ffn"]


def test_codebooks_take_the_place_of_a_groups_weights_and_the_rest_stays(small_corpus: Corpus) -> None:
    before = parameters(toy_model(small_corpus))
    model, _ = quantized(small_corpus, "ffn")
    after = parameters(model)
    feed_forward = {name for name in before if name.endswith(("fc1.weight", "fc2.weight"))}
    assert len(feed_forward) == 4
    assert after.keys() == before.keys() - feed_forward | {parametrized(name) for name in feed_forward}
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name])
    for name in feed_forward:
        assert after[parametrized(name)].shape == (16, 8)
    assert sum(p.numel() for p in after.values()) < sum(p.numel() for p in before.values())


def test_rules_of_a_split_know_a_codebook_as_its_weight(small_corpus: Corpus) -> None:
    rules = [SplitRule(route="fp32", max_numel=200), SplitRule(route="all_reduce", min_numel=201)]
    plain = weight_shapes(toy_model(small_corpus))
    model, _ = quantized(small_corpus, *GROUPS)
    assert parameters(model).keys() - plain.keys(), "codebooks have names of their own"
    shapes = {plain_name(name): weight_shapes(model)[plain_name(name)] for name in parameters(model)}
    assert shapes == plain
    assert set(assign(rules, shapes).values()) == {"fp32", "all_reduce"}
    stored = {plain_name(name): parameter.shape for name, parameter in parameters(model).items()}
    with pytest.raises(ValueError, match="takes no parameter"):
        assign(rules, stored)


def test_the_error_of_a_group_is_that_of_what_modules_read(small_corpus: Corpus) -> None:
    model, technique = toy_model(small_corpus), ipq()
    technique.attach(model)
    exact = model.encoder.embed_tokens.weight.detach().clone()
    error = technique.quantize_group("embedding")
    read = model.encoder.embed_tokens.weight.detach()
    assert error == pytest.approx(float((read - exact).norm() / exact.norm()), rel=1e-5)
    assert 0.1 < error < 0.9
    values = centroid_values(model.encoder.embed_tokens.parametrizations.weight.original, "pq")
    assert {tuple(block.tolist()) for block in read.reshape(-1, 8)} <= {tuple(row.tolist()) for row in values}


def test_tied_weights_share_one_codebook(small_corpus: Corpus) -> None:
    model, _ = quantized(small_corpus, "embedding")
    embedding = model.encoder.embed_tokens.parametrizations.weight.original
    assert model.decoder.output_projection.parametrizations.weight.original is embedding
    assert torch.equal(model.decoder.output_projection.weight, model.decoder.embed_tokens.weight)
    assert [name for name, p in model.named_parameters() if p is embedding] == [
        "encoder.embed_tokens.parametrizations.weight.original"
    ]


@pytest.mark.parametrize("scheme", ["pq", "pq_int8"])
def test_a_centroids_gradient_is_the_mean_of_its_blocks(small_corpus: Corpus, scheme: str) -> None:
    model, technique = quantized(small_corpus, "ffn", scheme=scheme)
    fc1 = model.encoder.layers[0].fc1
    codes = technique.state_dict()["encoder.layers.0.fc1.weight"]["codes"].reshape(-1)
    assert len(codes.bincount().unique()) > 1, "or a sum would be told from a mean by a factor only"
    probe = torch.randn(fc1.weight.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # two reads, for instance two micro-batches, add up
        (fc1.weight * probe).sum().backward()
    gradient = fc1.parametrizations.weight.original.grad
    for code in range(16):
        mean = probe.reshape(-1, 8)[codes == code].mean(0)
        torch.testing.assert_close(gradient[code], 2 * mean, rtol=1e-5, atol=1e-6)


def test_the_mean_gradient_is_the_true_one_divided_by_the_number_of_blocks(small_corpus: Corpus) -> None:
    model, technique = quantized(small_corpus, "ffn", "embedding", "attention")
    expected = {}
    plain = toy_model(small_corpus)
    state = {name: p.detach() for name, p in model.named_parameters() if "parametrizations" not in name}
    for name, kept in technique.state_dict().items():
        module = model.get_submodule(name.removesuffix(".weight"))
        codebook = centroid_values(module.parametrizations.weight.original, "pq").requires_grad_()
        expected[name] = (codebook, kept["codes"].long())
        state[name] = codebook[kept["codes"].long()].reshape(plain.get_parameter(name).shape)
    state["decoder.embed_tokens.weight"] = state["decoder.output_projection.weight"] = state[
        "encoder.embed_tokens.weight"
    ]
    arguments = (TOKENS, torch.tensor([5]), TOKENS)
    out = torch.func.functional_call(plain.eval(), state, arguments, tie_weights=False)[0]
    out.square().sum().backward()
    logits(model).square().sum().backward()
    for name, (codebook, codes) in expected.items():
        found = model.get_submodule(name.removesuffix(".weight")).parametrizations.weight.original.grad
        counts = codes.reshape(-1).bincount(minlength=16)[:, None]
        assert codebook.grad is not None
        torch.testing.assert_close(
            found, codebook.grad / counts, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scheme", ["pq", "pq_int8"])
def test_what_was_trained_is_what_the_file_holds(small_corpus: Corpus, tmp_path: Path, scheme: str) -> None:
    names = set(toy_model(small_corpus).state_dict())
    model, technique = quantized(small_corpus, *GROUPS, scheme=scheme)
    trainer = toy_trainer(small_corpus, tmp_path, model=model, techniques=[technique])
    codebook = model.encoder.embed_tokens.parametrizations.weight.original
    before = codebook.detach().clone()
    for _ in range(2):
        trainer.update()
    assert not torch.equal(codebook, before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.copy_(parameter.half())  # as the file will have it
    trained = logits(model)
    technique.bake(model)
    assert set(model.state_dict()) == names
    assert not any("Parametrized" in type(module).__name__ for module in model.modules())
    assert model.encoder.embed_tokens.weight is model.decoder.output_projection.weight
    assert torch.equal(logits(model), trained)
    write_artefact(tmp_path, model.state_dict(), metadata={}, technique=technique)
    state, metadata = read_artefact(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    schemes = {entry["scheme"] for name, entry in metadata["tensors"].items() if name.endswith("proj.weight")}
    assert schemes == {scheme}


def test_groups_that_are_not_quantized_are_baked_as_they_are(small_corpus: Corpus) -> None:
    model, technique = quantized(small_corpus, "ffn")
    technique.bake(model)
    assert technique.pack("decoder.layers.0.fc1.weight") is not None
    assert technique.pack("encoder.embed_tokens.weight") is None
    before = parameters(toy_model(small_corpus))
    assert torch.equal(model.encoder.embed_tokens.weight, before["encoder.embed_tokens.weight"])


def test_training_lowers_the_loss_that_quantizing_has_raised(small_corpus: Corpus, tmp_path: Path) -> None:
    model, technique = quantized(small_corpus, *GROUPS)
    trainer = toy_trainer(small_corpus, tmp_path, model=model, techniques=[technique], max_update=30, log_interval=10)
    losses = [line["nll"] for line in train(trainer, small_corpus) if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_group_that_is_cut_ends_as_an_uncut_one(small_corpus: Corpus, tmp_path: Path, precision: str) -> None:
    settings: dict[str, Any] = {
        "max_update": 8,
        "save_interval": 3,
        "valid_interval": 8,
        "update_freq": 2,
        "precision": precision,
    }

    def run(folder: str, seed: int, cut: int | None = None) -> Any:
        model, technique = quantized(small_corpus, "ffn", "embedding", seed=seed)
        trainer = toy_trainer(small_corpus, tmp_path / folder, model=model, techniques=[technique], **settings)
        trainer.resume()
        train(trainer, small_corpus, cut=cut)
        return trainer, technique.state_dict()

    whole, codes = run("whole", seed=0)
    assert run("cut", seed=0, cut=4)[0].updates == 4
    again, codes_again = run("cut", seed=9)  # k-means would give other codes: the checkpoint's count
    assert again.updates == 8
    assert differing(snapshot(again), snapshot(whole)) == []
    for name, kept in codes.items():
        assert torch.equal(kept["codes"], codes_again[name]["codes"]), name


def test_a_finished_group_comes_back_from_its_state_without_k_means(
    small_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, technique = quantized(small_corpus, "ffn", "embedding")
    state, weights = technique.state_dict(), parameters(model)
    monkeypatch.setattr("tenko.compression.kmeans.fit", None)
    other, again = quantized(small_corpus)
    again.load_state_dict(state)
    assert [name for name, _ in other.named_parameters()] == list(weights)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name])
    assert torch.equal(logits(other), logits(model))


def test_a_codebook_that_diverged_is_refused_by_name(small_corpus: Corpus) -> None:
    model, technique = quantized(small_corpus, "ffn")
    with torch.no_grad():
        model.decoder.layers[0].fc2.parametrizations.weight.original[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"^decoder\.layers\.0\.fc2\.weight: holds inf or NaN"):
        technique.bake(model)


def test_attention_reads_the_decoded_projections(small_corpus: Corpus) -> None:
    plain = logits(toy_model(small_corpus))
    for name in ("q", "k", "v", "out"):
        model, technique = toy_model(small_corpus), ipq(include=(f"*{name}_proj.weight",), blocks={"attention": 4})
        technique.attach(model)
        technique.quantize_group("attention")
        assert not torch.equal(logits(model), plain), name


def test_a_block_that_does_not_divide_is_refused_before_any_k_means(
    small_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenko.compression.kmeans.fit", None)
    with pytest.raises(ValueError, match=r"\Ablocks: attention is 3, which does not divide the 16 columns of \S+;.*\Z"):
        ipq(blocks={"ffn": 8, "embedding": 8, "attention": 3}).attach(toy_model(small_corpus))
