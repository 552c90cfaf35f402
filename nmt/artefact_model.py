"""An artefact's folder, its parts held to each other before anything is built or written of them.

fairseq, which takes seconds to import, is asked only where a model of it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenko.compression.container import artefact_file
from tenko.compression.packed import read_artefact

from .config import DIRECTIONS, ModelConfig
from .subwords import Subwords

DICTIONARY, SUBWORDS = "dict.txt", "spm.model"
_SINUSOIDS = 1 << 27
"""Elements of the table of positions that fairseq makes for each side, 512 MiB; no tensor of the file bounds it."""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What an artefact's folder holds."""

    folder: Path
    file: Path
    """Of the tensors."""
    state: dict[str, Tensor]
    """Every tensor by name, decoded; floats are fp32 and finite."""
    metadata: dict[str, Any]
    config: ModelConfig
    """The model's settings, of the metadata."""
    direction: str
    """en-cs or cs-en."""
    subwords: Subwords
    """With the entries of `dict.txt`."""


def read_folder(folder: Path) -> Artefact:
    """An artefact's folder: tensors decoded, subwords and dictionary held to each other; nothing is built yet.

    Raises:
        ValueError: a file is missing or damaged, or they don't fit each other; the message names the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such artefact folder")
    file = artefact_file(folder)
    for name in (DICTIONARY, SUBWORDS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; an artefact has {file.name}, {DICTIONARY} and {SUBWORDS}")
    subwords = Subwords(folder / SUBWORDS)
    subwords.hold_dictionary(folder / DICTIONARY)
    state, metadata = read_artefact(folder)
    direction = metadata.get("direction")
    if direction not in DIRECTIONS:
        raise ValueError(f"{file}: unknown direction {direction!r}; valid are {', '.join(DIRECTIONS)}")
    config = ModelConfig.described(metadata, file)
    for name in metadata["tensors"]:  # each once, not its aliases
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{file}: tensor {name} holds inf or NaN")
    return Artefact(
        folder=folder,
        file=file,
        state=state,
        metadata=metadata,
        config=config,
        direction=direction,
        subwords=subwords,
    )


def open_artefact(folder: Path) -> tuple[nn.Module, ModelConfig, dict[str, Any]]:
    """The model of an artefact's folder, dense, on the CPU; its settings; its metadata.

    Raises:
        ValueError: as `read_folder` and `check_model`.
    """
    from .fairseq_bridge import build_model

    artefact = read_folder(folder)
    check_model(artefact.config, folder, artefact.state)
    model = build_model(artefact.config, folder / DICTIONARY)
    model.load_state_dict(artefact.state, strict=True)
    return model, artefact.config, artefact.metadata


def check_model(config: ModelConfig, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Hold an artefact's tensors to the model of its settings and dictionary, without memory for that model.

    Args:
        config: the settings.
        folder: of the artefact.
        state: its tensors, dense.

    Raises:
        ValueError: fairseq has no such model, it has other tensors, or the dictionary is damaged; names the file.
    """
    from .fairseq_bridge import STRANGE, build_model, load_dictionary, model_args

    file = artefact_file(folder)
    load_dictionary(folder / DICTIONARY)  # its errors name it
    try:
        args = model_args(config)
        for side, positions in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
            count = args[f"{side}_layers"]
            found = len({name.split(".")[2] for name in state if name.startswith(f"{side}.layers.")})
            if count != found:
                raise ValueError(f"{count} layers in the {side}; the file has {found}")
            if (args[positions] or 0) * args[f"{side}_embed_dim"] > _SINUSOIDS:
                raise ValueError(f"{positions} {args[positions]} is too many for the width of the {side}")
        with torch.device("meta"):  # shapes only
            expected = build_model(config, folder / DICTIONARY).state_dict()
    except STRANGE as error:  # whatever fairseq comes to with settings from a file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: its metadata describe no model of these tensors ({reason})") from None
    for name in sorted(expected.keys() ^ state.keys()):
        kind = "misses" if name in expected else "has an unknown"
        raise ValueError(f"{file}: {kind} tensor {name}, so it is not the model of its metadata")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            shapes = f"{list(state[name].shape)}, not {list(tensor.shape)}"
            raise ValueError(f"{file}: tensor {name} has shape {shapes} (its metadata and {DICTIONARY})")
