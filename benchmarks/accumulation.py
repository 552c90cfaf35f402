"""What accumulating costs: an update of four micro-batches against one of the same sentences in one batch.

    python benchmarks/accumulation.py [--rounds 8] [--json FILE]
    python benchmarks/accumulation.py --embed 16 --vocab 200 --tokens 100 --rounds 20 --updates 10    # the loop alone

Smaller matrices cost by themselves, whoever runs them. So the trainer's ratio stands beside that of a bare loop (the
same model, sentences, cuts and optimizer; forward, backward, step), and the loop's own overhead is the one over the
other. All four take turns in one process of one thread (A B C D D C B A ...): medians of the rounds, ratios round by
round. On a CPU time is the process's own CPU time, so that what else runs there does not count. The limit is 2 %.
The second command's model is tiny: it shows the milliseconds that the loop itself takes for each micro-batch, which in
the first drown in the noise of a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from noise_cost import RandomSentences

from tenko.nmt.batches import MicroBatches, to_device
from tenko.nmt.config import ModelConfig, TrainConfig
from tenko.nmt.fairseq_bridge import ModelWithLoss, build_model, collate
from tenko.nmt.trainer import Trainer

CUTS = (1, 4)
ORDER = ("trainer x4", "trainer x1", "bare loop x4", "bare loop x1")


class CutSentences(RandomSentences):
    """The same sentences in `cuts` batches."""

    def __init__(self, vocabulary: int, tokens: int, cuts: int) -> None:
        super().__init__(vocabulary, tokens)
        self.micro_batches = cuts

    def update(self, number: int) -> MicroBatches:
        """The batches of an update: the same sentences for the same number, whatever the cuts."""
        (whole,), tokens = (work := super().update(number)).samples, work.target_tokens
        pairs = list(zip(whole["net_input"]["src_tokens"].numpy(), whole["target"].numpy(), strict=True))
        size = -(-len(pairs) // self.micro_batches)
        samples = [
            collate([(i, source, target) for i, (source, target) in enumerate(pairs[at : at + size])])
            for at in range(0, len(pairs), size)
        ]
        return MicroBatches(samples, tokens)


def bare_loop(model: torch.nn.Module, stream: CutSentences, config: TrainConfig) -> Callable[[], None]:
    """What a textbook does with the same batches; one call an update."""
    with_loss = ModelWithLoss(model, config.label_smoothing).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.adam_betas, fused=True)
    device, number = next(model.parameters()).device, 0

    def update() -> None:
        nonlocal number
        number += 1
        work = stream.update(number)
        for sample in work.samples:
            (with_loss(to_device(sample, device))[0] / work.target_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def contestants(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], None]]:
    """Updates by name, each of a model of its own."""
    words = folder / "dict.txt"
    words.write_text("".join(f"w{i} 1\n" for i in range(options.vocab - 4)))
    config = ModelConfig(encoder_layers=3, decoder_layers=3, embed_dim=options.embed, ffn_dim=4 * options.embed,
                         attention_heads=4)  # fmt: skip
    train = TrainConfig(precision="fp32")
    found: dict[str, Callable[[], None]] = {}
    for name in ("trainer", "bare loop"):
        for cuts in CUTS:
            torch.manual_seed(1)
            model = build_model(config, words).to("cuda" if torch.cuda.is_available() else "cpu")
            stream: Any = CutSentences(options.vocab, options.tokens, cuts)
            if name == "trainer":
                found[f"{name} x{cuts}"] = Trainer(model, stream, train, seed=1, checkpoints=folder).update
            else:
                found[f"{name} x{cuts}"] = bare_loop(model, stream, train)
    return found


def measure(updates: dict[str, Callable[[], None]], rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of an update in each round, by name."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for update in updates.values():
        for _ in range(2):
            update()
    for number in range(rounds):
        for name in list(updates) if number % 2 == 0 else list(updates)[::-1]:
            if cuda:
                torch.cuda.synchronize()
            started = clock()
            for _ in range(count):
                updates[name]()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append((clock() - started) / count)
    return seconds


def main() -> int:
    """Let the four take turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--updates", type=int, default=2, help="of each in a round")
    parser.add_argument("--tokens", type=int, default=4000, help="target tokens of an update")
    parser.add_argument("--embed", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(contestants(options, Path(folder)), options.rounds, options.updates)

    def ratio(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]

    ours, theirs = ratio("trainer x4", "trainer x1"), ratio("bare loop x4", "bare loop x1")
    own = [a / b for a, b in zip(ours, theirs, strict=True)]
    print("| | x1, s | x4, s | x4 / x1 |")
    print("|---|---|---|---|")
    for name, ratios in (("trainer", ours), ("bare loop", theirs)):
        one, four = (statistics.median(seconds[f"{name} x{cuts}"]) for cuts in CUTS)
        print(f"| {name} | {one:.3f} | {four:.3f} | {statistics.median(ratios):.3f} |")
    extra = [(a - b - c + d) / 3 for a, b, c, d in zip(*(seconds[name] for name in ORDER), strict=True)]
    spread = f"single rounds {100 * (min(own) - 1):+.1f} to {100 * (max(own) - 1):+.1f} %"
    print(f"\nthe loop's own overhead: {100 * (statistics.median(own) - 1):+.1f} % ({spread})")
    print(f"for each micro-batch more: {1000 * statistics.median(extra):.2f} ms over the bare loop")
    if options.json:
        figures = {"seconds": seconds, "x4_to_x1": ours, "bare_x4_to_x1": theirs, "own": own}
        options.json.write_text(json.dumps({"tokens": options.tokens, **figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
