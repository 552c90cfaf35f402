"""An artefact as a fairseq checkpoint: one file that real `fairseq-generate` and CTranslate2's converter both take.

Both load with `weights_only`, so the file holds plain containers only. fairseq reads `cfg` as a mapping (OmegaConf);
CTranslate2 takes `cfg["model"]` and sets and reads attributes on it, as on an argparse namespace. An OrderedDict whose
instance `__dict__` repeats its items is both, and the one mapping whose `__dict__` the restricted unpickler restores.

Give fairseq-generate `--required-batch-size-multiple 1`: with its default of 8 its batching silently drops up to 7 of
the longest sentences.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenko.compression.packed import artefact_file, read_artefact

from .config import DIRECTIONS, ModelConfig
from .subwords import Subwords

DICTIONARY, SUBWORDS = "dict.txt", "spm.model"


def export_fairseq(artefact_dir: Path, out_dir: Path) -> Path:
    """Write `model.pt`, `dict.en.txt`, `dict.cs.txt` and `spm.model` into `out_dir`; return the path of `model.pt`.

    Packed tensors are decoded: the checkpoint holds the dense fp32 weights that tenko itself translates with. Text goes
    in and out as sentencepiece pieces (`--remove-bpe sentencepiece`). Files are replaced atomically, `model.pt` last.

    Raises:
        ValueError: one line with the file and what is wrong: the artefact is missing, damaged, or its parts don't fit.
        OSError: a file can't be written.
    """
    artefact_dir, out_dir = Path(artefact_dir), Path(out_dir)
    state, source, target, args = _load(artefact_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, copy in ((DICTIONARY, "dict.en.txt"), (DICTIONARY, "dict.cs.txt"), (SUBWORDS, SUBWORDS)):
        _replace(out_dir / copy, partial(shutil.copyfile, artefact_dir / name))
    checkpoint = fairseq_checkpoint(state, args, source, target)
    _replace(out_dir / "model.pt", partial(torch.save, checkpoint))
    return out_dir / "model.pt"


def fairseq_checkpoint(state: dict[str, Tensor], args: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    """The contents of `model.pt`.

    Args:
        state: the model's `state_dict`, fp32.
        args: all options of the architecture by fairseq's names, plain values (`fairseq_bridge.model_args`).
        source, target: languages, for instance "en" and "cs".
    """
    languages = {"source_lang": source, "target_lang": target}
    # `data` is where fairseq looks for dictionaries; both programs put the folder they are given in its place.
    model: OrderedDict[str, Any] = OrderedDict(args, task="translation", data=".", **languages)
    model.__dict__.update(model)
    return {
        "args": None,  # read first by both programs: None sends them to cfg
        "cfg": {"_name": None, "model": model, "task": {"_name": "translation", "data": ".", **languages}},
        "model": OrderedDict(state),
        # What fairseq expects of any checkpoint; without it, it takes the file for one of before 2018.
        "optimizer_history": [
            {"optimizer_name": "adam", "criterion_name": "", "lr_scheduler_state": {}, "num_updates": 0}
        ],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }


def _load(folder: Path) -> tuple[dict[str, Tensor], str, str, dict[str, Any]]:
    """State, source, target and options of the artefact, checked to fit each other."""
    from .artefact_model import check_model  # seconds to import
    from .fairseq_bridge import load_dictionary, model_args

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such artefact folder")
    file = artefact_file(folder)
    for name in (DICTIONARY, SUBWORDS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; an artefact has {file.name}, {DICTIONARY} and {SUBWORDS}")
    state, metadata = read_artefact(folder)
    direction = metadata.get("direction")
    if direction not in DIRECTIONS:
        raise ValueError(f"{file}: unknown direction {direction!r}; valid are {', '.join(DIRECTIONS)}")
    config = ModelConfig.described(metadata, file)
    pieces, symbols = Subwords(folder / SUBWORDS).pieces(), load_dictionary(folder / DICTIONARY).symbols
    if pieces != symbols:
        raise ValueError(f"{folder / DICTIONARY}: its {len(symbols)} entries are not the {len(pieces)} of {SUBWORDS}")
    check_model(config, folder, state)
    source, target = direction.split("-")
    return state, source, target, model_args(config)


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError.
        raise OSError(f"{file}: could not be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
