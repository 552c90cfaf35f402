"""Which model a command or a recipe is given: one that ships with tenko, a folder, or a stage of a run."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path

from tenko.nmt import pretrained
from tenko.nmt.ctranslate2_engine import CARD
from tenko.nmt.engines import user_cache

from .recipe import Recipe
from .rundir import ARTEFACT, CONFIG, FAIRSEQ, RunDirectory
from .stage_kinds import PretrainedConfig

_ARTEFACT = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A model to translate with."""

    folder: Path
    """An artefact's folder, or that of an exported CTranslate2 model."""
    recipe: Recipe | None
    """Of the run; None without one."""
    stage: str | None
    """The stage's name; None without a run."""
    cache: Path | None
    """Where to keep it converted; None for its own folder."""

    @property
    def is_artefact(self) -> bool:
        """Whether it is an artefact; else it is exported already."""
        return not (self.folder / CARD).is_file()


def choose(model: str | None, run_dir: Path | None, stage: str | None, *, exported: bool = True) -> Chosen:
    """The model that a command's MODEL, or --run and --stage, mean; with `exported` False never an export by default.

    Raises:
        ValueError: neither or both are given, or there is no such model; names what is valid.
    """
    shipped = pretrained.pretrained()
    if (model is None) == (run_dir is None):
        names = " or ".join(shipped) or "a folder"
        what = "both are given" if model else "neither is given"
        raise ValueError(f"give MODEL ({names}, for instance) or --run DIR: {what}")
    if run_dir is not None:
        state = RunDirectory.read(run_dir)
        artefact = state.artefact(stage, exported=exported)
        name = state.find_stage(stage, exported=exported).name.partition("-")[2]
        return Chosen(folder=artefact, recipe=state.recipe, stage=name, cache=None)
    assert model is not None
    if stage is not None:
        raise ValueError("--stage: needs --run; a MODEL has no stages")
    if model in shipped:
        return Chosen(folder=pretrained.path(model), recipe=None, stage=None, cache=user_cache())
    folder = Path(model)
    if (folder / CARD).is_file() or any(folder.glob(f"{_ARTEFACT}*")):
        return Chosen(folder=folder, recipe=None, stage=None, cache=None)
    if (folder / ARTEFACT).is_dir():  # a stage of a run, which has a config.yaml as well
        raise ValueError(f"{model}: is the folder of a stage; give its artefact, {folder / ARTEFACT}")
    if (folder / FAIRSEQ).is_file():
        raise ValueError(f"{model}: is a checkpoint for fairseq-generate; give the artefact that it was exported from")
    if folder.is_file() and folder.name.startswith(_ARTEFACT):
        raise ValueError(f"{model}: is a file; give its folder, {folder.parent}")
    if (folder / CONFIG).is_file():
        raise ValueError(f"{model}: is a run directory; give it as --run {model}")
    valid = ", ".join([*shipped, "the folder of an artefact or of a CTranslate2 model"])
    raise ValueError(f"{model}: no such model; valid: {valid}")


def pretrained_folder(config: PretrainedConfig, direction: str) -> Path:
    """The artefact's folder that a stage `pretrained` names: one that ships with tenko, or the user's own.

    Raises:
        ValueError: no such model; names those that ship.
    """
    name = config.model or direction
    if name in pretrained.pretrained():
        return pretrained.path(name)
    if not Path(name).is_dir():
        valid = ", ".join([*pretrained.pretrained(), "the folder of an artefact"])
        raise ValueError(f"pretrained.model: {name}: no such model; valid: {valid}")
    return Path(name)


def began_with_another(run: RunDirectory) -> Path | None:
    """The folder that a run's stage `pretrained` names, if it holds another model now than the finished stage took."""
    config = run.recipe.stages[0].config
    taken = run.stage_directory(0) / ARTEFACT
    if not isinstance(config, PretrainedConfig) or not run.is_finished(0) or not taken.is_dir():
        return None
    try:
        folder = pretrained_folder(config, run.recipe.direction)
    except ValueError:
        return None  # gone since; the run has its copy
    for file in folder.glob(f"{_ARTEFACT}*"):
        copy = taken / file.name
        if not copy.is_file() or not filecmp.cmp(file, copy, shallow=False):
            return folder
    return None
