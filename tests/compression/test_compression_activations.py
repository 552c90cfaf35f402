"""8-bit inputs: rounded as they should be, ranges that follow the training and agree over ranks, and come back."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_training import differing, snapshot, toy_model, toy_trainer

from tenko.compression import QuantizeConfig, QuantNoise, QuantNoiseConfig, activation_ranges, attach_activations
from tenko.compression.activations import InputRanges, fake_quantize
from tenko.nmt.corpus import Corpus
from tenko.nmt.trainer import Trainer

LINEARS = [
    *[f"encoder.layers.0.self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")],
    *[f"encoder.layers.0.{name}" for name in ("fc1", "fc2")],
    *[f"decoder.layers.0.self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")],
    *[f"decoder.layers.0.encoder_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")],
    *[f"decoder.layers.0.{name}" for name in ("fc1", "fc2")],
    "decoder.output_projection",
]


def q8(**settings: Any) -> QuantNoise:
    return QuantNoise(QuantNoiseConfig(p=1.0, activations=True, **settings), seed=1)


def test_inputs_are_rounded_and_clipped_as_torch_does() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 3
    x.requires_grad_()
    found = fake_quantize(x, torch.tensor(2.5))
    wanted = torch.fake_quantize_per_tensor_affine(x, 2.5 / 127, 0, -127, 127)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert found.unique().numel() == 255
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, (x.abs() <= 2.5).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_codes(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = fake_quantize(x, torch.tensor(2.5))
    assert found.dtype == dtype
    assert torch.equal(found, fake_quantize(x.float(), torch.tensor(2.5)).to(dtype))


def test_zeros_and_nan_pass() -> None:
    assert fake_quantize(torch.zeros(3), torch.tensor(0.0)).tolist() == [0.0, 0.0, 0.0]
    found = fake_quantize(torch.tensor([math.nan, 1.0, math.inf]), torch.tensor(2.0))
    assert found.isnan().tolist() == [True, False, False]


def observed(decay: float, *updates: list[float]) -> InputRanges:
    """Ranges of one layer after updates whose micro-batches had these largest magnitudes."""
    layer = nn.Linear(2, 2)
    ranges = InputRanges(decay)
    ranges.attach(layer, {"layer": layer})
    for largest in updates:
        for value in largest:
            layer(torch.tensor([[value, -value / 2]]))
        ranges.update()
    return ranges


def test_the_average_takes_the_largest_of_an_updates_micro_batches_and_is_debiased() -> None:
    assert observed(0.9, [3.0]).ranges() == pytest.approx({"layer": 3.0})
    assert observed(0.9, [1.0, 4.0, 2.0]).ranges() == pytest.approx({"layer": 4.0})
    wanted = (0.9 * 0.1 * 2.0 + 0.1 * 5.0) / (1 - 0.9**2)
    assert observed(0.9, [2.0], [5.0]).ranges() == pytest.approx({"layer": wanted})
    many = observed(0.9999, *[[1.0 + update % 2] for update in range(200)])
    assert many.ranges() == pytest.approx({"layer": 1.5}, rel=1e-3)


def test_an_update_that_overflowed_or_skipped_the_layer_says_nothing() -> None:
    assert observed(0.9, [2.0], [math.inf], [math.nan], []).ranges() == pytest.approx({"layer": 2.0})
    assert observed(0.9, [], []).ranges() == {}


def test_evaluation_moves_no_range_and_uses_it() -> None:
    layer = nn.Linear(2, 2, bias=False)
    ranges = InputRanges(0.9)
    ranges.attach(layer, {"layer": layer})
    layer(torch.tensor([[2.0, 1.0]]))
    ranges.update()
    layer.eval()
    x = torch.tensor([[100.0, 0.51]])
    wanted = nn.functional.linear(fake_quantize(x, torch.tensor(2.0)), layer.weight)
    assert torch.equal(layer(x), wanted)
    ranges.update()
    assert ranges.ranges() == pytest.approx({"layer": 2.0})
    ranges.detach()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def batch(corpus: Corpus) -> dict[str, Tensor]:
    return toy_trainer(corpus, Path("unused")).stream.update(1).samples[0]["net_input"]


def test_every_linear_layer_of_a_fairseq_transformer_is_reached(small_corpus: Corpus) -> None:
    model = toy_model(small_corpus)
    technique = q8()
    technique.attach(model)
    technique.before_update(0)
    model(**batch(small_corpus))
    technique.after_update(0)
    assert sorted(activation_ranges(technique)) == sorted(LINEARS)
    only = q8(include=("*fc1.weight", "*embed_tokens.weight"))
    other = toy_model(small_corpus)
    only.attach(other)
    other(**batch(small_corpus))
    only.after_update(0)
    wanted = {"encoder.layers.0.fc1", "decoder.layers.0.fc1", "decoder.output_projection"}
    assert set(activation_ranges(only)) == wanted


def test_a_model_read_back_translates_as_the_trained_one(small_corpus: Corpus) -> None:
    model = toy_model(small_corpus)
    technique = q8()
    technique.attach(model)
    for update in range(2):
        technique.before_update(update)
        model.train()(**batch(small_corpus))
        technique.after_update(update)
    inputs = batch(small_corpus)
    trained = model.eval()(**inputs)[0]
    ranges = activation_ranges(technique)
    technique.bake(model)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert not any(getattr(module, "skip_embed_dim_check", False) for module in model.modules())
    weights_alone = model(**inputs)[0]
    assert not torch.allclose(weights_alone, trained, atol=1e-4)
    assert activation_ranges(technique) == ranges
    again = toy_model(small_corpus, seed=2).eval()
    again.load_state_dict(model.state_dict())
    attach_activations(again, ranges)
    torch.testing.assert_close(again(**inputs)[0], trained, rtol=0, atol=1e-6)


def test_ranges_that_fit_no_model_are_refused(small_corpus: Corpus) -> None:
    model = toy_model(small_corpus)
    with pytest.raises(ValueError, match=r"^activations: 'encoder.fc9' is no linear layer of the model; valid are enc"):
        attach_activations(model, {"encoder.layers.0.fc1": 1.0, "encoder.fc9": 1.0})
    # The last three are no fp32 numbers, or their scale is none.
    for bad in (0.0, -1.0, math.inf, math.nan, "1", True, None, 10**400, 1e300, 1e-37):
        with pytest.raises(
            ValueError, match=r"^activations: the range of encoder.layers.0.fc1 must be a positive fp32"
        ):
            attach_activations(model, {"encoder.layers.0.fc1": bad})  # type: ignore[dict-item]
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_activations_without_a_linear_layer_are_refused() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4)})
    with pytest.raises(ValueError, match=r"^activations: none of the matched weights is a linear layer's"):
        q8().attach(model)
    assert not any("parametrizations" in name for name in model.state_dict())
    assert activation_ranges(QuantNoise(QuantizeConfig())) == {}


def q8_trainer(corpus: Corpus, folder: Path, technique: QuantNoise, **settings: Any) -> Trainer:
    model = toy_model(corpus)
    technique.attach(model)
    return toy_trainer(corpus, folder, model=model, techniques=[technique], **settings)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_goes_on_with_its_ranges(small_corpus: Corpus, tmp_path: Path, precision: str) -> None:
    whole, cut, resumed = q8(), q8(), q8()
    uncut = q8_trainer(small_corpus, tmp_path / "whole", whole, precision=precision)
    for _ in range(4):
        uncut.update()
    first = q8_trainer(small_corpus, tmp_path / "cut", cut, precision=precision)
    for _ in range(2):
        first.update()
    first.save()
    second = q8_trainer(small_corpus, tmp_path / "cut", resumed, precision=precision)
    second.resume()
    assert activation_ranges(resumed) == activation_ranges(cut) != {}
    for _ in range(2):
        second.update()
    assert activation_ranges(resumed) == activation_ranges(whole)
    assert differing(snapshot(second), snapshot(uncut)) == []


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from tenko.compression.activations import InputRanges

dist.init_process_group("gloo")
rank = dist.get_rank()
assert dist.get_world_size() == 2
layer = nn.Linear(2, 2)
ranges = InputRanges(0.9)
ranges.attach(layer, {"layer": layer})
for update in range(3):
    layer(torch.full((1, 2), 1.0 + update + 10.0 * (rank == update % 2)))
    ranges.update()
found = [None, None]
dist.all_gather_object(found, ranges.ranges())
assert found[0] == found[1], found
if rank == 0:
    print(found[0]["layer"])
dist.destroy_process_group()
"""


@pytest.mark.torchrun
def test_ranks_agree_on_the_largest_of_all_inputs(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) == pytest.approx(observed(0.9, [11.0], [12.0], [13.0]).ranges()["layer"])
