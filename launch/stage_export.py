"""The stage `export`: the model of the stage before for another program, read back from what was written, and measured.

The stage's `artefact/` is what `tenko export` would write: a CTranslate2 model, which the other commands then translate
with, or a fairseq checkpoint with its dictionaries.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from tenko.nmt import distributed, engines
from tenko.nmt.engines import Engine

from .rundir import ARTEFACT, StageContext
from .stage_kinds import ExportConfig
from .stage_results import measure
from .stage_tools import open_corpus, read_model, start


def run_export(context: StageContext) -> None:
    """Write the model for CTranslate2 or fairseq; rank 0 works."""
    config = context.stage.config
    assert isinstance(config, ExportConfig)
    assert context.previous is not None, "the recipe checks that export follows a stage"
    started = time.monotonic()
    start(context)
    corpus = open_corpus(context)
    if distributed.rank() == 0:
        source = context.previous / ARTEFACT
        context.reporter.log(f"{context.stage.name}: {config.format} from {context.previous}")
        shutil.rmtree(context.artefact, ignore_errors=True)
        if config.format == "ctranslate2":
            engine, model = _ctranslate2(source, context.artefact, config.quantization)
        else:
            engine, model = _fairseq(source, context.artefact)
        measure(
            context,
            corpus,
            started=started,
            engine=engine,
            engine_name=config.format,
            artefact_bytes=model.stat().st_size,
        )
    distributed.barrier()


def _ctranslate2(source: Path, out: Path, quantization: str) -> tuple[Engine, Path]:
    from tenko.nmt.ctranslate2_model import export_ctranslate2

    export_ctranslate2(source, out, quantization=quantization)
    return engines.load(out, engine="ctranslate2", threads=torch.get_num_threads()), out / "model.bin"


def _fairseq(source: Path, out: Path) -> tuple[Engine, Path]:
    """The weights are those of the checkpoint as read back."""
    from tenko.nmt.export import export_fairseq
    from tenko.nmt.translate import Translator

    file = export_fairseq(source, out)
    model, _ = read_model(source)
    model.load_state_dict(torch.load(file, weights_only=True)["model"], strict=True)
    translator = Translator.load(source)
    translator.model = model.eval()
    return translator, file
