"""What does `comm.route: auto` choose on which link, and is it ever slower than plain DDP?

    python benchmarks/auto.py                                    # 2 hosts, four rates, the small model: two minutes
    python benchmarks/auto.py --hosts 4 --rate 1gbit --model base

Root and iproute2 (lab.py). On every host a plain DDP model and one with `auto` train the same replayed gradients;
once `auto` has chosen, the two take turns (A B B A ...), and the table gives the median time of an update with `auto`
over the median with plain DDP, by the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types
from lab import UNSHAPED, Lab, missing


def rank(model_name: str, compute: float, updates: int) -> None:
    """One host's part: prints a line of JSON."""
    import torch
    import torch.distributed as dist
    from link_model import MODELS, Replay
    from torch.nn.parallel import DistributedDataParallel

    from tenko.comm import Auto, register

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    models = {name: Replay(MODELS[model_name], dist.get_rank()) for name in ("plain", "auto")}
    wrapped = {name: DistributedDataParallel(model, init_sync=False) for name, model in models.items()}
    auto = Auto()
    register(wrapped["auto"], auto)

    def update(name: str) -> float:
        models[name].compute = compute
        wrapped[name].zero_grad()
        dist.barrier()
        began = time.perf_counter()
        models[name].begin()
        wrapped[name]().backward()
        return time.perf_counter() - began

    while auto.choice is None:
        update("auto")
    for _ in range(3):
        update("plain")
    seconds: dict[str, list[float]] = {"plain": [], "auto": []}
    for turn in range(updates):
        for name in ("plain", "auto") if turn % 2 else ("auto", "plain"):
            slowest = torch.tensor(update(name))
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds[name].append(float(slowest))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(json.dumps({"choice": auto.choice, "measured": auto.seconds, **medians}), flush=True)
    auto.close()
    dist.destroy_process_group()


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=types.hosts, nargs="+", default=[2])
    parser.add_argument("--rate", type=types.rate, nargs="+", default=["100mbit", "1gbit", "10gbit", UNSHAPED])
    parser.add_argument("--model", choices=["base", "small"], default="small")
    parser.add_argument("--compute", type=types.seconds, default=0.05, help="seconds of an update's computation")
    parser.add_argument("--updates", type=types.integer(1), default=15, help="measured turns of each")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.model, options.compute, options.updates)
        return 0
    reason = missing()
    if reason:
        print(f"auto.py: {reason}", file=sys.stderr)
        return 2
    command = [sys.executable, __file__, "--rank", "--model", options.model, "--compute", str(options.compute)]
    command += ["--updates", str(options.updates)]
    print("| hosts | link | chosen | auto over plain DDP | measured: seconds an update |\n|---|---|---|---|---|")
    for hosts in options.hosts:
        with Lab(hosts) as lab:
            for rate in options.rate:
                lab.shape(rate)
                ended = lab.run(command, timeout=900)
                lines = [line for line in ended[0].output.splitlines() if line.startswith("{")]
                if not lines:
                    print(ended[0].output[-2000:], file=sys.stderr)
                    return 1
                found = json.loads(lines[-1])
                measured = ", ".join(f"{name} {seconds:.3f}" for name, seconds in found["measured"].items())
                ratio = found["auto"] / found["plain"]
                print(f"| {hosts} | {rate} | {found['choice']} | {ratio:.2f} | {measured} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
