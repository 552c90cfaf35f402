"""Which pair goes where: duplicates, held-out sets by hash, and what would leak from them into train.

Works on 24 bytes a pair (64-bit hashes of the pair and of each side's key) that lie in a file and are read in chunks;
in memory stays one byte a pair, its fate. The held-out sentences are those whose English key has the smallest hashes:
an exact number of them, the same whatever the order of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

RECORD = np.dtype([("pair", "<u8"), ("en", "<u8"), ("cs", "<u8")])
"""Hashes of one pair: both normalised texts together, the key of the English side, the key of the Czech side."""

TRAIN, VALID, TEST, DUPLICATE, LEAK = range(5)
"""Fates of a pair, uint8."""

CHUNK = 1 << 17
BUCKETS = 128


class Keys(NamedTuple):
    """Hashes of the keys of held-out sentences, each side sorted and unique, uint64."""

    en: np.ndarray
    cs: np.ndarray


def _chunks(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    # fromfile and not memmap: mapped pages count as memory of the process
    start = 0
    with path.open("rb") as file:
        while len(records := np.fromfile(file, RECORD, CHUNK)):
            yield start, records
            start += len(records)


def mark_duplicates(path: Path, fates: np.ndarray, scratch: Path) -> int:
    """Mark all but the first of equal pairs as DUPLICATE, by way of buckets below `scratch`. Returns how many."""
    item = np.dtype([("pair", "<u8"), ("index", "<i8")])
    names = [scratch / f"bucket.{bucket}" for bucket in range(BUCKETS)]
    files = [name.open("wb") for name in names]
    try:
        for start, records in _chunks(path):
            items = np.empty(len(records), item)
            items["pair"] = records["pair"]
            items["index"] = np.arange(start, start + len(records))
            bucket = (items["pair"] % BUCKETS).astype(np.uint8)
            order = np.argsort(bucket, kind="stable")
            ends = np.cumsum(np.bincount(bucket, minlength=BUCKETS))
            for file, part in zip(files, np.split(items[order], ends[:-1]), strict=True):
                file.write(part.tobytes())
    finally:
        for file in files:
            file.close()
    found = 0
    for name in names:
        items = np.fromfile(name, item)
        name.unlink()
        order = np.argsort(items["pair"], kind="stable")  # stable: the first in the corpus stays first
        again = order[1:][np.diff(items["pair"][order]) == 0]
        fates[items["index"][again]] = DUPLICATE
        found += len(again)
    return found


def mark_leaks(path: Path, fates: np.ndarray, keys: Keys) -> int:
    """Mark pairs of TRAIN that share either side's key with held-out sentences as LEAK. Returns how many."""
    found = 0
    for start, records in _chunks(path):
        fate = fates[start : start + len(records)]
        leaks = (fate == TRAIN) & (np.isin(records["en"], keys.en) | np.isin(records["cs"], keys.cs))
        fate[leaks] = LEAK
        found += int(leaks.sum())
    return found


def hold_out(path: Path, fates: np.ndarray, size: int, fate_to_give: int) -> Keys:
    """Give `size` pairs of TRAIN another fate, one for each of the smallest hashes of English keys (fewer if there are
    fewer). Returns the keys of both sides; what shares them with train is left to `mark_leaks`.
    """
    smallest = np.empty(0, "<u8")
    for start, records in _chunks(path):
        here = records["en"][fates[start : start + len(records)] == TRAIN]
        if len(smallest) == size:
            here = here[here < smallest[-1]]
        smallest = np.union1d(smallest, here)[:size]
    cs: list[np.ndarray] = []
    waiting = np.ones(len(smallest), bool)
    for start, records in _chunks(path):
        fate = fates[start : start + len(records)]
        rows = np.flatnonzero((fate == TRAIN) & np.isin(records["en"], smallest[waiting]))
        _, first = np.unique(records["en"][rows], return_index=True)
        rows = rows[first]
        fate[rows] = fate_to_give
        waiting[np.searchsorted(smallest, records["en"][rows])] = False
        cs.append(records["cs"][rows])
    return Keys(smallest, np.unique(np.concatenate(cs)) if cs else np.empty(0, "<u8"))
