"""On one GPU: product quantization reads, trains, bakes and packs what it does on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tenko.compression import (
    Ipq,
    IpqConfig,
    PostTrainingPq,
    PqConfig,
    PqNoise,
    PqNoiseConfig,
    QuantizeConfig,
    QuantNoiseConfig,
    Technique,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Net(nn.Module):
    """Two layers with names of a Transformer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.fc2(functional.relu(self.fc1(x))))


def technique(kind: str, scheme: Any) -> Any:
    sizes: dict[str, Any] = {"blocks": {"ffn": 4}, "centroids": 32, "iterations": 5}
    if kind == "ipq":
        return Ipq(IpqConfig(scheme=scheme, **sizes))
    if kind == "post-training":
        return PostTrainingPq(QuantizeConfig(scheme=scheme, pq=PqConfig(**sizes)))
    p = 1.0 if kind == "qat" else 0.3
    return PqNoise(QuantNoiseConfig(scheme=scheme, p=p, pq=PqNoiseConfig(**sizes, refit_interval=2)))


def trained(device: str, kind: str, scheme: str) -> tuple[nn.Module, Technique, list[float]]:
    """Three updates, two of which fit codebooks, then baked."""
    model = Net().to(device).train()
    made = technique(kind, scheme)
    made.attach(model)
    if kind == "ipq":
        made.quantize_group("ffn")
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for update in range(3):
        made.before_update(update)
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        made.after_update(update)
        losses.append(loss.item())
    model.eval()
    losses.append((model(x) - x).square().mean().item())
    state = made.state_dict()
    made.load_state_dict(state)
    made.bake(model)
    return model, made, losses


@pytest.mark.parametrize("scheme", ["pq", "pq_int8"])
@pytest.mark.parametrize("kind", ["post-training", "qat", "noise", "ipq"])
def test_gpu_and_cpu_agree(kind: str, scheme: str) -> None:
    on_cpu, _, losses_cpu = trained("cpu", kind, scheme)
    on_gpu, made, losses = trained("cuda", kind, scheme)
    if kind != "noise":  # each device draws its own masks
        assert losses == pytest.approx(losses_cpu, rel=0.05)
    assert losses[2] < losses[0]
    for name, value in on_gpu.named_parameters():
        assert value.is_cuda
        assert bool(torch.isfinite(value).all()), name
        packed = made.pack(name)
        assert (packed is not None) == (value.dim() == 2 and kind != "noise"), name
        if kind == "post-training":
            same = (value.cpu() == on_cpu.get_parameter(name)).float().mean()
            assert same > 0.99, name
