"""Int8PerChannel: stored weights untouched, ties kept, functional attention reached, errors bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tenko.compression import Int8PerChannel, QuantizeConfig, Technique, read_artefact, write_artefact
from tenko.compression.int8 import dequantize_rows, quantize_rows


class Tied(nn.Module):
    """One embedding module used twice, a projection that shares its weight, and a weight used functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embed_tokens": nn.Embedding(12, 8, padding_idx=1), "fc": nn.Linear(8, 8)})
        self.decoder = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "output_projection": nn.Linear(8, 12, bias=False)})
        self.decoder["embed_tokens"] = self.encoder["embed_tokens"]
        self.decoder["output_projection"].weight = self.encoder["embed_tokens"].weight
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder["fc"](self.encoder["embed_tokens"](tokens)) + self.decoder["embed_tokens"](tokens)
        query = self.decoder["q_proj"]
        hidden = self.norm(functional.linear(hidden, query.weight, query.bias))
        return self.decoder["output_projection"](hidden)


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(3)
    return Tied()


TOKENS = torch.tensor([[4, 5, 6, 1], [7, 8, 9, 10]])


def int8(*include: str, exclude: tuple[str, ...] = ()) -> Int8PerChannel:
    return Int8PerChannel(QuantizeConfig(include=include or ("*",), exclude=exclude))


def test_int8_is_a_technique() -> None:
    assert isinstance(int8(), Technique)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(-30, 30), st.sampled_from([(3, 5), (1, 1), (4, 2, 3), (7, 130)]))
def test_error_is_at_most_half_a_scale(seed: int, exponent: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert scale.shape == weight.shape[:1]
    error = (dequantize_rows(codes, scale).double() - weight.double()).abs().reshape(shape[0], -1).amax(1)
    assert bool((error <= scale.double() / 2 * (1 + 1e-4)).all())  # 127 * 2**-24 of rounding in the quotient
    if exponent > -30:
        assert bool((codes.reshape(shape[0], -1).abs().amax(1) == 127).all())


def test_rows_of_zeros_and_of_tiny_values_become_zero() -> None:
    codes, scale = quantize_rows(torch.tensor([[0.0, -0.0], [1e-40, 3e-42], [1.0, -0.5]]))
    assert scale.tolist()[:2] == [0.0, 0.0]
    assert codes.tolist() == [[0, 0], [0, 0], [127, -64]]
    assert not dequantize_rows(codes, scale)[:2].any()


def test_attached_model_reads_dequantized_weights_and_stores_the_old_ones(model: Tied) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = {id(p) for p in model.parameters()}
    plain = model(TOKENS)
    int8().attach(model)
    for _ in range(3):
        noisy = model(TOKENS)
    assert not torch.equal(plain, noisy)
    assert {id(p) for p in model.parameters()} == parameters
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name.replace("parametrizations.", "").replace(".original", "")]), name
    wanted = dequantize_rows(*quantize_rows(before["decoder.q_proj.weight"]))
    assert torch.equal(model.decoder["q_proj"].weight, wanted)


def test_gradient_passes_straight_through_and_training_moves_the_tied_weight_once(model: Tied) -> None:
    int8().attach(model)
    weight = model.encoder["embed_tokens"].parametrizations.weight.original
    assert weight is model.decoder["output_projection"].parametrizations.weight.original
    probe = torch.randn(12, 8)
    (model.decoder["output_projection"].weight * probe).sum().backward()
    assert torch.equal(weight.grad, probe)
    model.zero_grad()
    model(TOKENS).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.encoder["embed_tokens"].weight, model.decoder["output_projection"].weight)


def test_baked_model_is_plain_tied_and_equal_to_the_attached_one_and_to_the_file(model: Tied, tmp_path: Path) -> None:
    names = set(model.state_dict())
    technique = int8()
    technique.attach(model)
    attached = model(TOKENS)
    technique.bake(model)
    assert set(model.state_dict()) == names
    assert {type(m) for m in model.modules()} == {Tied, nn.ModuleDict, nn.Embedding, nn.Linear, nn.LayerNorm}
    assert model.encoder["embed_tokens"].weight is model.decoder["output_projection"].weight
    assert torch.equal(model(TOKENS), attached)
    write_artefact(tmp_path, model.state_dict(), metadata={}, technique=technique)
    state, metadata = read_artefact(tmp_path)
    assert {n for n, e in metadata["tensors"].items() if e["scheme"] == "int8"} == {
        "encoder.embed_tokens.weight",
        "encoder.fc.weight",
        "decoder.q_proj.weight",
    }
    assert set(state) == names
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_only_matched_weights_change(model: Tied) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    technique = int8("*.weight", exclude=("decoder.output_projection.*",))  # an alias: takes the whole tied weight out
    technique.attach(model)
    technique.bake(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"encoder.fc.weight", "decoder.q_proj.weight"}
    assert technique.pack("decoder.embed_tokens.weight") is None


@pytest.mark.parametrize("pattern", ["encoder.nothing.*", "*.bias", "norm.*", "Encoder*"])
@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_no_weight_is_an_error(model: Tied, key: str, pattern: str) -> None:
    technique = int8("*", pattern) if key == "include" else int8(exclude=(pattern,))
    with pytest.raises(ValueError, match=rf"^{key}: .* matches no weight; valid names are encoder\.embed_tokens\.w.*$"):
        technique.attach(model)
    model(TOKENS)
    assert not any("parametrizations" in name for name in model.state_dict())


def test_excluding_everything_is_an_error(model: Tied) -> None:
    with pytest.raises(ValueError, match=r"^exclude: .* leaves none"):
        int8(exclude=("*",)).attach(model)


def test_non_finite_weights_are_refused_by_name_when_baking(model: Tied) -> None:
    with torch.no_grad():
        model.encoder["fc"].weight[2, 2] = torch.nan
    technique = int8()
    technique.attach(model)
    with pytest.raises(ValueError, match=r"encoder\.fc\.weight: holds inf or NaN"):
        technique.bake(model)


def test_fairseq_attention_projections_really_are_quantized() -> None:
    from fairseq.modules.multihead_attention import MultiheadAttention

    torch.manual_seed(0)
    attention = MultiheadAttention(16, 2, self_attention=True).eval()
    hidden = torch.randn(5, 3, 16)  # [time, batch, width]
    plain, _ = attention(hidden, hidden, hidden)
    outputs = []
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        technique = int8(f"{name}.weight")
        kept = getattr(attention, name).weight.detach().clone()
        technique.attach(attention)
        outputs.append(attention(hidden, hidden, hidden)[0])
        assert not torch.equal(outputs[-1], plain), name
        assert torch.allclose(outputs[-1], plain, atol=0.02), name
        technique.bake(attention)
        assert torch.equal(attention(hidden, hidden, hidden)[0], outputs[-1])
        with torch.no_grad():
            getattr(attention, name).weight.copy_(kept)
    assert torch.equal(attention(hidden, hidden, hidden)[0], plain)
