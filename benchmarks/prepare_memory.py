"""Peak memory and speed of preparing a corpus, at growing sizes: memory must not follow the corpus.

    python benchmarks/prepare_memory.py CORPUS.tsv.xz [--vocab-size 32000] [--shares 0.1 1 4]

Each size is prepared from nothing in its own process, whose peak resident memory the kernel reports. A share above 1
repeats the corpus with a number put after each sentence, so that no pair is a duplicate of another.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from tenko.nmt.config import DataConfig
from tenko.nmt.prepare import prepare
from tenko.nmt.text_io import read_lines


def write_share(corpus: Path, share: float, path: Path) -> int:
    """Write the first `share` of a TSV, or several numbered copies of it, to `path`; returns the pairs written."""
    pairs = sum(1 for _ in read_lines(corpus))
    wanted = round(share * pairs)
    with path.open("w", encoding="utf-8") as file:
        for copy in range(-(-wanted // pairs)):
            end = f" {copy}" if copy else ""
            for line in islice(read_lines(corpus), wanted - copy * pairs):
                en, cs = line.split("\t")[:2]
                file.write(f"{en}{end}\t{cs}{end}\n")
    return wanted


def measure(corpus: Path, vocab_size: int, cache: Path) -> None:
    """Prepare in this process and print seconds and peak resident bytes."""
    started = time.perf_counter()
    prepare(DataConfig(train=str(corpus), vocab_size=vocab_size, cache=str(cache)), report=lambda line: None)
    seconds = time.perf_counter() - started
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    """Measure every share in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a TSV, first two columns English and Czech")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the child's cache folder
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.corpus, arguments.vocab_size, arguments.one)
        return
    first = 0.0
    print(f"{'pairs':>12} {'seconds':>8} {'pairs/s':>8} {'peak MB':>8} {'ratio':>6}")
    for share in arguments.shares:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "corpus.tsv"
            pairs = write_share(arguments.corpus, share, text)
            command = [sys.executable, __file__, str(text), "--vocab-size", str(arguments.vocab_size)]
            output = subprocess.run([*command, "--one", folder], check=True, capture_output=True, text=True).stdout
        seconds, peak = map(float, output.split())
        first = first or peak
        print(
            f"{pairs:>12,} {seconds:>8.1f} {pairs / seconds:>8,.0f} {peak / 1e6:>8.0f} {peak / first:>6.2f}", flush=True
        )


if __name__ == "__main__":
    main()
