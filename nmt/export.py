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
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artefact_model import DICTIONARY, SUBWORDS, check_model, read_folder


def export_fairseq(artefact_dir: Path, out_dir: Path) -> Path:
    """Write `model.pt`, `dict.en.txt`, `dict.cs.txt` and `spm.model` into `out_dir`; return the path of `model.pt`.

    Packed tensors are decoded: the checkpoint holds the dense fp32 weights that tenko itself translates with. Text goes
    in and out as sentencepiece pieces (`--remove-bpe sentencepiece`). All files are written beside first, then renamed,
    `model.pt` last: of an export that fails nothing is left.

    Raises:
        ValueError: one line with the file and what is wrong: the artefact is missing, damaged, or its parts don't fit.
        OSError: a file can't be written.
    """
    artefact_dir, out_dir = Path(artefact_dir), Path(out_dir)
    state, source, target, args = _load(artefact_dir)
    copies = ((DICTIONARY, "dict.en.txt"), (DICTIONARY, "dict.cs.txt"), (SUBWORDS, SUBWORDS))
    writers: dict[str, Callable[[Path], object]]
    writers = {copy: partial(shutil.copyfile, artefact_dir / name) for name, copy in copies}
    writers["model.pt"] = partial(torch.save, fairseq_checkpoint(state, args, source, target))
    _write_all(out_dir, writers)
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
    artefact = read_folder(folder)
    check_model(artefact.config, folder, artefact.state)
    from .fairseq_bridge import model_args  # seconds to import

    source, target = artefact.direction.split("-")
    return artefact.state, source, target, model_args(artefact.config)


def _write_all(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files by name, all of them or none, and the folder if it is missing."""
    made = not folder.exists()
    beside = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            with _named(folder / name):
                write(beside[name])
                with open(beside[name], "rb") as written:
                    os.fsync(written.fileno())
        for name, temporary in beside.items():
            with _named(folder / name):
                os.replace(temporary, folder / name)
    finally:
        for temporary in beside.values():
            with contextlib.suppress(OSError):
                temporary.unlink()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Says of a failure which file couldn't be written; torch.save reports a full disk as RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OSError(f"{file}: could not be written ({getattr(error, 'strerror', None) or error})") from None
