"""Put a finished run's model into the package: `python -m tenko.launch.ship RUN_DIR`, for those who release tenko.

nmt/models/en-cs/model.safetensors[.zst]  spm.model  dict.txt     the stage's artefact
                 vocabulary_map.npz                               with --vocabulary-map
                 model.json                                       where it is from, and how well it translates
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tenko.nmt import pretrained
from tenko.nmt.ctranslate2_engine import CARD as EXPORTED
from tenko.nmt.vocabulary_map import FILE as MAP
from tenko.nmt.vocabulary_map import VocabularyMap

from .errors import BAD_INPUT, is_users, one_line
from .files import write_json_atomic
from .recipe import to_dict
from .rundir import RunDirectory

LIMIT = 5_000_000
"""Bytes that a shipped model may have, all its files together."""
LICENCE = (
    "The weights were trained on the embedded corpus; its sources, their licences and attributions are in "
    "tenko/nmt/embedded/ATTRIBUTIONS.md, which a copy of the model must carry."
)
_FIGURES = ("bleu", "chrf", "bleu_signature", "chrf_signature", "sentences", "artefact_bytes", "parameters")


def ship(run_dir: Path, *, stage: str | None = None, commit: str, vocabulary_map: VocabularyMap | None = None) -> Path:
    """Copy a stage's artefact into `pretrained.MODELS`, over an older model of its direction.

    Args:
        run_dir: a run directory.
        stage: name of a finished stage; None takes the last one.
        commit: of tenko, that the model was trained with.
        vocabulary_map: makes CTranslate2 faster; None ships none.

    Returns:
        the model's folder.

    Raises:
        ValueError: there is no such stage, it wasn't trained on the embedded corpus, or the model is too large.
    """
    state = RunDirectory.read(run_dir)
    artefact, recipe = state.artefact(stage), state.recipe
    if (artefact / EXPORTED).is_file():
        raise ValueError(f"{artefact}: is exported; give --stage with the name of a stage before it")
    if recipe.data.train != "embedded":
        raise ValueError(f"{run_dir}: data.train must be embedded, whose licences ship too, is {recipe.data.train}")
    folders = [state.stage_directory(index) for index in range(len(recipe.stages))]
    results = [state.result(index) or {} for index in range(folders.index(artefact.parent) + 1)]
    target = pretrained.MODELS / recipe.direction
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for file in sorted(artefact.iterdir()):
            if file.is_file() and file.name != MAP:
                shutil.copyfile(file, beside / file.name)
        if vocabulary_map is not None:
            vocabulary_map.save(beside / MAP)
        card = {
            "direction": recipe.direction,
            "commit": commit,
            "stage": artefact.parent.name,
            "updates": sum(result.get("updates", 0) for result in results),
            **{key: results[-1][key] for key in _FIGURES if key in results[-1]},
            "licence": LICENCE,
            "recipe": to_dict(recipe),
        }
        write_json_atomic(beside / pretrained.CARD, card)
        size = sum(file.stat().st_size for file in beside.iterdir())
        if size > LIMIT:
            raise ValueError(
                f"{artefact}: {size:,} bytes with its subwords, more than the {LIMIT:,} of a shipped model"
            )
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def main(arguments: list[str] | None = None) -> None:
    """The command; a user's error is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m tenko.launch.ship", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", help="default: the last finished one")
    parser.add_argument("--commit", help="that it was trained with; default: this checkout's")
    parser.add_argument("--vocabulary-map", action="store_true", help="estimate one from the run's corpus")
    options = parser.parse_args(arguments)
    try:
        commit = options.commit or _head()
        mapped = None
        if options.vocabulary_map:
            from tenko.nmt.vocabulary_map import vocabulary_map

            from .stage_tools import corpus_of

            recipe = RunDirectory.read(options.run_dir).recipe
            corpus = corpus_of(recipe)
            mapped = vocabulary_map(corpus.split("train"), recipe.direction, corpus.vocab_size)
        print(ship(options.run_dir, stage=options.stage, commit=commit, vocabulary_map=mapped))
    except (ValueError, OSError) as error:
        if not is_users(error):
            raise
        print(f"tenko: error: {one_line(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _head() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError("--commit: give it; this tenko is no git checkout")
    return found.stdout.strip()


if __name__ == "__main__":
    main()
