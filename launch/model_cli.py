"""The command line of what takes a model; what it does is in `commands.py` and `inspect_command.py`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where to translate."""

    cpu = "cpu"
    cuda = "cuda"


class ExportFormat(StrEnum):
    """What to export to."""

    ctranslate2 = "ctranslate2"
    fairseq = "fairseq"


class Engine(StrEnum):
    """What translates."""

    ctranslate2 = "ctranslate2"
    fairseq = "fairseq"


class Quantization(StrEnum):
    """Type of the weights in an exported model."""

    int8 = "int8"
    int16 = "int16"
    fp32 = "fp32"


RunDir = Annotated[Path, typer.Option("--run", metavar="DIR", help="Run directory, for instance runs/demo.")]
Stage = Annotated[
    str | None, typer.Option(metavar="NAME", help="The stage whose artefact to take.", show_default="the last finished")
]
Beam = Annotated[
    int | None, typer.Option(min=1, help="Hypotheses of beam search; 1 is greedy.", show_default="the recipe's")
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        help="Exponent of the length that scores are divided by, -50 to 50; above 1 favours long translations.",
        show_default="the recipe's",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
Where = Annotated[Device, typer.Option(help="Where to translate.")]
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A model that ships with tenko (en-cs, cs-en), or the folder of an artefact or of an exported "
        "CTranslate2 model; or give --run.",
        show_default=False,
    ),
]
RunInstead = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run directory, for instance runs/demo.", show_default=False),
]


def translate(
    model: Model = None,
    run_dir: RunInstead = None,
    stage: Stage = None,
    beam: Beam = None,
    length_penalty: LengthPenalty = None,
    threads: Threads = None,
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="Program: ctranslate2 is several times as fast, with weights of 8 bits.",
            show_default="ctranslate2, on a GPU fairseq",
        ),
    ] = None,
    device: Where = Device.cpu,
) -> None:
    """Translate stdin to stdout, one sentence a line.

    The direction is the model's. Lines come out in order, an empty line for an empty line. Of a line of more than 1,000
    subwords the rest is left out, and a warning says so.

    \b
    echo "The file could not be opened." | tenko translate en-cs
    tenko translate --run runs/demo --stage quant_noise --beam 1 < in.txt > out.txt
    """
    from . import commands

    commands.translate(model, run_dir, stage, beam, length_penalty, threads, engine and engine.value, device.value)


def evaluate(
    test: Annotated[
        Path,
        typer.Option(metavar="FILE.tsv", help="Test pairs: first column English, second Czech; may be .gz .xz .zst."),
    ],
    model: Model = None,
    run_dir: RunInstead = None,
    stage: Stage = None,
    beam: Beam = None,
    length_penalty: LengthPenalty = None,
    threads: Threads = None,
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="Program: ctranslate2 converts the weights to 8 bits, fairseq takes them as they are.",
            show_default="fairseq",
        ),
    ] = None,
    device: Where = Device.cpu,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """BLEU and chrF of a model on a test set, with sacreBLEU's signatures.

    Text is normalised as a run normalises its own test split; pairs with an empty side are left out. Of a source of
    more than 1,000 subwords the rest is left out, and a warning says so.

    \b
    tenko evaluate --run runs/demo --test my-test.tsv
    tenko evaluate --run runs/demo --test my-test.tsv --stage quant_noise --json
    tenko evaluate en-cs --test my-test.tsv --engine ctranslate2 --threads 1
    """
    from . import commands

    program = engine and engine.value
    commands.evaluate(model, run_dir, test, stage, beam, length_penalty, threads, program, device.value, as_json=json)


def export(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    model: Model = None,
    run_dir: RunInstead = None,
    format: Annotated[ExportFormat, typer.Option(help="Program to write for.")] = ExportFormat.fairseq,
    quantization: Annotated[
        Quantization | None, typer.Option(help="ctranslate2: type of the weights.", show_default="int8")
    ] = None,
    vocabulary_map: Annotated[
        bool,
        typer.Option(
            "--vocabulary-map",
            help="ctranslate2: estimate from the run's corpus which subwords translate which, and let it leave out "
            "the others: faster, at some tenths of BLEU.",
        ),
    ] = False,
    stage: Stage = None,
) -> None:
    """Write a model for another program, packed weights decoded.

    `--format ctranslate2` writes a folder that `tenko translate` and CTranslate2 read; `--format fairseq` writes a
    fairseq checkpoint with its dictionaries.

    \b
    tenko export --run runs/scratch --format ctranslate2 --out exported
    tenko translate exported < in.txt > out.txt
    tenko export --run runs/scratch --format fairseq --out checkpoint
    """
    from . import commands

    commands.export(
        model, run_dir, out, format.value, quantization and quantization.value, stage, vocabulary_map=vocabulary_map
    )


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model that ships with tenko (en-cs, cs-en), a model file, or an artefact's folder; or give --run.",
            show_default=False,
        ),
    ] = None,
    run_dir: RunInstead = None,
    stage: Stage = None,
    every: Annotated[bool, typer.Option("--all", help="A row for every tensor, not one for layers alike.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """The tensors of a model file: scheme, shape, bits an element, and bytes that add up to the file's size.

    \b
    tenko inspect en-cs
    tenko inspect --run runs/scratch
    tenko inspect runs/scratch/2-quantize/artefact/model.safetensors --all
    """
    from .inspect_command import inspect as show

    show(model, run_dir, stage, all_tensors=every, as_json=json)
