"""The models that ship with tenko: `models/DIRECTION/`, an artefact each, and model.json, which says where it is from.

`python -m tenko.launch.ship` puts them there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .config import DIRECTIONS

MODELS = Path(__file__).parent / "models"
CARD = "model.json"
"""Beside the artefact's files: recipe, commit, updates, BLEU on the test split with its signature, licence."""


def pretrained() -> list[str]:
    """Directions of the models that ship with this tenko, for instance ["en-cs", "cs-en"]."""
    return [direction for direction in DIRECTIONS if (MODELS / direction / CARD).is_file()]


def path(direction: str) -> Path:
    """The artefact's folder of a direction.

    Raises:
        ValueError: no such model ships; names those that do.
    """
    if direction not in pretrained():
        valid = ", ".join(pretrained()) or "none in this copy of tenko"
        raise ValueError(f"{direction}: no model of that name ships with tenko; valid: {valid}")
    return MODELS / direction


def card(direction: str) -> dict[str, Any]:
    """What model.json says of a shipped model. Raises: ValueError as `path`."""
    return json.loads((path(direction) / CARD).read_text(encoding="utf-8"))
