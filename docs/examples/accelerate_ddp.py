"""3-bit gradients under HuggingFace accelerate: a small model of the next byte, on the sentences that ship with tenko.

torchrun --nproc-per-node 2 docs/examples/accelerate_ddp.py
accelerate launch --cpu --num_processes 2 docs/examples/accelerate_ddp.py
"""

import hashlib

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tenko.comm import QuantizedAllReduce, register
from tenko.nmt.text_io import read_pairs, source_files

CONTEXT = 16


def windows(count: int) -> TensorDataset:
    """Contexts [count, CONTEXT] of English sentences, and the byte after each [count]."""
    text = "\n".join(english for english, _ in read_pairs(source_files("embedded", "text")))
    line = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    starts = torch.randint(len(line) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(1))
    taken = line[starts + torch.arange(CONTEXT + 1)]
    return TensorDataset(taken[:, :-1], taken[:, -1])


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    torch.manual_seed(1)
    layers = [nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, 256)]
    model: nn.Module = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(windows(400 * 64 * accelerator.num_processes), batch_size=64, shuffle=True)

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    route = register(model, QuantizedAllReduce(bits=3))  # the one line: after prepare, which makes the DDP model

    for step, (inputs, target) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), target)
            accelerator.backward(loss)
            if accelerator.sync_gradients:  # the gradient is whole, and the same on all ranks
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == len(loader) - 1:
            accelerator.print(f"update {step // 2 + 1}: loss {loss.item():.3f}")

    weights = torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])
    digest = hashlib.sha256(weights.numpy().data).hexdigest()
    meter = route.meter
    print(
        f"rank {accelerator.process_index}: sent {meter.bytes_sent:,} bytes, fp32 {meter.fp32_bytes:,.0f} "
        f"({meter.ratio:.1f}x); weights {digest[:16]}",
        flush=True,
    )
    route.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
