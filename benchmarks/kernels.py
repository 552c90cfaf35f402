"""The CPU kernels beside one core's memcpy, in one interleaved run: `python benchmarks/kernels.py [--json FILE]`.

Rates count the fp32 bytes of the array once: read by encode, written by decode, read and written by decode-and-add, and
read by encode with error feedback, which also reads and writes a residual as large. A last line has encode and
decode-and-add on several threads (one core's memcpy beside them).
Every repetition copies the array (numpy.copyto into memory that is there already) and runs every kernel once; the
figures are medians over repetitions, so a noisy neighbour hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types

from tenko.comm.layout import single
from tenko.comm.quantizer import BITS, Quantizer
from tenko.comm.reference import key_words

GOALS = {"encode": 0.7, "decode-add": 1.3, "encode-feedback": None, "decode": None}
"""Demanded share of memcpy's rate."""
WIRE_GOAL = 1.03
"""Bytes on the wire, at most, over the nominal bits."""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure(megabytes: int, repetitions: int, block: int, clip: float, threads: int = 2) -> dict:
    """Rates of all kernels in GB/s and as shares of memcpy's; sizes on the wire."""
    torch.set_num_threads(1)
    numel = megabytes * 1_000_000 // 4
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    out = torch.zeros(numel)
    keys = key_words((1, 2), (3,))
    source, target = x.numpy(), out.numpy().copy()
    residual = torch.zeros(numel)

    jobs: dict[tuple[str, int], Callable[[], object]] = {("memcpy", 0): lambda: np.copyto(target, source)}
    parts = {}
    for bits in BITS:
        quantizer = Quantizer(bits=bits, clip=clip, block=block)
        part = parts[bits] = single(numel, quantizer.span)
        payload = torch.zeros(part.size(bits), dtype=torch.uint8)
        jobs["encode", bits] = lambda q=quantizer, s=part, p=payload: q.encode_shard(x, s, keys, p)
        jobs["encode-feedback", bits] = lambda q=quantizer, s=part, p=payload: q.encode_feedback(
            x, residual, s, keys, p
        )
        jobs["decode-add", bits] = lambda q=quantizer, s=part, p=payload: q.decode_shard(p, s, out, add=True)
        jobs["decode", bits] = lambda q=quantizer, s=part, p=payload: q.decode_shard(p, s, out)
        if bits == 3 and threads > 1:
            for kernel in ("encode", "decode-add"):
                jobs[f"{kernel}-threads", bits] = lambda job=jobs[kernel, bits]: on_threads(threads, job)

    begin = time.perf_counter()
    Quantizer().encode(x[:1024])
    ready = time.perf_counter() - begin
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in jobs}
    for repetition in range(repetitions + 1):  # the first warms up
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            if repetition:
                seconds[name].append(time.perf_counter() - begin)
    memcpy = statistics.median(seconds["memcpy", 0])

    def rate(kernel: str, bits: int) -> dict[str, float]:
        median = statistics.median(seconds[kernel, bits])
        return {"gb_per_s": numel * 4 / median / 1e9, "of_memcpy": memcpy / median}

    rows = []
    for bits in BITS:
        row: dict = {"bits": bits, "wire_over_nominal": parts[bits].size(bits) / (numel * bits / 8)}
        for kernel in GOALS:
            row[kernel] = rate(kernel, bits)
        rows.append(row)
    return {
        "cpu": cpu_name(),
        "megabytes": megabytes,
        "block": block,
        "clip": clip,
        "repetitions": repetitions,
        "seconds_to_load_kernels": ready,
        "memcpy_gb_per_s": numel * 4 / memcpy / 1e9,
        "kernels": rows,
        "threads": {"count": threads}
        | {name[:-8]: rate(name, bits) for name, bits in jobs if name.endswith("threads")},
    }


def on_threads(count: int, job: Callable[[], object]) -> None:
    torch.set_num_threads(count)
    try:
        job()
    finally:
        torch.set_num_threads(1)


def table(result: dict) -> str:
    lines = [
        f"{result['cpu']}, one core, {result['megabytes']} MB of fp32, "
        f"blocks of {result['block'] or 'the default size'}, "
        f"c = {result['clip']:g}; medians of {result['repetitions']}",
        f"memcpy {result['memcpy_gb_per_s']:.1f} GB/s; kernels compiled or loaded in "
        f"{result['seconds_to_load_kernels']:.1f} s",
        "",
        f"{'bits':>4}"
        + "".join(f"{kernel + ' GB/s':>21}{'x memcpy':>10}" for kernel in GOALS)
        + f"{'bytes/nominal':>15}",
    ]
    for row in result["kernels"]:
        cells = "".join(f"{row[kernel]['gb_per_s']:>21.1f}{row[kernel]['of_memcpy']:>10.2f}" for kernel in GOALS)
        lines.append(f"{row['bits']:>4}{cells}{row['wire_over_nominal']:>15.4f}")
    lines.append("")
    for kernel, goal in GOALS.items():
        if goal is not None:
            least = min(row[kernel]["of_memcpy"] for row in result["kernels"])
            verdict = "reached" if least >= goal else "MISSED"
            lines.append(f"{kernel}: at least {goal:g}x memcpy demanded, least is {least:.2f}: {verdict}")
    if result["threads"]["count"] > 1:
        named = [(kernel, result["threads"][kernel]) for kernel in ("encode", "decode-add")]
        rates = ", ".join(f"{kernel} {rate['gb_per_s']:.1f} GB/s ({rate['of_memcpy']:.2f} x)" for kernel, rate in named)
        lines.append(f"{result['threads']['count']} threads, 3 bits: {rates}")
    most = max(row["wire_over_nominal"] for row in result["kernels"])
    lines.append(
        f"wire: at most {WIRE_GOAL:g}x the nominal bits demanded, most is {most:.4f}: "
        + ("reached" if most <= WIRE_GOAL else "MISSED")
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=types.new_file, metavar="FILE", help="also write the figures to FILE")
    size = "fp32 bytes of the array, in 10^6 (default 64)"
    parser.add_argument("--megabytes", type=types.integer(1), default=64, help=size)
    parser.add_argument("--repetitions", type=types.integer(1), default=15, help="default 15")
    parser.add_argument("--block", type=int, default=0, help="elements of a scale (default: by the bits)")
    last = "of the last line (default 2; 1 leaves it out)"
    parser.add_argument("--threads", type=types.integer(1), default=2, help=last)
    parser.add_argument("--clip", type=float, default=3.0, help="in standard deviations, 0 does not clip (default 3)")
    options = parser.parse_args()
    try:
        Quantizer(clip=options.clip, block=options.block)
    except ValueError as error:
        parser.error(f"--{error}")
    result = measure(options.megabytes, options.repetitions, options.block, options.clip, options.threads)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
