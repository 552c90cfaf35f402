"""The Triton kernels write the bytes that the reference writes. Run in Triton's interpreter, on CPU tensors: a GPU is
not needed, and not what is tested."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenko.comm import layout, reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before it is imported
from tenko.comm import triton_kernels

NUMELS = st.lists(st.integers(1, 600), min_size=1, max_size=4)
SPANS = st.sampled_from([64, 128, 192, 256])


def gaussian(numel: int, seed: int) -> torch.Tensor:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return x * (torch.rand(numel, generator=torch.Generator().manual_seed(seed + 1)) > 0.2)


def cut(numels: list[int], span: int, owners: int) -> layout.Shard:
    """The last owner's part of some tensors, matrices and vectors, that begin at element 3."""
    rows = [0 if i % 2 else 17 for i in range(len(numels))]
    starts = [3, *(3 + np.cumsum(numels)[:-1]).tolist()]
    return layout.Cut(numels, span, owners, rows).shard(range(len(numels)), starts, owners - 1)


@settings(max_examples=50, deadline=None)
@given(
    NUMELS,
    SPANS,
    st.integers(1, 8),
    st.sampled_from([0.0, 1.5, 3.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["block", "row", "tensor"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(["", "inf", "nan"]),
    st.integers(0, 2**32),
)
def test_encoding_equals_the_reference(
    numels: list[int],
    span: int,
    bits: int,
    clip: float,
    nearest: bool,
    feedback: bool,
    sigma: str,
    dtype: torch.dtype,
    bad: str,
    seed: int,
) -> None:
    """Bytes and residuals, bit for bit: sums are in fp64 in both."""
    part = cut(numels, span, 1 + seed % 2)
    x, residual = gaussian(sum(numels) + 5, seed).to(dtype), gaussian(sum(numels) + 5, seed + 2)
    x[:40] *= 1000
    if bad:
        x[sum(numels) // 2] = float(bad)
    keys = reference.key_words((seed,), part.tensors)
    limits = None
    if sigma != "block" and clip > 0 and bits > 1:
        limits = reference.limits(x.float(), part, span, clip, sigma == "row", residual if feedback else None)
    results = []
    for encode, values in ((reference.encode_table, x.float()), (triton_kernels.encode_table, x)):
        out, left = torch.zeros(part.size(bits), dtype=torch.uint8), residual.clone()
        options = {"nearest": nearest, "limits": limits, "residual": left if feedback else None}
        encode(values, part.table, keys, out, span, bits, clip, **options)
        results.append((out, left))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(
    NUMELS,
    SPANS,
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([1.0, -1.0, 1 / 3]),
    st.booleans(),
    st.integers(0, 99),
)
def test_decoding_equals_the_reference(
    numels: list[int], span: int, bits: int, add: bool, factor: float, bad: bool, seed: int
) -> None:
    part = cut(numels, span, 1 + seed % 2)
    x = gaussian(sum(numels) + 5, seed)
    if bad:
        x[sum(numels) // 2] = float("inf")
    payload = torch.zeros(part.size(bits), dtype=torch.uint8)
    reference.encode_table(x, part.table, reference.key_words((seed,), part.tensors), payload, span, bits, 3.0)
    results = []
    for decode in (reference.decode_table, triton_kernels.decode_table):
        out = gaussian(sum(numels) + 5, seed + 1)
        decode(payload, part.table, out, span, bits, factor, add)
        results.append(out)
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(NUMELS, SPANS, st.integers(2, 8), st.booleans(), st.integers(0, 2**32))
def test_scales_and_codes_apart_equal_the_reference(
    numels: list[int], span: int, bits: int, feedback: bool, seed: int
) -> None:
    """What a shared scale needs: scales alone, codes under given scales, and sums decoded under them."""
    part = cut(numels, span, 1 + seed % 2)
    x, residual = gaussian(sum(numels) + 5, seed), gaussian(sum(numels) + 5, seed + 2)
    keys = reference.key_words((seed,), part.tensors)
    results = []
    for module in (reference, triton_kernels):
        scales, left = torch.zeros(part.spans * 9, dtype=torch.uint8), residual.clone()
        mine = left if feedback else None
        module.encode_table(x, part.table, keys, scales, span, 0, 3.0, residual=mine)
        assert torch.equal(left, residual)
        codes, out = torch.zeros(part.groups * bits, dtype=torch.uint8), torch.zeros(sum(numels) + 5)
        module.encode_table(x * 1.5, part.table, keys, codes, span, bits, 3.0, residual=mine, given=scales)
        module.decode_table(codes, part.table, out, span, bits, 1.0, False, given=scales, levels=100)
        results.append((scales, left, codes, out))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_kernels_compile_for_gpus_without_fused_or_approximate_arithmetic() -> None:
    """Down to machine code, for which no GPU is needed: the interpreter lets through what the compiler refuses."""
    code = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tenko.comm import triton_kernels as t
pointers = dict(residual="*fp32", segments="*i64", out="*u8", given="*u8", limits="*fp32", scales_table="*fp32",
                mantissas="*i32", payload="*u8", count="i32", steps="i32", factor="fp32", levels="i32")
encode = dict(SPAN=1024, WIDTH=128, BITS=3, LEVELS=3, GRID=1, CLIP=3.0, NEAREST=False, FEEDBACK=True, GIVEN=False,
              LIMITED=False)
decode = dict(SPAN=1024, WIDTH=128, BITS=3, ADD=True, GIVEN=False)
for kernel, types, constants in ((t._encode, dict(pointers, x="*fp16"), encode),
                                 (t._decode, dict(pointers, out="*fp32"), decode)):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    for capability in (80, 90):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
        assert made.asm["cubin"]
        assert not re.search(r"fma\\.rn\\.f32|approx|ftz", made.asm["ptx"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_triton_is_not_imported_with_the_package() -> None:
    code = "import sys, tenko.comm.quantizer; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
