"""fairseq's own `fairseq-generate`, a contestant of `decoding.py`: its command line, data set and loop.

    python fairseq_generate.py write ARTEFACT SOURCES REFERENCES DATA_BIN   an artefact and text as fairseq reads them
    python fairseq_generate.py run TIMES.json DATA_BIN OPTION...            `fairseq-generate DATA_BIN OPTION...`

What is patched, and no more: `inference_step` notes its processor time, where fairseq's own stopwatch ("Translated ...
in 8.9s", around the same call) has the clock's, and is called once more before the first batch, to warm up. So loading,
collating, detokenizing and printing are not counted against it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def write(artefact: Path, sources: Path, references: Path, data_bin: Path) -> None:
    """What `tenko export --format fairseq` writes, and one split, `test`, as `fairseq-preprocess` would write it."""
    import numpy as np
    import torch
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    from tenko.compression import read_artefact
    from tenko.nmt.export import export_fairseq
    from tenko.nmt.fairseq_bridge import EOS
    from tenko.nmt.subwords import Subwords

    export_fairseq(artefact, data_bin)
    languages = read_artefact(artefact)[1]["direction"].split("-")
    subwords = Subwords(data_bin / "spm.model")
    for lang, text in zip(languages, (sources, references), strict=True):
        prefix = data_bin / f"test.{'-'.join(languages)}.{lang}"
        builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for line in text.read_text(encoding="utf-8").splitlines():
            builder.add_item(torch.tensor([*subwords.encode(line), EOS], dtype=torch.int32))
        builder.finalize(f"{prefix}.idx")


def run(times: Path, arguments: list[str]) -> None:
    """`fairseq-generate` with `arguments`; writes seconds and processor seconds of its search into `times`."""
    from fairseq.tasks.fairseq_task import FairseqTask
    from fairseq_cli.generate import cli_main  # type: ignore[import-untyped]

    spent = {"seconds": 0.0, "cpu_seconds": 0.0}
    real_step = FairseqTask.inference_step

    def inference_step(*args: Any, **kwargs: Any) -> Any:
        if not spent["seconds"]:
            real_step(*args, **kwargs)
        wall, cpu = time.perf_counter(), time.process_time()
        found = real_step(*args, **kwargs)
        spent["seconds"] += time.perf_counter() - wall
        spent["cpu_seconds"] += time.process_time() - cpu
        return found

    FairseqTask.inference_step = inference_step
    sys.argv = ["fairseq-generate", *arguments]
    cli_main()
    times.write_text(json.dumps(spent), encoding="utf-8")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "write":
        write(*map(Path, rest))
    else:
        run(Path(rest[0]), rest[1:])
