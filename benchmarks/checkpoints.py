"""How long training stands still for a checkpoint, and how long a restore takes.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --json docs/results/checkpoints.json

One process, one thread of torch, a small model and Transformer-base (60M parameters, 725 MB with Adam's state), random
sentences. Each model trains in one run; in turns of `--between` updates it saves in the background, as the trainer
does, and at once, as a plain loop would: write, hash, fsync, go on. Medians of the turns, ratios turn by turn.

- stands still: the time of the call that copies; the thread writes afterwards.
- slower: what the updates under the writing thread took longer than the turn's others, as it takes cores from them.
- restore: a new trainer finds the newest checkpoint, verifies, reads and loads it; the file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from noise_cost import RandomSentences

from tenko.nmt import checkpoint, trainer_state
from tenko.nmt.config import ModelConfig, TrainConfig
from tenko.nmt.fairseq_bridge import build_model
from tenko.nmt.trainer import Trainer

MODELS: dict[str, dict[str, Any]] = {
    "small": {"layers": 3, "embed": 192, "ffn": 768, "heads": 4, "vocab": 4000, "tokens": 1000},
    "Transformer-base": {"layers": 6, "embed": 512, "ffn": 2048, "heads": 8, "vocab": 32000, "tokens": 500},
}


def trainer_of(sizes: dict[str, Any], words: Path, checkpoints: Path) -> Trainer:
    """A trainer with fresh weights."""
    config = ModelConfig(
        encoder_layers=sizes["layers"],
        decoder_layers=sizes["layers"],
        embed_dim=sizes["embed"],
        ffn_dim=sizes["ffn"],
        attention_heads=sizes["heads"],
    )
    torch.manual_seed(1)
    model = build_model(config, words).to("cuda" if torch.cuda.is_available() else "cpu")
    stream: Any = RandomSentences(sizes["vocab"], sizes["tokens"])
    settings = TrainConfig(precision="fp32", keep_last=1)
    return Trainer(model, stream, settings, seed=1, checkpoints=checkpoints)


def timed_update(trainer: Trainer) -> float:
    """Seconds of an update, the device's work included."""
    started = time.perf_counter()
    trainer.update()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(sizes: dict[str, Any], folder: Path, turns: int, between: int) -> dict[str, Any]:
    """One model's figures, in seconds."""
    words = folder / "dict.txt"
    words.write_text("".join(f"w{i} 1\n" for i in range(sizes["vocab"] - 4)))
    trainer = trainer_of(sizes, words, folder / "checkpoints")
    saver = trainer._begin_saves()
    for _ in range(3):  # allocates; so does the first save
        trainer.update()
    trainer.save()
    rows: list[dict[str, float]] = []
    for _ in range(turns):
        alone = [timed_update(trainer) for _ in range(between)]
        started = time.perf_counter()
        trainer._save()
        still = time.perf_counter() - started
        under = []
        while saver.busy or not under:
            under.append(timed_update(trainer))
        written = time.perf_counter() - started
        saver.finish()
        started = time.perf_counter()
        checkpoint.save(
            folder / "at-once",
            model_state=trainer.parameters,
            state=trainer_state.shared_state(trainer),
            rank_state=trainer_state.rank_state(trainer),
        )
        at_once = time.perf_counter() - started
        update = statistics.median(alone)
        slower = sum(under) - update * len(under)
        rows.append({"update": update, "still": still, "slower": slower, "written": written, "at_once": at_once})
    trainer.save()
    restores = []
    for _ in range(turns):
        fresh = trainer_of(sizes, words, folder / "checkpoints")
        started = time.perf_counter()
        assert fresh.resume()
        if fresh.device.type == "cuda":
            torch.cuda.synchronize()
        restores.append(time.perf_counter() - started)
        assert fresh.updates == trainer.updates
        assert all(torch.equal(p, trainer.parameters[n]) for n, p in fresh.parameters.items())
        del fresh
    newest = checkpoint.path_of(trainer.checkpoints, trainer.updates)
    return {
        "parameters": sum(p.numel() for p in trainer.parameters.values()),
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        **{key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "still_in_updates": statistics.median(row["still"] / row["update"] for row in rows),
        "still_to_at_once": statistics.median(row["still"] / row["at_once"] for row in rows),
        "slower_in_updates": statistics.median(row["slower"] / row["update"] for row in rows),
        "restore": statistics.median(restores),
    }


def main() -> int:
    """Measure both models, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--between", type=int, default=5, help="updates that are timed before a save")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: the temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name in options.model or MODELS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[name] = measure(MODELS[name], Path(folder), options.turns, options.between)
    print("| model | checkpoint, MB | update, s | stands still, s | in updates | written after, s | slower by, updates "
          "| at once, s | stands still to that | restore, s |")  # fmt: skip
    print("|" + "---|" * 10)
    for name, row in found.items():
        print(
            f"| {name}, {row['parameters'] / 1e6:.1f}M | {row['bytes'] / 1e6:.0f} | {row['update']:.3f} "
            f"| {row['still']:.3f} | {row['still_in_updates']:.2f} | {row['written']:.2f} "
            f"| {row['slower_in_updates']:.2f} | {row['at_once']:.2f} | {row['still_to_at_once']:.3f} "
            f"| {row['restore']:.2f} |"
        )
    if options.json:
        load = os.getloadavg()[0]
        options.json.write_text(json.dumps({"cores": os.cpu_count(), "load": load, "models": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
