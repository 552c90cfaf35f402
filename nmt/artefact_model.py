"""The model of an artefact's folder: settings, dictionary and tensors are held to each other before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenko.compression.container import artefact_file
from tenko.compression.packed import read_artefact

from .config import ModelConfig
from .fairseq_bridge import STRANGE, build_model, load_dictionary, model_args

DICTIONARY = "dict.txt"


def open_artefact(folder: Path) -> tuple[nn.Module, ModelConfig, dict[str, Any]]:
    """The model of an artefact's folder, dense, on the CPU; its settings; its metadata.

    Raises:
        ValueError: a file is missing or damaged, or they don't fit each other; the message names the file.
    """
    state, metadata = read_artefact(folder)
    config = ModelConfig.described(metadata, artefact_file(folder))
    check_model(config, folder, state)
    model = build_model(config, folder / DICTIONARY)
    model.load_state_dict(state, strict=True)
    return model, config, metadata


def check_model(config: ModelConfig, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Hold an artefact's tensors to the model of its settings and dictionary, without memory for that model.

    Args:
        config: the settings.
        folder: of the artefact.
        state: its tensors, dense.

    Raises:
        ValueError: fairseq has no such model, it has other tensors, or the dictionary is damaged; names the file.
    """
    file = artefact_file(folder)
    load_dictionary(folder / DICTIONARY)  # its errors name it
    try:
        args = model_args(config)
        layers = {side: args[f"{side}_layers"] for side in ("encoder", "decoder")}
        for side, count in layers.items():
            found = len({name.split(".")[2] for name in state if name.startswith(f"{side}.layers.")})
            if count != found:
                raise ValueError(f"{count} layers in the {side}; the file has {found}")
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
