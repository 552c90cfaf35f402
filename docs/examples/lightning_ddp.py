"""3-bit gradients under PyTorch Lightning: a small model of the next byte, on the sentences that ship with tenko.

torchrun --nproc-per-node 2 docs/examples/lightning_ddp.py
"""

import hashlib
import os

import pytorch_lightning as pl  # with the package `lightning`: import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tenko.comm import QuantizedAllReduce, register
from tenko.nmt.text_io import read_pairs, source_files

CONTEXT = 16


class ThinGradients(pl.Callback):
    """Puts a route on the DDP model, which exists from here on, and ends it with the fit."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.route = register(trainer.strategy.model, QuantizedAllReduce(bits=3))  # the one line

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.route.close()


class Bytes(pl.LightningModule):
    """The byte after CONTEXT bytes."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, 256)]
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, target = batch
        loss = nn.functional.cross_entropy(self.layers(inputs), target)
        if self.trainer.is_global_zero and (index % 50 == 0 or index == self.trainer.num_training_batches - 1):
            print(f"update {index + 1}: loss {loss.item():.3f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def windows(count: int) -> TensorDataset:
    """Contexts [count, CONTEXT] of English sentences, and the byte after each [count]."""
    text = "\n".join(english for english, _ in read_pairs(source_files("embedded", "text")))
    line = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    starts = torch.randint(len(line) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(1))
    taken = line[starts + torch.arange(CONTEXT + 1)]
    return TensorDataset(taken[:, :-1], taken[:, -1])


def main() -> None:
    pl.seed_everything(1)
    thin = ThinGradients()
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy="ddp",
        max_epochs=1,
        callbacks=[thin],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Bytes()
    trainer.fit(model, DataLoader(windows(200 * 64 * trainer.world_size), batch_size=64, shuffle=True))

    weights = torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])
    digest = hashlib.sha256(weights.numpy().data).hexdigest()
    meter = thin.route.meter
    print(
        f"rank {trainer.global_rank}: sent {meter.bytes_sent:,} bytes, fp32 {meter.fp32_bytes:,.0f} "
        f"({meter.ratio:.1f}x); weights {digest[:16]}",
        flush=True,
    )


if __name__ == "__main__":
    main()
