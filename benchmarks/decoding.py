"""How fast does the same model translate by CTranslate2 and by fairseq's beam search? One thread each.

    python benchmarks/decoding.py --run runs/demo --stage pretrained             # a stage's model, the run's test split
    python benchmarks/decoding.py --model DIR --corpus runs/data/HASH --rounds 3 --sentences 300

There are two peers, both in fp32 with sentences sorted by length and 4,000 source tokens a batch, near their best:
`fairseq-generate`, by its own stopwatch, which is around the search alone, and tenko's Translator, fairseq's
SequenceGenerator without the attention weights that nobody reads: as fast in batches, faster a sentence at a time,
which `--max-tokens 1` gives to all, as a chat would. `--batch-size 32` gives fairseq-generate batches of 32 sentences.

All translate the same sentences, in turns (A B C D, A B C D), loading left out, subwords and back included (but for
fairseq-generate); a ratio is that of one round, the table has the median and range over rounds. Rates are source words
(by spaces) a second. `CPU` counts processor time instead of the clock's: where the two ratios differ much, others had
the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))
import option_types as types

from tenko.compression.container import artefact_file
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

PEERS = ("fairseq-generate, fp32", "tenko's Translator, fp32")

Contestant = Callable[[DecodeConfig], tuple[list[str], float, float]]
"""Translates the sentences: hypotheses, seconds and processor seconds."""


def in_this_process(engine: Engine, sources: list[str]) -> Contestant:
    """An engine that is loaded, warmed up."""
    engine.translate(sources[:50])

    def translate(decode: DecodeConfig) -> tuple[list[str], float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        hypotheses = engine.translate(sources, decode=decode)
        return hypotheses, time.perf_counter() - wall, time.process_time() - cpu

    return translate


def fairseq_generate(
    artefact: Path, sources: list[str], references: list[str], folder: Path, sentences: int | None
) -> Contestant:
    """The command, run anew each time in a process of its own; `sentences` a batch, or as the others."""
    folder.mkdir()
    script, data_bin = str(Path(__file__).with_name("fairseq_generate.py")), str(folder / "data-bin")
    texts = [folder / name for name in ("sources.txt", "references.txt")]
    for path, lines in zip(texts, (sources, references), strict=True):
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    subprocess.run([sys.executable, script, "write", str(artefact), *map(str, texts), data_bin], check=True)
    times = folder / "times.json"

    def translate(decode: DecodeConfig) -> tuple[list[str], float, float]:
        several = sentences if decode.max_tokens > 1 else 1
        batch = ["--batch-size", str(several)] if several else ["--max-tokens", str(decode.max_tokens)]
        options = ["--beam", str(decode.beam), "--lenpen", str(decode.length_penalty), *batch]
        options += ["--path", f"{data_bin}/model.pt", "--remove-bpe", "sentencepiece", "--cpu"]
        options += ["--max-len-a", "2", "--max-len-b", "20"]  # where the Translator cuts, too
        options += ["--required-batch-size-multiple", "1"]  # the default, 8, drops sentences
        command = [sys.executable, script, "run", str(times), data_bin, *options]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = {int(n): text for n, text in re.findall(r"^D-(\d+)\t\S+\t(.*)$", printed, re.MULTILINE)}
        spent = json.loads(times.read_text(encoding="utf-8"))
        return [found[index] for index in range(len(sources))], spent["seconds"], spent["cpu_seconds"]

    return translate


def contestants(
    artefact: Path, corpus: Corpus, folder: Path, candidates: list[int], sentences: int, batch_size: int | None
) -> tuple[dict[str, Contestant], list[str], list[str]]:
    """Contestants by name, the peers first; source sentences and references of the test split."""
    peer = Translator.load(artefact, threads=1)
    sides = dict(zip(("en", "cs"), corpus.text("test"), strict=True))
    sources, references = (sides[lang][:sentences] for lang in peer.direction.split("-"))
    found = {PEERS[0]: fairseq_generate(artefact, sources, references, folder / "fairseq", batch_size)}
    found[PEERS[1]] = in_this_process(peer, sources)
    for quantization in ("fp32", "int8"):
        path = export_ctranslate2(artefact, folder / quantization, quantization=quantization)
        found[f"CTranslate2, {quantization}"] = in_this_process(CTranslate2Translator(path, threads=1), sources)
    for count in candidates:
        mapped = vocabulary_map(corpus.split("train"), peer.direction, corpus.vocab_size, candidates=count)
        path = export_ctranslate2(artefact, folder / f"int8-{count}", vocabulary_map=mapped)
        name = f"CTranslate2, int8, map of {count}"
        found[name] = in_this_process(CTranslate2Translator(path, threads=1), sources)
    return found, sources, references


def measure(found: dict[str, Contestant], references: list[str], decode: DecodeConfig, rounds: int) -> dict[str, dict]:
    """Figures by contestant: BLEU, seconds and processor seconds of each round."""
    figures: dict[str, dict] = {name: {"seconds": [], "cpu_seconds": []} for name in found}
    for _ in range(rounds):
        for name, translate in found.items():
            hypotheses, seconds, cpu_seconds = translate(decode)
            figures[name]["seconds"].append(seconds)
            figures[name]["cpu_seconds"].append(cpu_seconds)
            figures[name]["bleu"] = corpus_bleu(hypotheses, references).score
    return figures


def _ratio(figures: dict[str, dict], peer: str, name: str, key: str) -> str:
    if peer == name:
        return "1"
    ratios = [theirs / own for theirs, own in zip(figures[peer][key], figures[name][key], strict=True)]
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def table(beam: int, figures: dict[str, dict], words: int) -> str:
    """Of one beam."""
    lines = [
        f"| beam {beam} | words/s | over fairseq-generate | by CPU time | over the Translator | by CPU time | BLEU |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in figures.items():
        rate = words / statistics.median(own["seconds"])
        ratios = [_ratio(figures, peer, name, key) for peer in PEERS for key in ("seconds", "cpu_seconds")]
        lines.append(f"| {name} | {rate:,.0f} | {' | '.join(ratios)} | {own['bleu']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--stage")
    parser.add_argument("--model", type=Path, help="an artefact's folder, in place of --run; needs --corpus")
    parser.add_argument("--corpus", type=Path, help="a prepared corpus")
    parser.add_argument("--beams", type=types.integer(1), nargs="+", default=[4, 1])
    parser.add_argument("--maps", type=types.integer(1), nargs="*", default=[24], help="candidates of a subword")
    parser.add_argument("--rounds", type=types.integer(1), default=5)
    parser.add_argument("--sentences", type=types.integer(1), default=1000)
    some = types.integer(1)
    parser.add_argument("--max-tokens", type=some, default=DecodeConfig.max_tokens, help="source tokens of a batch")
    parser.add_argument("--batch-size", type=some, help="sentences of a batch of fairseq-generate")
    parser.add_argument("--json", type=types.new_file, help="write the figures")
    options = parser.parse_args()
    if (options.run is None) == (options.model is None) or (options.model and not options.corpus):
        parser.error("give --run, or --model with --corpus")
    if options.stage and not options.run:
        parser.error("--stage: needs --run")
    try:
        run = RunDirectory.read(options.run) if options.run else None
        artefact = run.artefact(options.stage) if run else options.model
        artefact_file(artefact)
        corpus = Corpus.open(options.corpus) if options.corpus or run is None else corpus_of(run.recipe)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        found, sources, references = contestants(
            artefact, corpus, Path(folder), options.maps, options.sentences, options.batch_size
        )
        words = sum(len(line.split()) for line in sources)
        print(f"{artefact}: {len(sources)} sentences, {words:,} words, one thread, {options.rounds} rounds\n")
        results = {}
        for beam in options.beams:
            decode = DecodeConfig(beam=beam, max_tokens=options.max_tokens)
            results[beam] = measure(found, references, decode, options.rounds)
            print(table(beam, results[beam], words), end="\n\n", flush=True)
    if options.json:
        document = {"words": words, "sentences": len(sources), "beams": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
