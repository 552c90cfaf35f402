"""fp16 and bf16 are truly computed in, on a CPU too; `auto` goes by what the processor has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_training import toy_model

from tenko.nmt import precision
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import ModelWithLoss, collate

CPU = torch.device("cpu")


def cpu_flags() -> set[str]:
    with open("/proc/cpuinfo") as file:
        return {flag for line in file if line.startswith("flags") for flag in line.split()}


def test_auto_is_bf16_exactly_where_the_processor_multiplies_it() -> None:
    native = bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "amx_tile"})
    assert precision.resolve("auto", CPU) == ("bf16" if native else "fp32")


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx", [True, False])
def test_either_instruction_set_is_enough(monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    assert precision.resolve("auto", CPU) == ("bf16" if amx or avx else "fp32")


def test_auto_is_fp32_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert precision.resolve("auto", CPU) == "fp32"


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_what_is_asked_for_is_what_layers_compute_in(small_corpus: Corpus, name: str) -> None:
    assert precision.resolve(name, CPU) == name
    model = toy_model(small_corpus)
    seen: dict[str, torch.dtype] = {}
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, out, layer=layer: seen.__setitem__(layer, out.dtype))
    train = small_corpus.split("train")
    sample = collate([(i, train.tokens("en", i), train.tokens("cs", i)) for i in range(4)])
    with precision.autocast(name, CPU):
        loss, nll = ModelWithLoss(model, 0.1)(sample)
    loss.backward()
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert seen
    assert set(seen.values()) == {wanted}
    assert loss.dtype == nll.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_only_fp16_scales_the_loss() -> None:
    scalers = {
        name: precision.loss_scaler(name, CPU, init_scale=64, scale_window=5) for name in ("fp32", "bf16", "fp16")
    }
    assert {name: scaler.is_enabled() for name, scaler in scalers.items()} == {
        "fp32": False,
        "bf16": False,
        "fp16": True,
    }
    one = torch.ones((), requires_grad=True)
    assert scalers["fp16"].scale(one).item() == 64
    assert scalers["bf16"].scale(one).item() == 1
    assert scalers["fp16"].get_growth_interval() == 5
    assert scalers["fp16"].get_growth_factor() == 2
    assert scalers["fp16"].get_backoff_factor() == 0.5
