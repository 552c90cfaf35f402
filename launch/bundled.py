"""The recipes that ship with tenko."""

from __future__ import annotations

from importlib import resources


def bundled() -> list[str]:
    """Names of the recipes that ship with tenko."""
    try:
        entries = list(resources.files("tenko.recipes").iterdir())
    except ModuleNotFoundError:
        return []
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))
