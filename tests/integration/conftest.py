"""Shared by the tests of SLURM: one cluster a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes of two cores; skipped where SLURM or root is missing."""
    if (why := missing()) is not None:
        pytest.skip(why)
    with Cluster(3) as running:
        yield running
