"""QuantNoise: stored weights untouched, exact fractions, ties kept, attention reached, one model an update."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy_training import differing, snapshot, toy_model, toy_trainer

from tenko.compression import QuantizeConfig, QuantNoise, QuantNoiseConfig, Technique, read_artefact, write_artefact
from tenko.compression.noise import make_quantizer
from tenko.compression.pq_noise import PqNoise
from tenko.compression.scalar import decode
from tenko.nmt.corpus import Corpus
from tenko.nmt.trainer import Trainer

SCHEMES = ("int8", "int4", "ternary", "lat", "binary")


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


def all_of(*include: str, **settings: Any) -> QuantNoise:
    """Quantizes all matched weights, as post-training quantization does."""
    return QuantNoise(QuantizeConfig(include=include or ("*",), **settings))


def noise(seed: int = 1, **settings: Any) -> QuantNoise:
    return QuantNoise(QuantNoiseConfig(**settings), seed)


def quantized(weight: Tensor, **settings: Any) -> Tensor:
    return decode(make_quantizer(QuantizeConfig(**settings)).quantize(weight))


def test_it_is_a_technique_named_after_its_scheme() -> None:
    assert isinstance(noise(), Technique)
    assert noise(scheme="int4").name == "int4"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_noise_leaves_stored_weights_bit_identical(model: Tied, scheme: str, p: float) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters = {id(parameter) for parameter in model.parameters()}
    plain = model(TOKENS)
    technique = noise(scheme=scheme, p=p)
    technique.attach(model)
    for update in range(100):
        technique.before_update(update)
        noisy = model.train()(TOKENS)
        noisy.square().sum().backward()
        model.eval()(TOKENS)
    assert not torch.equal(plain, noisy)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert not list(model.buffers())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name.replace("parametrizations.", "").replace(".original", "")]), name


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("block", [1, 8])
def test_a_fraction_p_is_quantized_and_the_rest_exact(p: float, block: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 400, bias=False)
    stored = layer.weight.detach().clone()
    technique = noise(scheme="int4", p=p, block_size=block)
    technique.attach(layer)
    technique.before_update(7)
    read, target = layer.weight.detach().clone(), quantized(stored, scheme="int4")
    chosen = (read != stored).view(-1, block).any(1)
    assert torch.equal(read, torch.where(chosen.repeat_interleave(block).view_as(stored), target, stored))
    blocks = stored.numel() // block
    assert abs(int(chosen.sum()) - p * blocks) < 5 * math.sqrt(p * (1 - p) * blocks)


def masks(layer: nn.Module, seed: int, update: int, **settings: Any) -> Tensor:
    technique = noise(seed, scheme="int4", **settings)
    stored = layer.weight.detach().clone()
    technique.attach(layer)
    technique.before_update(update)
    found = layer.weight != stored
    technique.bake(layer)
    with torch.no_grad():
        layer.weight.copy_(stored)
    return found


def test_masks_depend_on_seed_update_and_tensor_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    first = masks(layer, 1, 5)
    torch.manual_seed(9)
    torch.rand(77)
    assert torch.equal(masks(layer, 1, 5), first)
    assert not torch.equal(masks(layer, 1, 6), first)
    assert not torch.equal(masks(layer, 2, 5), first)
    pair = nn.Sequential(layer, nn.Linear(64, 64))
    with torch.no_grad():
        pair[1].weight.copy_(pair[0].weight)
    technique = noise(scheme="int4")
    technique.attach(pair)
    technique.before_update(5)
    assert not torch.equal(pair[0].weight, pair[1].weight)


def test_one_update_sees_one_model_and_evaluation_everything_quantized(model: Tied) -> None:
    technique = noise(scheme="int4")
    technique.attach(model)
    stored = model.decoder["q_proj"].parametrizations.weight.original
    technique.before_update(0)
    first = model(TOKENS)
    assert torch.equal(model(TOKENS), first)
    model.eval()
    assert torch.equal(model.decoder["q_proj"].weight, quantized(stored, scheme="int4"))
    model.train()
    assert torch.equal(model(TOKENS), first)
    technique.before_update(1)
    assert not torch.equal(model(TOKENS), first)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_p_of_one_equals_evaluation_and_the_baked_model_and_the_file(model: Tied, tmp_path: Path, scheme: str) -> None:
    names = set(model.state_dict())
    technique = noise(scheme=scheme, p=1.0)
    technique.attach(model)
    technique.before_update(0)
    trained, evaluated = model.train()(TOKENS), model.eval()(TOKENS)
    technique.bake(model)
    assert torch.equal(trained, evaluated)
    assert torch.equal(model(TOKENS), trained)
    assert set(model.state_dict()) == names
    assert {type(m) for m in model.modules()} == {Tied, nn.ModuleDict, nn.Embedding, nn.Linear, nn.LayerNorm}
    assert model.encoder["embed_tokens"].weight is model.decoder["output_projection"].weight
    write_artefact(tmp_path, model.state_dict(), metadata={}, technique=technique)
    state, metadata = read_artefact(tmp_path)
    stored = "ternary" if scheme == "lat" else scheme
    assert {name for name, entry in metadata["tensors"].items() if entry["scheme"] == stored} == {
        "encoder.embed_tokens.weight",
        "encoder.fc.weight",
        "decoder.q_proj.weight",
    }
    assert set(state) == names
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_post_training_quantization_is_p_of_one_without_training(model: Tied) -> None:
    stored = model.encoder["fc"].weight.detach().clone()
    technique = all_of(scheme="int4", clip="mse", granularity="tensor")
    technique.attach(model)
    technique.bake(model)
    assert torch.equal(model.encoder["fc"].weight, quantized(stored, scheme="int4", clip="mse", granularity="tensor"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_passes_straight_through_and_training_moves_the_tied_weight_once(model: Tied, scheme: str) -> None:
    technique = noise(scheme=scheme)
    technique.attach(model)
    weight = model.encoder["embed_tokens"].parametrizations.weight.original
    assert weight is model.decoder["output_projection"].parametrizations.weight.original
    technique.before_update(0)
    probe = torch.randn(12, 8)
    (model.decoder["output_projection"].weight * probe).sum().backward()
    assert torch.equal(weight.grad, probe)
    (model.encoder["embed_tokens"].weight * probe).sum().backward()
    assert torch.equal(weight.grad, 2 * probe)
    model.zero_grad()
    model(TOKENS).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.encoder["embed_tokens"].weight, model.decoder["output_projection"].weight)


@pytest.mark.parametrize("fused", [True, False])
def test_modules_read_the_new_weights_after_an_update(model: Tied, fused: bool) -> None:
    """torch's fused AdamW does not raise a weight's version."""
    technique = noise(p=1.0)
    technique.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for update in range(3):
        technique.before_update(update)
        model(TOKENS).square().sum().backward()
        optimizer.step()
        technique.after_update(update)
        stored = model.encoder["fc"].parametrizations.weight.original
        assert torch.equal(model.encoder["fc"].weight, quantized(stored))
    with torch.no_grad():
        stored.mul_(3.0)  # as loading a checkpoint does
    assert torch.equal(model.encoder["fc"].weight, quantized(stored))


def test_weights_are_quantized_once_an_update_whoever_reads_them(model: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    technique = noise()
    technique.attach(model)
    calls = []
    quantize = technique.quantizer.quantize
    monkeypatch.setattr(type(technique.quantizer), "quantize", lambda self, *args: calls.append(1) or quantize(*args))
    technique.before_update(0)
    for _ in range(3):  # micro-batches
        model(TOKENS).square().sum().backward()
    assert len(calls) == 3  # weights; four sites, three micro-batches


def test_pruned_weights_stay_zero_and_are_stored_as_zeros(model: Tied) -> None:
    with torch.no_grad():
        model.encoder["fc"].weight[model.encoder["fc"].weight.abs() < 0.2] = 0.0
    mask = model.encoder["fc"].weight == 0
    for scheme in ("int8", "int4", "ternary", "lat"):
        technique = noise(scheme=scheme)
        technique.attach(model)
        technique.before_update(0)
        assert not model.encoder["fc"].weight[mask].any()
        technique.bake(model)
        packed = technique.pack("encoder.fc.weight")
        assert packed is not None
        assert not packed.parts["codes"][mask].any()
        assert packed.parts["codes"].any()


def test_only_matched_weights_change(model: Tied) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    technique = all_of("*.weight", exclude=("decoder.output_projection.*",))  # an alias: takes the tied weight out
    technique.attach(model)
    technique.bake(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"encoder.fc.weight", "decoder.q_proj.weight"}
    assert technique.pack("decoder.embed_tokens.weight") is None


@pytest.mark.parametrize("pattern", ["encoder.nothing.*", "*.bias", "norm.*", "Encoder*"])
@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_no_weight_is_an_error(model: Tied, key: str, pattern: str) -> None:
    technique = all_of("*", pattern) if key == "include" else all_of(exclude=(pattern,))
    with pytest.raises(ValueError, match=rf"^{key}: .* matches no weight; valid names are encoder\.embed_tokens\.w.*$"):
        technique.attach(model)
    assert not any("parametrizations" in name for name in model.state_dict())


def test_excluding_everything_is_an_error(model: Tied) -> None:
    with pytest.raises(ValueError, match=r"^exclude: .* leaves none"):
        all_of(exclude=("*",)).attach(model)


def test_a_block_that_does_not_divide_is_an_error_that_names_the_weight(model: Tied) -> None:
    technique = noise(block_size=3)
    with pytest.raises(ValueError, match=r"^block_size: .* is 3; encoder\.embed_tokens\.weight has 8$"):
        technique.attach(model)
    assert not any("parametrizations" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"p": 0.0}, "p"),
        ({"p": 1.1}, "p"),
        ({"p": math.nan}, "p"),
        ({"block_size": 0}, "block_size"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"scheme": "pq", "activations": True}, "activations"),
        ({"scheme": "pq_int8", "block_size": 8}, "block_size"),
        ({"scheme": "ternary", "clip": "mse"}, "clip"),
        ({"include": ()}, "include"),
        ({"scheme": "int2"}, "scheme"),
        ({"granularity": "row"}, "granularity"),
        ({"clip": "mean"}, "clip"),
    ],
)
def test_bad_settings_are_refused_by_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: "):
        QuantNoiseConfig(**settings)


@pytest.mark.parametrize("scheme", ["pq", "pq_int8"])
def test_product_quantization_is_sent_to_its_own_techniques(scheme: Any) -> None:
    with pytest.raises(ValueError, match=rf"^scheme: {scheme} is for PqNoise, PostTrainingPq and Ipq"):
        QuantNoise(QuantNoiseConfig(scheme=scheme))


def test_non_finite_weights_are_refused_by_name_when_baking(model: Tied) -> None:
    with torch.no_grad():
        model.encoder["fc"].weight[2, 2] = torch.nan
    technique = all_of()
    technique.attach(model)
    with pytest.raises(ValueError, match=r"encoder\.fc\.weight: holds inf or NaN"):
        technique.bake(model)


def test_fairseq_attention_projections_really_are_quantized() -> None:
    from fairseq.modules.multihead_attention import MultiheadAttention

    torch.manual_seed(0)
    attention = MultiheadAttention(16, 2, self_attention=True).eval()
    hidden = torch.randn(5, 3, 16)  # [time, batch, width]
    plain, _ = attention(hidden, hidden, hidden)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        technique = all_of(f"{name}.weight")
        kept = getattr(attention, name).weight.detach().clone()
        technique.attach(attention)
        output, _ = attention(hidden, hidden, hidden)
        assert not torch.equal(output, plain), name
        assert torch.allclose(output, plain, atol=0.02), name
        technique.bake(attention)
        assert torch.equal(attention(hidden, hidden, hidden)[0], output)
        with torch.no_grad():
            getattr(attention, name).weight.copy_(quantized(kept))
        assert torch.equal(attention(hidden, hidden, hidden)[0], output), name
        with torch.no_grad():
            getattr(attention, name).weight.copy_(kept)
    assert torch.equal(attention(hidden, hidden, hidden)[0], plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_whole_fairseq_transformer_reads_the_dequantized_weights(small_corpus: Corpus, scheme: str) -> None:
    batch = toy_trainer(small_corpus, Path("unused")).stream.update(1).samples[0]["net_input"]
    model, expected = toy_model(small_corpus).eval(), toy_model(small_corpus).eval()
    plain = expected(**batch)[0]
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.dim() == 2:
                parameter.copy_(quantized(parameter, scheme=scheme))
    technique = all_of(scheme=scheme)
    technique.attach(model)
    output = model(**batch)[0]
    assert torch.equal(output, expected(**batch)[0])
    assert not torch.allclose(output, plain, atol=1e-4)


def train(trainer: Trainer, updates: int) -> dict[str, Tensor]:
    for _ in range(updates):
        trainer.update()
    return snapshot(trainer)


def noisy_trainer(corpus: Corpus, folder: Path, technique: QuantNoise | None = None, **settings: Any) -> Trainer:
    model = toy_model(corpus)
    technique = technique or noise(scheme="int4")
    technique.attach(model)
    return toy_trainer(corpus, folder, model=model, techniques=[technique], **settings)


def plain_noise(stored: Tensor, seed: int, update: int, position: int) -> Tensor:
    """What int4 with p = 0.5 reads, in the words of its docstring."""
    import numpy as np

    state = int(np.random.SeedSequence((seed, update, position)).generate_state(1)[0])
    draws = torch.rand(stored.numel(), generator=torch.Generator().manual_seed(state)).view_as(stored)
    return torch.where(draws < 0.5, quantized(stored, scheme="int4"), stored)


@pytest.mark.parametrize("update_freq", [1, 2])
def test_training_equals_a_plain_loop_that_swaps_the_weights(
    small_corpus: Corpus, tmp_path: Path, update_freq: int
) -> None:
    """Accumulated micro-batches see the same noise; weights, tied ones too, get the sum of their gradients."""
    from tenko.nmt.fairseq_bridge import ModelWithLoss
    from tenko.nmt.schedule import learning_rate

    trainer = noisy_trainer(small_corpus, tmp_path, update_freq=update_freq)
    found = train(trainer, 3)
    model = toy_model(small_corpus)
    with_loss = ModelWithLoss(model, trainer.config.label_smoothing).train()
    config = trainer.config
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.adam_betas, eps=config.adam_eps, weight_decay=0, fused=True
    )
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    for update in range(3):
        stored = [matrix.detach().clone() for matrix in matrices]
        with torch.no_grad():
            for position, matrix in enumerate(matrices):
                matrix.copy_(plain_noise(stored[position], 1, update, position))
        work = trainer.stream.update(update + 1)
        for sample in work.samples:
            (with_loss(sample)[0] / work.target_tokens).backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        with torch.no_grad():
            for matrix, kept in zip(matrices, stored, strict=True):
                matrix.copy_(kept)
        optimizer.param_groups[0]["lr"] = learning_rate(config, update)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        attached = f"{owner}.parametrizations.{attribute}.original"
        assert torch.equal(found[attached if attached in found else name], parameter), name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_noise_trains_under_autocast_and_loss_scaling(small_corpus: Corpus, tmp_path: Path, precision: str) -> None:
    trainer = noisy_trainer(small_corpus, tmp_path, precision=precision, init_scale=2.0**20, log_interval=1)
    before = snapshot(trainer)
    losses = []
    for _ in range(12):
        trainer.update()
        losses.append(float(trainer.sums.loss) / trainer.sums.tokens)
        trainer._reset_figures()
    assert min(losses[-3:]) < losses[0]
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    moved = differing(before, snapshot(trainer))
    assert any("parametrizations" in name for name in moved)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters.values())
    assert trainer.model.encoder.layers[0].fc1.weight.dtype == torch.float32


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_read_under_autocast_is_what_is_baked(scheme: str, granularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(512, 512))
    with torch.no_grad():
        model[0].weight.add_(1.0)  # a sum over all of them does not fit fp16
    technique = all_of(scheme=scheme, granularity=granularity)
    technique.attach(model)
    technique.before_update(0)  # what was read so far is read anew
    with torch.autocast("cpu", dtype=dtype):
        read = model[0].weight.detach().clone()
    technique.bake(model)
    assert torch.equal(read, model[0].weight)
    assert torch.isfinite(read).all()


def test_a_resumed_run_draws_the_same_noise(small_corpus: Corpus, tmp_path: Path) -> None:
    whole = train(noisy_trainer(small_corpus, tmp_path / "whole"), 4)
    cut = noisy_trainer(small_corpus, tmp_path / "cut")
    train(cut, 2)
    cut.save()
    resumed = noisy_trainer(small_corpus, tmp_path / "cut")
    assert resumed.resume()
    assert differing(train(resumed, 2), whole) == []
    assert differing(train(noisy_trainer(small_corpus, tmp_path / "other", noise(2, scheme="int4")), 4), whole)


def test_lat_weights_errors_by_adams_second_moment_and_resumes(small_corpus: Corpus, tmp_path: Path) -> None:
    technique = noise(scheme="lat", p=1.0)
    trainer = noisy_trainer(small_corpus, tmp_path, technique)
    fc1 = trainer.model.encoder.layers[0].fc1
    stored = fc1.parametrizations.weight.original
    assert torch.equal(fc1.weight, quantized(stored, scheme="lat"))
    train(trainer, 2)
    importance = trainer.optimizer.state[stored]["exp_avg_sq"].sqrt() + 1e-8
    aware = decode(technique.quantizer.quantize(stored, importance))
    assert torch.equal(fc1.weight, aware)
    assert not torch.equal(fc1.weight, quantized(stored, scheme="lat"))
    trainer.save()
    resumed = noisy_trainer(small_corpus, tmp_path, noise(scheme="lat", p=1.0))
    resumed.resume()
    assert torch.equal(resumed.model.encoder.layers[0].fc1.weight, aware)
    assert differing(train(resumed, 2), train(trainer, 2)) == []
    technique.bake(trainer.model)


def test_lat_refuses_an_optimizer_without_all_second_moments(model: Tied) -> None:
    technique = noise(scheme="lat")
    technique.attach(model)
    with pytest.raises(ValueError, match=r"^scheme: lat needs Adam's second moments .* or scheme: ternary$"):
        technique.use_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    noise(scheme="ternary").use_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("scheme", ["int8", "ternary", "binary", "pq"])
def test_weights_of_another_type_are_refused_before_any_training(scheme: str) -> None:
    technique = PqNoise if scheme == "pq" else QuantNoise
    with pytest.raises(ValueError, match=r"^0\.weight: is torch\.bfloat16; keep weights in fp32"):
        technique(QuantNoiseConfig(scheme=scheme)).attach(nn.Sequential(nn.Linear(8, 8)).bfloat16())  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["int8", "ternary", "binary"])
def test_a_weight_without_elements_is_left_alone(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0))
    technique = QuantNoise(QuantNoiseConfig(scheme=scheme))  # type: ignore[arg-type]
    technique.attach(model)
    technique.bake(model)
    assert technique.pack("0.weight") is not None
    assert technique.pack("1.weight") is None
