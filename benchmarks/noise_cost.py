"""What quantization noise costs: an update's time and the peak of memory, against training without and with QAT.

    python benchmarks/noise_cost.py
    python benchmarks/noise_cost.py --scheme lat --embed 512 --ffn 2048 --layers 6 --vocab 32000 --tokens 4000

Every line is a process of its own, and the lines take turns (A B C A B C ...): medians of the turns, and of the ratios
to the line of QAT or of plain training in the same turn. On a CPU, time is the process's own CPU time, so that what
else runs there does not count. Batches are random sentences; the trainer is tenko's own. The limits are 15 % of an
update's time, and no memory over QAT.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tenko.compression import QuantNoise, QuantNoiseConfig
from tenko.nmt.batches import MicroBatches
from tenko.nmt.config import ModelConfig, TrainConfig
from tenko.nmt.fairseq_bridge import build_model, collate
from tenko.nmt.trainer import Trainer

LINES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "QAT": {"p": 1.0},
    "noise 0.5": {"p": 0.5},
    "noise 0.1, blocks of 8": {"p": 0.1, "block_size": 8},
    "QAT, 8-bit inputs": {"p": 1.0, "activations": True},
}


class RandomSentences:
    """A stream of one batch an update: sentences of 25 tokens, random words."""

    rank, world, micro_batches, batches_per_epoch = 0, 1, 1, 1000

    def __init__(self, vocabulary: int, tokens: int) -> None:
        self.vocabulary, self.tokens = vocabulary, tokens

    def update(self, number: int) -> MicroBatches:
        """The batch of an update: the same for the same number."""
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(4, self.vocabulary, (2, max(self.tokens // 25, 1), 25), generator=generator)
        words[:, :, -1] = 2
        sample = collate([(i, words[0, i].numpy(), words[1, i].numpy()) for i in range(words.shape[1])])
        return MicroBatches([sample], sample["ntokens"])

    def epoch(self, number: int) -> float:
        """No epochs."""
        return 0.0


def measure(line: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of an update, and the peak of memory in bytes, of this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "dict.txt"
        words.write_text("".join(f"w{i} 1\n" for i in range(options.vocab - 4)))
        config = ModelConfig(
            encoder_layers=options.layers,
            decoder_layers=options.layers,
            embed_dim=options.embed,
            ffn_dim=options.ffn,
            attention_heads=options.embed // 64 or 1,
        )
        torch.manual_seed(1)
        model = build_model(config, words).to(device)
        settings = LINES[line]
        techniques = [] if settings is None else [QuantNoise(QuantNoiseConfig(scheme=options.scheme, **settings), 1)]
        for technique in techniques:
            technique.attach(model)
        stream: Any = RandomSentences(options.vocab, options.tokens)
        train = TrainConfig(precision=options.precision)
        trainer = Trainer(model, stream, train, seed=1, checkpoints=Path(folder), techniques=techniques)
        clock = time.perf_counter if device == "cuda" else time.process_time
        seconds = []
        for _ in range(options.updates + 2):
            started = clock()
            trainer.update()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_of_process()
    return {"seconds": statistics.median(seconds[2:]), "bytes": peak}


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> int:
    """Let the lines take turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="int8", choices=["int8", "int4", "ternary", "lat", "binary"])
    parser.add_argument("--embed", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=2000, help="source tokens of a batch")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--updates", type=int, default=6, help="timed ones in a turn; two before them warm up")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--line", choices=LINES, help="measure this line alone, in this process")
    options = parser.parse_args()
    if options.line:
        print(json.dumps(measure(options.line, options)))
        return 0
    turns: list[dict[str, dict[str, float]]] = []
    for _ in range(options.turns):
        turns.append({})
        for line in LINES:
            command = [sys.executable, __file__, *sys.argv[1:], "--line", line]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            turns[-1][line] = json.loads(done.stdout)
    print(f"{options.scheme}, {options.embed}x{options.layers}, {options.tokens} tokens an update")
    print(f"{'':24}{'update, s':>12}{'to none':>10}{'peak, MB':>12}{'to QAT':>10}")
    for line in LINES:
        seconds = statistics.median(turn[line]["seconds"] for turn in turns)
        ratio = statistics.median(turn[line]["seconds"] / turn["none"]["seconds"] for turn in turns)
        peak = statistics.median(turn[line]["bytes"] for turn in turns)
        growth = statistics.median(turn[line]["bytes"] / turn["QAT"]["bytes"] for turn in turns)
        print(f"{line:24}{seconds:12.4f}{ratio:10.3f}{peak / 1e6:12.1f}{growth:10.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
