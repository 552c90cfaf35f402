"""Shared by all tests: one small prepared corpus a session, of pairs that ship with tenko."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in child processes

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is where a shell has started the tests in the background, and programs that tests start would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from tenko.nmt.corpus import Corpus

PAIRS = 420


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test` runs two files at a time. A file stays in one process, since its tests share what they have trained;
    so do those of SLURM, which share a cluster."""
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        name = "slurm" if "cluster" in getattr(item, "fixturenames", ()) else item.path.name
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a test sets in this process's environment ends with it: a launcher's variables would mislead later tests."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def small_tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """420 short pairs of the embedded corpus, English TAB Czech."""
    from tenko.nmt.text_io import read_pairs, source_files

    pairs = read_pairs(source_files("embedded", "data.train"))
    short = ((en, cs) for en, cs in pairs if len(en) < 70 and len(cs) < 70)
    path = tmp_path_factory.mktemp("corpus") / "small.tsv"
    path.write_text("".join(f"{en}\t{cs}\n" for en, cs in islice(short, PAIRS)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_corpus(small_tsv: Path) -> Corpus:
    """`small_tsv` prepared: about 370 training pairs, 20 to validate on, 20 to test, 300 subwords."""
    from tenko.nmt.config import DataConfig
    from tenko.nmt.prepare import prepare

    config = DataConfig(
        train=str(small_tsv), valid_size=20, test_size=20, vocab_size=300, cache=str(small_tsv.parent / "cache")
    )
    return prepare(config, report=lambda line: None)
