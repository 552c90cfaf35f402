"""How fast does the same model translate by CTranslate2 and by fairseq's beam search? One thread each.

    python benchmarks/decoding.py --run runs/embedded                            # the last stage, the run's test split
    python benchmarks/decoding.py --model DIR --corpus runs/data/HASH --rounds 3 --sentences 300

The peer is tenko's own Translator: fairseq's SequenceGenerator, fp32, sentences sorted by length, 4,000 source tokens
a batch, which is near its best; `--max-tokens 1` gives both one sentence at a time, as a chat would.

All translate the same sentences, subwords and back included, loading left out, in turns (A B C D, A B C D); a ratio is
that of one round, the table has the median and range over rounds. Rates are source words (by spaces) a second. `CPU`
counts processor time instead of the clock's: where the two ratios differ much, others had the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from tenko.launch.rundir import RunDirectory
from tenko.launch.stage_tools import corpus_of
from tenko.nmt.config import DecodeConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.ctranslate2_engine import CTranslate2Translator
from tenko.nmt.ctranslate2_model import export_ctranslate2
from tenko.nmt.engines import Engine
from tenko.nmt.evaluate import corpus_bleu
from tenko.nmt.translate import Translator
from tenko.nmt.vocabulary_map import vocabulary_map

PEER = "fairseq, fp32"


def contestants(artefact: Path, corpus: Corpus, folder: Path, candidates: list[int]) -> dict[str, Engine]:
    """Loaded models by name, the peer first."""
    peer = Translator.load(artefact, threads=1)
    found: dict[str, Engine] = {PEER: peer}
    for quantization in ("fp32", "int8"):
        path = export_ctranslate2(artefact, folder / quantization, quantization=quantization)
        found[f"CTranslate2, {quantization}"] = CTranslate2Translator(path, threads=1)
    for count in candidates:
        mapped = vocabulary_map(corpus.split("train"), peer.direction, corpus.vocab_size, candidates=count)
        path = export_ctranslate2(artefact, folder / f"int8-{count}", vocabulary_map=mapped)
        found[f"CTranslate2, int8, map of {count}"] = CTranslate2Translator(path, threads=1)
    return found


def measure(
    engines: dict[str, Engine], sources: list[str], references: list[str], decode: DecodeConfig, rounds: int
) -> dict[str, dict]:
    """Figures by contestant: BLEU, seconds and processor seconds of each round."""
    figures: dict[str, dict] = {}
    for name, engine in engines.items():
        engine.translate(sources[:50], decode=decode)  # warm
        figures[name] = {"seconds": [], "cpu_seconds": []}
    for _ in range(rounds):
        for name, engine in engines.items():
            wall, cpu = time.perf_counter(), time.process_time()
            hypotheses = engine.translate(sources, decode=decode)
            figures[name]["cpu_seconds"].append(time.process_time() - cpu)
            figures[name]["seconds"].append(time.perf_counter() - wall)
            figures[name]["bleu"] = corpus_bleu(hypotheses, references).score
    return figures


def _ratio(figures: dict[str, dict], name: str, key: str) -> str:
    ratios = [peer / own for peer, own in zip(figures[PEER][key], figures[name][key], strict=True)]
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def table(beam: int, figures: dict[str, dict], words: int) -> str:
    """Of one beam."""
    lines = [
        f"| beam {beam} | words/s | over fairseq | by CPU time | BLEU | less fairseq |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in figures.items():
        rate = words / statistics.median(own["seconds"])
        ratios = " | ".join("1" if name == PEER else _ratio(figures, name, key) for key in ("seconds", "cpu_seconds"))
        less = own["bleu"] - figures[PEER]["bleu"]
        lines.append(f"| {name} | {rate:,.0f} | {ratios} | {own['bleu']:.2f} | {less:+.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--stage")
    parser.add_argument("--model", type=Path, help="an artefact's folder, in place of --run; needs --corpus")
    parser.add_argument("--corpus", type=Path, help="a prepared corpus")
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--maps", type=int, nargs="*", default=[24], help="candidates of a subword")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=DecodeConfig.max_tokens, help="source tokens of a batch")
    parser.add_argument("--json", type=Path, help="write the figures")
    options = parser.parse_args()
    if (options.run is None) == (options.model is None) or (options.model and not options.corpus):
        parser.error("give --run, or --model with --corpus")
    run = RunDirectory.read(options.run) if options.run else None
    artefact = run.artefact(options.stage) if run else options.model
    corpus = Corpus.open(options.corpus) if options.corpus or run is None else corpus_of(run.recipe)
    with tempfile.TemporaryDirectory() as folder:
        engines = contestants(artefact, corpus, Path(folder), options.maps)
        sides = dict(zip(("en", "cs"), corpus.text("test"), strict=True))
        source, target = engines[PEER].direction.split("-")
        sources, references = sides[source][: options.sentences], sides[target][: options.sentences]
        words = sum(len(line.split()) for line in sources)
        print(f"{artefact}: {len(sources)} sentences, {words:,} words, one thread, {options.rounds} rounds\n")
        results = {}
        for beam in options.beams:
            decode = DecodeConfig(beam=beam, max_tokens=options.max_tokens)
            results[beam] = measure(engines, sources, references, decode, options.rounds)
            print(table(beam, results[beam], words), end="\n\n", flush=True)
    if options.json:
        document = {"words": words, "sentences": len(sources), "beams": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
