"""Real fairseq under the gate of `training.py`: its own command line, Trainer and loop, imported here only.

    python fairseq_peer.py convert CORPUS DATA_BIN               tenko's shards as fairseq's memory-mapped data set
    python fairseq_peer.py train BATCHES.npz DATA_BIN OPTION...  `fairseq-train DATA_BIN OPTION...`, commands on stdin

What is patched, and no more:

- `Trainer.train_step` waits at the gate first. Target tokens are counted around it; it is otherwise fairseq's.
- The training set's `batch_by_size` returns the batches of BATCHES.npz: the sentences that tenko trains on, in the same
  order (with `--curriculum 1`, which leaves the first epoch unshuffled). Reading and collating stay fairseq's.
- `DistributedDataParallel` is called without `device_ids`: fairseq passes a GPU's number for modules on a CPU, too.

Two ranks need no other patch, but the options `--distributed-world-size`, `-rank`, `-init-method`, `-backend gloo` and
`--distributed-no-spawn`; what it would find out by itself counts GPUs. `training.py` asserts that torch's world size is
2 and that both ranks end with the same weights.

Two options are not fairseq's defaults, so that collating is part of the loop and of its one thread, as in tenko:
`--num-workers 0` (1: a process of its own) and `--data-buffer-size 0` (10: a thread that would work while it is
another's turn).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import fairseq.models.distributed_fairseq_model as wrapping
import numpy as np
import torch
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main  # type: ignore[import-untyped]
from gate import Gate, facts

from tenko.nmt.corpus import Corpus


def convert(corpus_path: Path, data_bin: Path) -> None:
    """Write the training split and the dictionaries as `fairseq-preprocess` would."""
    corpus = Corpus.open(corpus_path)
    shards = corpus.split("train")
    data_bin.mkdir(parents=True)
    for lang in ("en", "cs"):
        (data_bin / f"dict.{lang}.txt").write_bytes(corpus.dict_path.read_bytes())
        prefix = data_bin / f"train.en-cs.{lang}"
        builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for index in range(len(shards)):
            builder.add_item(torch.from_numpy(shards.tokens(lang, index)))
        builder.finalize(f"{prefix}.idx")


def train(batches_path: Path, arguments: list[str]) -> None:
    """`fairseq-train` with its loop under a gate; ends the process."""
    trainer: Trainer | None = None

    def at_end() -> dict[str, Any]:
        assert trainer is not None
        return facts(trainer.model)

    gate = Gate({}, at_end)
    real_step, real_load, real_ddp = Trainer.train_step, TranslationTask.load_dataset, wrapping.DistributedDataParallel

    def train_step(self: Trainer, samples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        nonlocal trainer
        trainer = self
        gate.pass_through()
        tokens = sum(sample["ntokens"] for sample in samples)
        figures = real_step(self, samples, *args, **kwargs)
        gate.tokens += tokens
        gate.loss += figures["loss"] * math.log(2) * tokens  # in bits a token, of all ranks
        return figures

    def load_dataset(self: TranslationTask, split: str, *args: Any, **kwargs: Any) -> None:
        real_load(self, split, *args, **kwargs)
        file = np.load(batches_path)
        batches = np.split(file["sentences"], file["starts"][1:-1])
        self.datasets[split].batch_by_size = lambda *a, **k: batches

    def ddp(*args: Any, device_ids: Any, output_device: Any, **kwargs: Any) -> torch.nn.Module:
        return real_ddp(*args, **kwargs)

    Trainer.train_step, TranslationTask.load_dataset, wrapping.DistributedDataParallel = train_step, load_dataset, ddp
    sys.argv = ["fairseq-train", *arguments]
    cli_main()


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        train(Path(sys.argv[2]), sys.argv[3:])
