"""Types of the benchmarks' options: what argparse refuses with one line, before anything is measured."""

from __future__ import annotations

import math
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from lab import UNSHAPED, bits_per_second

MOST_HOSTS = 64
"""Of a lab (lab.py)."""


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """An integer of at least `least` and at most `most`."""
    valid = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise ArgumentTypeError(f"must be {valid}, is {text!r}")
        return value

    return read


hosts = integer(2, MOST_HOSTS)
"""Hosts of a lab that exchange something; a single one has nobody to send to."""


def seconds(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"must be a number of at least 0, is {text!r}")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be a number above 0, is {text!r}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"must be a number from 0 to 1, is {text!r}")
    return value


def rate(text: str) -> str:
    """A link's rate, or none."""
    try:
        bits_per_second(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("rate: ")) from None
    return text


def shaped_rate(text: str) -> str:
    """A link's rate where a floor is wanted, which an unshaped link has not."""
    if text == UNSHAPED:
        raise ArgumentTypeError("none has no floor; give a rate such as 1gbit")
    return rate(text)


def contestant(text: str) -> tuple[str, str]:
    """NAME=PYTHON:SCRIPT as the name and PYTHON:SCRIPT, both of which are there."""
    name, _, where = text.partition("=")
    python, _, script = where.partition(":")
    if not (name and python and script):
        raise ArgumentTypeError(f"must be NAME=PYTHON:SCRIPT, is {text!r}")
    if shutil.which(python) is None:
        raise ArgumentTypeError(f"{name}: {python} is no program")
    if not Path(script).is_file():
        raise ArgumentTypeError(f"{name}: {script} is no file")
    return name, where


def new_file(text: str) -> Path:
    """A file to write at the end, in a folder that is there already."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentTypeError(f"must be a file in a folder that exists, is {text!r}")
    return path


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # within no bounds
