"""The CPU kernels beside one core's memcpy, in one interleaved run: `python benchmarks/kernels.py [--json FILE]`.

Rates count the fp32 bytes of the array once: read by encode, written by decode, read and written by decode-and-add.
Every repetition copies the array (numpy.copyto into memory that is there already) and runs every kernel once; the
figures are medians over repetitions, so a noisy neighbour hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tenko.comm.layout import single
from tenko.comm.quantizer import BITS, Quantizer
from tenko.comm.reference import key_words

GOALS = {"encode": 0.5, "decode-add": 1.0, "decode": None}
"""Demanded share of memcpy's rate."""
WIRE_GOAL = 1.03
"""Bytes on the wire, at most, over the nominal bits."""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure(megabytes: int, repetitions: int, block: int, clip: float) -> dict:
    """Rates of all kernels in GB/s and as shares of memcpy's; sizes on the wire."""
    torch.set_num_threads(1)
    numel = megabytes * 1_000_000 // 4
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    out = torch.zeros(numel)
    keys = key_words((1, 2), (3,))
    source, target = x.numpy(), out.numpy().copy()

    jobs: dict[tuple[str, int], Callable[[], object]] = {("memcpy", 0): lambda: np.copyto(target, source)}
    parts = {}
    for bits in BITS:
        quantizer = Quantizer(bits=bits, clip=clip, block=block)
        part = parts[bits] = single(numel, quantizer.span)
        payload = torch.zeros(part.size(bits), dtype=torch.uint8)
        jobs["encode", bits] = lambda q=quantizer, s=part, p=payload: q.encode_shard(x, s, keys, p)
        jobs["decode-add", bits] = lambda q=quantizer, s=part, p=payload: q.decode_shard(p, s, out, add=True)
        jobs["decode", bits] = lambda q=quantizer, s=part, p=payload: q.decode_shard(p, s, out)

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
    rows = []
    for bits in BITS:
        row: dict = {"bits": bits, "wire_over_nominal": parts[bits].size(bits) / (numel * bits / 8)}
        for kernel in GOALS:
            median = statistics.median(seconds[kernel, bits])
            row[kernel] = {"gb_per_s": numel * 4 / median / 1e9, "of_memcpy": memcpy / median}
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
    }


def table(result: dict) -> str:
    lines = [
        f"{result['cpu']}, one core, {result['megabytes']} MB of fp32, "
        f"blocks of {result['block'] or '128 (256 at 2 bits)'}, "
        f"c = {result['clip']:g}; medians of {result['repetitions']}",
        f"memcpy {result['memcpy_gb_per_s']:.1f} GB/s; kernels compiled or loaded in "
        f"{result['seconds_to_load_kernels']:.1f} s",
        "",
        f"{'bits':>4}"
        + "".join(f"{kernel + ' GB/s':>17}{'x memcpy':>10}" for kernel in GOALS)
        + f"{'bytes/nominal':>15}",
    ]
    for row in result["kernels"]:
        cells = "".join(f"{row[kernel]['gb_per_s']:>17.1f}{row[kernel]['of_memcpy']:>10.2f}" for kernel in GOALS)
        lines.append(f"{row['bits']:>4}{cells}{row['wire_over_nominal']:>15.4f}")
    lines.append("")
    for kernel, goal in GOALS.items():
        if goal is not None:
            least = min(row[kernel]["of_memcpy"] for row in result["kernels"])
            verdict = "reached" if least >= goal else "MISSED"
            lines.append(f"{kernel}: at least {goal:g}x memcpy demanded, least is {least:.2f}: {verdict}")
    most = max(row["wire_over_nominal"] for row in result["kernels"])
    lines.append(
        f"wire: at most {WIRE_GOAL:g}x the nominal bits demanded, most is {most:.4f}: "
        + ("reached" if most <= WIRE_GOAL else "MISSED")
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--megabytes", type=int, default=64, help="fp32 bytes of the array, in 10^6 (default 64)")
    parser.add_argument("--repetitions", type=int, default=15, help="default 15")
    parser.add_argument("--block", type=int, default=0, help="elements of a scale (default 128, 256 at 2 bits)")
    parser.add_argument("--clip", type=float, default=3.0, help="in standard deviations, 0 does not clip (default 3)")
    options = parser.parse_args()
    result = measure(options.megabytes, options.repetitions, options.block, options.clip)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
