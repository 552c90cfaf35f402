"""fp32, bf16 and fp16: which one, and torch's own autocast and loss scaler for it, the same on a CPU and on a GPU.

accelerate silently ignores fp16 on a CPU, so both are driven here, and the loss-scaling path is truly run in tests.
"""

from __future__ import annotations

import contextlib
from typing import ContextManager  # noqa: UP035 (the generic alias of contextlib needs an argument more)

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: str, device: torch.device) -> str:
    """`auto` as bf16 where the device multiplies it natively, else fp32; other values as they are.

    Native on a CPU means AVX512-BF16 or AMX; without them bf16 is emulated and slower than fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Private names, absent in some builds: absent means no.
    native = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if native else "fp32"


def autocast(precision: str, device: torch.device) -> ContextManager[object]:
    """The context for a forward pass."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def loss_scaler(precision: str, device: torch.device, *, init_scale: float, scale_window: int) -> torch.amp.GradScaler:
    """A dynamic loss scaler, enabled by fp16: halved on overflow, doubled after `scale_window` updates without."""
    return torch.amp.GradScaler(
        device.type, init_scale=init_scale, growth_interval=scale_window, enabled=precision == "fp16"
    )
