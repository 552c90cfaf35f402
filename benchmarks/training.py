"""Our training loop beside real fairseq's, in one interleaved run: `python benchmarks/training.py [--json FILE]`.

Target tokens a second on the same model, the same batches of the embedded corpus in the same order, one thread a
process; first in one process, then on two ranks. All contestants of a group are loaded, warmed up and then trained in
turns of a few updates while the others wait, so a noisy neighbour hits all of them alike. Figures are medians over the
turns, ratios are medians of the turns' ratios; tokens a second of processor time, beside those of the clock, tell
whether others had the cores. `fairseq_peer.py` says how fairseq is run, `tenko_peer.py` how tenko.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contestant import THREADS, Contestant
from training_table import table

HERE = Path(__file__).parent
WARM_UP = 5
"""Updates that are not measured: memory is allocated, DDP finds its buckets."""
SLACK = 40
"""Batches listed beyond those that are trained on: fairseq reads ahead."""
SAME_LOSS = 1.05
"""Contestants start from other random weights: so near are their losses after a few dozen updates of warm-up."""
SIDE = 1024
"""Of the square matrices whose product is taken as the limit of a core."""

RECIPE = """
name: bench
direction: en-cs
seed: 1
workers: {workers}
threads: 1
data: {{train: embedded, vocab_size: 4000, cache: {cache}}}
model: {{arch: transformer, encoder_layers: 3, decoder_layers: 3, embed_dim: 256, ffn_dim: 1024, attention_heads: 4,
  dropout: 0.1, share_all_embeddings: true}}
comm: {{route: {route}, bits: 3, bits_down: 4}}
stages:
  - train: {{max_update: 1000000, max_tokens: 2000, precision: {precision}, lr: 5e-4, warmup_updates: 4000,
      label_smoothing: 0.1, log_interval: 10, valid_interval: 1000000, save_interval: 1000000}}
"""
FAIRSEQ = """--source-lang en --target-lang cs --arch transformer --encoder-layers 3 --decoder-layers 3
--encoder-embed-dim 256 --decoder-embed-dim 256 --encoder-ffn-embed-dim 1024 --decoder-ffn-embed-dim 1024
--encoder-attention-heads 4 --decoder-attention-heads 4 --dropout 0.1 --share-all-embeddings
--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer adam --adam-betas (0.9,0.98) --lr 5e-4
--lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-7 --max-tokens 2000
--required-batch-size-multiple 8 --curriculum 1 --max-update 1000000 --disable-validation --no-save --seed 1
--log-format simple --log-interval 10 --cpu --num-workers 0 --data-buffer-size 0"""
"""`fairseq-train`'s options; `fairseq_peer.py` says why the last two."""


def tenko(folder: Path, cache: Path, *, ranks: int, precision: str, route: str) -> Contestant:
    """tenko with a precision and a route (`fp32` or `all_reduce`, 3 bits up and 4 down)."""
    name = f"tenko {precision}" + ("" if ranks == 1 else ", 3/4 bits sent" if route == "all_reduce" else ", fp32 sent")
    recipe = folder / f"{precision}-{ranks}-{route}.yaml"
    recipe.write_text(RECIPE.format(workers=ranks, cache=cache, route=route, precision=precision))
    command = [str(HERE / "tenko_peer.py"), "train", str(recipe), str(recipe.with_suffix(""))]
    return Contestant(name=name, command=command, ranks=ranks, folder=folder, precision=precision)


def fairseq(folder: Path, *, ranks: int) -> Contestant:
    """Real fairseq in fp32."""
    command = [
        str(HERE / "fairseq_peer.py"),
        "train",
        str(folder / "batches.npz"),
        str(folder / "data-bin"),
        *FAIRSEQ.split(),
    ]
    if ranks > 1:
        command += f"--distributed-world-size {ranks} --distributed-no-spawn --distributed-backend gloo".split()
        command += ["--distributed-rank", "{rank}", "--distributed-init-method", "tcp://127.0.0.1:{port}"]
    return Contestant(name="fairseq fp32", command=command, ranks=ranks, folder=folder)


def compete(contestants: list[Contestant], rounds: int, updates: int, matmuls: dict[str, list[float]]) -> float | None:
    """All contestants in turns; the operations of a target token's matrix products where tenko can count them.

    Raises: RuntimeError: a contestant's process ended; AssertionError: they did not do the same work.
    """
    flops = None
    try:
        for contestant in contestants:
            contestant.start()
        for contestant in contestants:
            contestant.answers()
        for contestant in contestants:
            contestant.turn(WARM_UP)
        for number in range(rounds):
            measure_matmuls(matmuls)
            # A B C, then C B A: what drifts within a round favours nobody.
            for contestant in contestants if number % 2 == 0 else contestants[::-1]:
                contestant.rounds.append(contestant.turn(updates))
            _progress(f"round {number + 1}/{rounds}: " + ", ".join(f"{c.rounds[-1]['rate']:,.0f}" for c in contestants))
        if contestants[0].ranks == 1:
            flops = float(
                next(c for c in contestants if c.name == "tenko fp32").ask(f"flops {rounds * updates}")[0][
                    "flops_per_token"
                ]
            )
        for contestant in contestants:
            contestant.finish()
    finally:
        for contestant in contestants:
            contestant.close()
    tokens = {c.name: [r["tokens"] for r in c.rounds] for c in contestants}
    assert len({tuple(t) for t in tokens.values()}) == 1, f"not the same batches: {tokens}"
    sizes = {c.name: c.end["parameters"] for c in contestants}
    assert len(set(sizes.values())) == 1, f"not the same model: {sizes}"
    losses = {c.name: c.rounds[-1]["loss"] for c in contestants}
    assert max(losses.values()) < SAME_LOSS * min(losses.values()), f"not the same training: {losses}"
    return flops


def measure_matmuls(seconds: dict[str, list[float]]) -> None:
    """Time a few products of square matrices on one thread, fp32 and where it is native bf16."""
    import torch

    torch.set_num_threads(1)
    for precision in seconds:
        a = torch.randn(SIDE, SIDE, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        for repetition in range(9):
            begin = time.perf_counter()
            torch.mm(a, a)
            if repetition:
                seconds[precision].append(time.perf_counter() - begin)


def measure(updates: int, rounds: int, cache: Path) -> dict[str, Any]:
    """Both groups of contestants; figures as in the table."""
    import torch

    from tenko.nmt import precision

    native = precision.resolve("auto", torch.device("cpu")) == "bf16"
    matmuls: dict[str, list[float]] = {p: [] for p in (("fp32", "bf16") if native else ("fp32",))}
    groups: dict[int, list[Contestant]] = {}
    flops = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, cache, count=2 * (WARM_UP + rounds * updates) + SLACK)
        for ranks in (1, 2):
            ways = [("fp32", "fp32")] + [("fp32", "all_reduce")] * (ranks > 1) + [("bf16", "all_reduce")] * native
            group = [tenko(folder, cache, ranks=ranks, precision=p, route=route) for p, route in ways]
            groups[ranks] = [fairseq(folder, ranks=ranks), *group]
            _progress(f"{ranks} rank(s): " + ", ".join(c.name for c in groups[ranks]))
            flops = compete(groups[ranks], rounds, updates, matmuls) or flops
    assert flops is not None
    result: dict[str, Any] = {
        "cpu": cpu_name(),
        "parameters": groups[1][0].end["parameters"],
        "updates": updates,
        "rounds": rounds,
        "flops_per_target_token": flops,
        "matmul_side": SIDE,
        "matmul_gflops": {p: 2 * SIDE**3 / statistics.median(s) / 1e9 for p, s in matmuls.items()},
        "rates": [],
        "update": {},
    }
    for ranks, group in groups.items():
        for contestant in group:
            ratios = contestant.over(group[0])
            row = {"ranks": ranks, "name": contestant.name, "precision": contestant.precision}
            row |= {"tokens_per_second": contestant.median("rate"), "over_fairseq": statistics.median(ratios)}
            row |= {"tokens_per_cpu_second": contestant.median("cpu_rate")}
            row |= {"cpu_over_fairseq": statistics.median(contestant.over(group[0], "cpu_rate"))}
            row |= {"ratios": ratios, "loss": contestant.rounds[-1]["loss"], "wire": contestant.end.get("wire")}
            result["rates"].append(row)
    for contestant in groups[1]:
        result["update"][contestant.name] = shares(contestant, flops, result["matmul_gflops"])
    return result


def shares(contestant: Contestant, flops: float, matmul_gflops: dict[str, float]) -> dict[str, float]:
    """Where an update's time goes, as shares (medians over turns), and its matrix products beside the core's limit."""
    gflops = flops * contestant.median("rate") / 1e9
    found = {"gflops": gflops, "of_matmul": gflops / matmul_gflops[contestant.precision]}
    turns = [{part: s / r["seconds"] for part, s in r["parts"].items()} for r in contestant.rounds]
    if not turns[0]:  # fairseq's parts are not timed
        return found
    for turn in turns:
        turn["overhead"] = 1.0 - turn["forward"] - turn["backward"]
        turn["other"] = turn["overhead"] - turn["data"] - turn["optimizer"]
    return found | {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}


def _prepare(folder: Path, cache: Path, count: int) -> None:
    recipe = folder / "prepare.yaml"
    recipe.write_text(RECIPE.format(workers=1, cache=cache, route="fp32", precision="fp32"))
    environment = {**os.environ, **THREADS}
    command = [sys.executable, str(HERE / "tenko_peer.py"), "prepare", str(recipe), str(folder / "batches.npz")]
    output = subprocess.run([*command, str(count)], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    corpus = json.loads(output.stdout.splitlines()[-1])
    command = [sys.executable, str(HERE / "fairseq_peer.py"), "convert", corpus["corpus"], str(folder / "data-bin")]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cpu_name() -> str:
    """The processor as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--updates", type=int, default=3, help="of a turn (default 3)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each contestant (default 8)")
    parser.add_argument("--cache", type=Path, default=Path("runs/data"), help="of prepared corpora (default runs/data)")
    options = parser.parse_args()
    if options.updates < 1 or options.rounds < 1:
        parser.error("--updates and --rounds must be at least 1")
    result = measure(options.updates, options.rounds, options.cache.resolve())
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
