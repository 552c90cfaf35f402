"""On one GPU: the quantizer's kernels give the bytes that the CPU's give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenko.comm import Quantizer
from tenko.comm.layout import single
from tenko.comm.reference import key_words

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [1, 777, 300_001])
def test_gpu_and_cpu_agree(bits: int, numel: int) -> None:
    quantizer = Quantizer(bits=bits)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(numel, generator=generator)
    x[numel // 2] = 0
    residual = torch.randn(numel, generator=generator)
    part = single(numel, quantizer.span)
    keys = np.repeat(key_words((1,), [2]), len(part.table), axis=0)
    results = []
    for device in ("cpu", "cuda"):
        left = residual.to(device, copy=True)
        out = torch.empty(part.size(bits), dtype=torch.uint8, device=device)
        quantizer.encode_feedback(x.to(device), left, part, keys, out)
        total = torch.ones(numel, device=device)
        quantizer.decode_shard(out, part, total, factor=0.5, add=True)
        results.append([t.cpu() for t in (out, left, total)])
    codes, left, total = zip(*results, strict=True)
    assert torch.equal(*codes)
    torch.testing.assert_close(*left, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*total, rtol=1e-6, atol=1e-6)
