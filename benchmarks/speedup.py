"""The paper's picture: speed-up over one worker for n = 1 to 8, fp32 against 3-bit gradients, and with LAQ4 weights.

    python benchmarks/speedup.py                 # measure, draw: see --estimate
    python benchmarks/speedup.py --quick         # 2 and 4 hosts, one turn
    python benchmarks/speedup.py --draw          # only draw what lies in docs/results/speedup.json

Weak scaling, as in Hou, Zhang & Kwok (ICLR 2019): n workers take n batches a step, so the speed-up is n times the
computation's time over the step's, exchange included. Computation is replayed (link_model.py): one worker's step takes
exactly as long as asked for. Measured points go to speedup.png; the model that extends them to 16 nodes of 4 GPUs
(speedup_model.py) is drawn apart, in speedup_model.png, with its error on the measured points. `none` is an unshaped
link: there the two cores are the limit, and compression may lose.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types
from lab import missing
from link_peers import PEERS
from link_plots import draw_measured, draw_model
from links import RESULTS, Sweep, origin, run
from speedup_model import describe

CONTESTANTS = ["DDP fp32", "tenko 3/4", "tenko server, SQ3 + LAQ4"]


def main() -> int:
    """Measure, draw, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=types.hosts, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--rate", type=types.rate, nargs="+", default=["1gbit", "10gbit", "none"])
    computed = "seconds of a step's computation"
    parser.add_argument("--compute", type=types.positive, nargs="+", default=[0.1, 1.0], help=computed)
    known = f"of: {'; '.join(PEERS)}"
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=CONTESTANTS, metavar="PEER", help=known)
    parser.add_argument("--repeat", type=types.integer(1), default=2)
    parser.add_argument("--count", type=types.integer(1), default=2)
    beside = "pictures go beside it"
    parser.add_argument("--out", type=types.new_file, default=RESULTS / "speedup.json", help=beside)
    parser.add_argument("--quick", action="store_true", help="2 and 4 hosts, one turn, not to --out")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--estimate", action="store_true", help="only say how long the run would take")
    options = parser.parse_args()
    if options.quick:
        options.hosts, options.repeat, options.count = [2, 4], 1, 1
        options.out = Path(tempfile.gettempdir()) / "speedup-quick.json"
    if options.draw and not options.out.is_file():
        parser.error(f"--draw: {options.out} is not there; measure first, or give another --out")
    if not options.draw:
        if (why := missing()) is not None:
            print(f"speedup: {why}", file=sys.stderr)
            return 2
        sweep = Sweep(
            hosts=options.hosts,
            rates=options.rate,
            peers=options.peers,
            repeat=options.repeat,
            count=options.count,
            compute=tuple(options.compute),
        )
        print(f"about {sweep.seconds() / 60:.0f} minutes", file=sys.stderr)
        if options.estimate:
            return 0
        with tempfile.NamedTemporaryFile("w", prefix="speedup-", suffix=".log", delete=False) as log:
            print(f"what the ranks say goes to {log.name}", file=sys.stderr)
            run(sweep, options.out, log)
    document = json.loads(options.out.read_text())
    draw_measured(document, options.out.with_suffix(".png"))
    draw_model(document, options.out.with_name(f"{options.out.stem}_model.png"))
    text = f"# Speed-up over one worker\n\n{origin(document)}\n\n{describe(document)}"
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
