"""What the kernels compute does not depend on whether numba has just compiled them or found them in its cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUMS = """
import hashlib, torch
from tenko.comm import laq
from tenko.comm.quantizer import Quantizer

generator = torch.Generator().manual_seed(1)
weights, importance = torch.randn(10_003, generator=generator) * 0.3, torch.rand(10_003, generator=generator)
digest = hashlib.sha256()
for block in (0, 256, 1000):
    for found in laq.solve(weights, importance, 4, block=block):
        digest.update(found.numpy().tobytes())
for sigma in ("block", "tensor"):
    digest.update(Quantizer(bits=3, clip=3.0, sigma=sigma).encode(weights, (1, 2)).numpy().tobytes())
print(digest.hexdigest())
"""


def test_kernels_fresh_from_the_compiler_and_from_the_cache_agree(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SUMS]
    found = []
    for _ in range(2):
        found.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        assert list(tmp_path.rglob("*.nbc")), "numba keeps its cache elsewhere"
    assert found[0] == found[1]
