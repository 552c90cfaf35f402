"""A recipe of the toy Transformer on the session's small corpus, for tests of stages as a user runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def write_recipe(path: Path, tsv: Path, stages: Sequence[Any], *, workers: int = 2, **top: Any) -> Path:
    """A recipe file with dropout and 3-bit gradients; `top` are more keys of the recipe."""
    data = {"train": str(tsv), "cache": str(tsv.parent / "cache"), "valid_size": 20, "test_size": 20, "vocab_size": 300}
    model = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 16, "ffn_dim": 32, "attention_heads": 2}
    content = {
        "name": "toy",
        "workers": workers,
        "threads": 1,
        "data": data,
        "model": {**model, "dropout": 0.1},
        **top,
        "stages": list(stages),
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
