"""One rank of the tests of product quantization: `torchrun pq_worker.py CORPUS FOLDER`; fails if ranks disagree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import leave
from toy_training import snapshot, toy_model, toy_trainer

from tenko.compression.codebook_sizes import choose_centroids
from tenko.compression.config import IpqConfig, PqNoiseConfig, QuantNoiseConfig
from tenko.compression.ipq import Ipq
from tenko.compression.pq import quantize_shared, select_blocks
from tenko.compression.pq_noise import PqNoise
from tenko.nmt import distributed
from tenko.nmt.corpus import Corpus
from tenko.nmt.sensitivity import squared_gradients

IPQ = IpqConfig(centroids=16, iterations=5)
NOISE = QuantNoiseConfig(scheme="pq", p=0.3, pq=PqNoiseConfig(centroids=16, iterations=5, refit_interval=2))


def wrap(module: nn.Module) -> tuple[nn.Module, None]:
    if not dist.is_initialized():
        return module, None
    return DistributedDataParallel(module, bucket_cap_mb=0.01, gradient_as_bucket_view=True), None


def shared(corpus: Corpus) -> dict[str, torch.Tensor]:
    """k-means divided among the ranks."""
    items = select_blocks(toy_model(corpus), ("*",), (), IPQ)
    found = quantize_shared(items, iterations=IPQ.iterations, scheme="pq", seed=3)
    tensors = {}
    for item, (codes, codebook) in zip(items, found, strict=True):
        tensors |= {f"{item.weight.name}/codes": codes, f"{item.weight.name}/codebook": codebook}
    return tensors


def ipq(corpus: Corpus, folder: Path) -> dict[str, torch.Tensor]:
    """Two groups, with two updates after each."""
    model, technique = toy_model(corpus), Ipq(IPQ, seed=3)
    technique.attach(model)
    for group in ("ffn", "embedding"):
        technique.quantize_group(group)
        trained = train(corpus, folder, model, technique)
    return trained


def noise(corpus: Corpus, folder: Path) -> dict[str, torch.Tensor]:
    """Four updates, with two codebooks."""
    model, technique = toy_model(corpus), PqNoise(NOISE, seed=3)
    technique.attach(model)
    trained = train(corpus, folder, model, technique, updates=4)
    return trained | {f"{name}/codebook": codebook for name, codebook in technique.state_dict().items()}


def train(corpus: Corpus, folder: Path, model: nn.Module, technique: Any, updates: int = 2) -> dict[str, torch.Tensor]:
    world, rank = distributed.world_size(), distributed.rank()
    # One process accumulates what two ranks see.
    settings = {"update_freq": 2 // world, "max_update": updates}
    trainer = toy_trainer(
        corpus, folder, rank=rank, world=world, wrap=wrap, model=model, techniques=[technique], **settings
    )
    for _ in range(updates):
        trainer.update()
    return snapshot(trainer)


def chosen(corpus: Corpus) -> dict[str, torch.Tensor]:
    """Centroids of each weight, where all weights are minded alike."""
    items = select_blocks(toy_model(corpus), ("*",), (), IPQ)
    alike = {item.weight.name: torch.ones_like(item.weight.tensor) for item in items}
    found = choose_centroids(items, alike, 3.5, scheme="pq", seed=3)
    return {name: torch.tensor(count) for name, count in found.items()}


def all_of(corpus: Corpus, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "shared": shared(corpus),
        "chosen": chosen(corpus),
        "gradients": squared_gradients(toy_model(corpus), corpus, "en-cs", seed=2, batches=4),
        "ipq": ipq(corpus, folder),
        "noise": noise(corpus, folder),
    }


def main() -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    folder = Path(sys.argv[2])
    found = all_of(Corpus.open(Path(sys.argv[1])), folder)
    for scenario, tensors in found.items():
        distributed.assert_ranks_agree((tensors[key].float() for key in sorted(tensors)), scenario)
        if dist.get_rank() == 0:
            print(f"holds: {scenario}", flush=True)
    if dist.get_rank() == 0:
        torch.save(found, folder / "two.pt")
    dist.barrier()
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
