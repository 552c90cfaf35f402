"""The run directory: who may write it, what is finished, what a stage is told.

    runs/NAME/config.yaml       the resolved recipe; a later run of the directory must agree with it
    runs/NAME/corpus.json       what the corpus was made of that it began with; a later one must be the same
    runs/NAME/lock              held while a run is on (flock, so that a killed run leaves no stale lock)
    runs/NAME/report.html       curves, table of stages, sample translations
    runs/NAME/logs/             what workers wrote, one file each
    runs/NAME/taught/           what teachers translated, where a stage learns from it (taught.py)
    runs/NAME/1-train/          config.yaml metrics.jsonl checkpoints/ artefact/ report.html, and last result.json

A stage with a result.json is finished and left alone; without one it resumes. A damaged one is neither: whoever asks
which stages are finished is told.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tenko.nmt.config import TrainConfig

from .files import read_json, read_text, write_text_atomic
from .recipe import Recipe, StageSpec, config_to_dict, dump, dump_plain, loads, to_dict
from .settings import join

if TYPE_CHECKING:
    from .job import Job
    from .progress import Reporter

CONFIG, CORPUS, LOCK, REPORT, LOGS = "config.yaml", "corpus.json", "lock", "report.html", "logs"
RESULT, METRICS, ARTEFACT, CHECKPOINTS = "result.json", "metrics.jsonl", "artefact", "checkpoints"
FAIRSEQ = "model.pt"
"""What an export for fairseq leaves in the place of an artefact (nmt/export.py)."""
FREE = ("threads", "hang_timeout", "profile", "workers")
"""Settings that may be others when a run goes on, wherever they stand in the recipe: they change none of its results.
Other workers change the last bits (a training that has begun keeps its global batch), and are allowed all the same."""
_FIGURES = ("bleu", "chrf", "artefact_bytes", "tokens_per_second", "seconds")
"""Of a result.json, what the table of stages formats as numbers; a stage may lack some."""
_CHECKPOINT = re.compile(r"update-\d+")


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a stage is given. All ranks get equal ones, but for `job`, and the reporter, which only speaks on rank 0."""

    recipe: Recipe
    """The whole recipe."""
    stage: StageSpec
    """This stage: kind, name, config."""
    directory: Path
    """The stage's own folder; exists, with its config.yaml."""
    previous: Path | None
    """Folder of the stage before, finished; None for the first."""
    run_dir: Path
    """The run directory."""
    reporter: Reporter
    """Progress and log lines."""
    job: Job
    """This process among the others."""
    resume: bool
    """Whether an earlier run left checkpoints of this stage to go on from; the same on all ranks. A stage that begins
    anew (False) must still call `MetricsLog.truncate_after(0)`: a run cut before its first checkpoint left lines."""

    @property
    def artefact(self) -> Path:
        """Folder of the stage's artefact."""
        return self.directory / ARTEFACT

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.directory / CHECKPOINTS

    @property
    def metrics_path(self) -> Path:
        """The stage's metrics.jsonl."""
        return self.directory / METRICS

    @property
    def result_path(self) -> Path:
        """The stage's result.json: written last, by rank 0, with `files.write_json_atomic`."""
        return self.directory / RESULT


class RunDirectory:
    """A run directory and the recipe in it."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe

    @classmethod
    def read(cls, path: Path) -> RunDirectory:
        """An existing run directory, to look at.

        Raises:
            ValueError: it is none, or its config.yaml is damaged.
        """
        config = path / CONFIG
        _refuse_stage(path)
        if not config.is_file():
            what = f"has no {CONFIG}" if path.is_dir() else "is a file" if path.exists() else "does not exist"
            raise ValueError(f"{path}: {what}; give the run directory of a `tenko run`, for instance runs/demo")
        return cls(path, loads(read_text(config), str(config)))

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDirectory:
        """Make the directory, or go on with one whose recipe agrees. The caller holds its `RunLock`.

        A recipe may differ in `FREE`, and may have more stages at the end; where nothing was trained yet (a file was
        misnamed, for instance) it may be any other.

        Raises:
            ValueError: it belongs to another recipe; names the first key that differs, and both values.
            OSError: it cannot be written.
        """
        config = path / CONFIG
        old = cls.hold(path, recipe)
        if old is not None and first_difference(to_dict(old), to_dict(recipe)) is not None:
            for index in range(len(old.stages)):
                shutil.rmtree(cls(path, old).stage_directory(index), ignore_errors=True)
        text = dump(recipe)
        if not config.exists() or config.read_text(encoding="utf-8") != text:
            write_text_atomic(config, text)
        return cls(path, recipe)

    @classmethod
    def hold(cls, path: Path, recipe: Recipe) -> Recipe | None:
        """Hold a recipe to the run directory that it is for, writing nothing.

        Returns:
            The recipe that is there; None where there is no run yet.

        Raises:
            ValueError: as `create`.
        """
        config = path / CONFIG
        _refuse_stage(path)
        if not config.exists():
            return None
        try:
            old = loads(read_text(config), str(config))
        except ValueError as error:
            raise ValueError(f"{error}; {_other(path)}") from None
        difference = first_difference(to_dict(old), to_dict(recipe))
        if difference is not None and not is_blank(path):
            key, before, now = difference
            raise ValueError(f"{path}: began with {key}: {before}, the recipe now says {now}; {_other(path)}")
        return old

    def stage_directory(self, index: int) -> Path:
        """Folder of the stage of that index, counted from 0."""
        return self.path / f"{index + 1}-{self.recipe.stages[index].name}"

    def is_finished(self, index: int) -> bool:
        """Whether that stage is done, by its result.json being there; `result` checks what is in it."""
        return (self.stage_directory(index) / RESULT).is_file()

    def result(self, index: int) -> dict[str, Any] | None:
        """The figures of that stage, or None if it is not finished.

        Raises:
            ValueError: its result.json is damaged: no JSON, or not what the table of stages needs.
        """
        if not self.is_finished(index):
            return None
        path = self.stage_directory(index) / RESULT
        try:
            result = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; {_ANEW}") from None
        if (flaw := _flaw(result)) is not None:
            raise ValueError(f"{path}: damaged: {flaw}; {_ANEW}")
        assert isinstance(result, dict)
        return result

    def training_before(self, index: int) -> int:
        """Index of the last stage train before the stage of that index, whose model a lottery prunes."""
        return max(i for i, spec in enumerate(self.recipe.stages[:index]) if isinstance(spec.config, TrainConfig))

    def find_stage(self, name: str | None, *, exported: bool = True) -> Path:
        """Folder of a finished stage; the last finished one that tenko can translate with when `name` is None, with
        `exported` False the last one that is no export.

        Raises:
            ValueError: no such stage, or not finished; names those that are.
        """
        finished = {spec.name: i for i, spec in enumerate(self.recipe.stages) if self.is_finished(i)}
        if not finished:
            raise ValueError(f"{self.path}: no stage is finished yet; `tenko run` goes on with it")
        if name is None:
            stages = self.recipe.stages
            own = [
                i
                for i in finished.values()
                if stages[i].kind != "export" or (exported and stages[i].config.format != "fairseq")  # type: ignore[union-attr]
            ]
            return self.stage_directory(max(own or finished.values()))
        if name not in finished:
            known = any(spec.name == name for spec in self.recipe.stages)
            what = f"stage {name} is not finished" if known else f"no stage {name}"
            raise ValueError(f"--stage: {what} in {self.path}; finished: {', '.join(finished)}")
        return self.stage_directory(finished[name])

    def artefact(self, name: str | None, *, exported: bool = True) -> Path:
        """Folder of a finished stage's artefact. Raises: ValueError as `find_stage`, or when it is gone."""
        artefact = self.find_stage(name, exported=exported) / ARTEFACT
        if not artefact.is_dir():
            raise ValueError(f"{artefact}: missing; delete {artefact.parent / RESULT} and run again to rebuild it")
        if name is not None and (artefact / FAIRSEQ).is_file():
            others = [spec.name for spec in self.recipe.stages if getattr(spec.config, "format", "") != "fairseq"]
            raise ValueError(f"--stage: {name} is a checkpoint for fairseq-generate; valid: {', '.join(others)}")
        return artefact

    def is_begun(self, index: int) -> bool:
        """Whether an earlier run has left checkpoints of that stage, under the names of `nmt/checkpoint.py`."""
        checkpoints = self.stage_directory(index) / CHECKPOINTS
        return checkpoints.is_dir() and any(_CHECKPOINT.fullmatch(path.name) for path in checkpoints.iterdir())

    def first_unfinished(self) -> int:
        """Index of the first stage without a result; the number of stages when all are finished.

        Raises:
            ValueError: a result.json before it is damaged.
        """
        count = len(self.recipe.stages)
        return next((index for index in range(count) if self.result(index) is None), count)

    def context(
        self, index: int, reporter: Reporter, *, writer: bool, resume: bool, job: Job | None = None
    ) -> StageContext:
        """What the stage of that index is given; with `writer` (rank 0) its folder is made ready."""
        from .job import Job

        spec, directory = self.recipe.stages[index], self.stage_directory(index)
        if writer:
            directory.mkdir(parents=True, exist_ok=True)
            if not (directory / CONFIG).exists():
                write_text_atomic(directory / CONFIG, dump_plain({spec.kind: config_to_dict(spec.config)}))
            for path in directory.glob(".*.tmp"):  # left by a run that was killed while it wrote
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return StageContext(
            recipe=self.recipe,
            stage=spec,
            directory=directory,
            previous=self.stage_directory(index - 1) if index else None,
            run_dir=self.path,
            reporter=reporter,
            job=job or Job(),
            resume=resume,
        )


class RunLock:
    """Holds a run directory for one run at a time; a context manager.

    Raises (on entering):
        ValueError: another run holds it; names its process and host.
        OSError: the directory cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.holder = ""
        """What stands in the lock: process, host, and a word that is this run's alone."""
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        check_place(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process, _, host = os.read(file, 256).decode(errors="replace").strip().partition(" ")
            os.close(file)
            who = f"process {process}" if process else "another process"
            where = f" on {host.split()[0]}" if host else ""
            raise ValueError(
                f"{self.path}: {who} is running it{where}; wait for it or choose another --run-dir"
            ) from None
        self.holder = f"{os.getpid()} {socket.gethostname()} {secrets.token_hex(8)}"
        os.ftruncate(file, 0)
        os.pwrite(file, f"{self.holder}\n".encode(), 0)
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        os.ftruncate(self._file, 0)
        os.close(self._file)  # releases the lock; the file stays, as removing it would race with the next holder
        self._file = None


def is_shared(path: Path, holder: str, seconds: float = 10.0) -> bool:
    """Whether a run directory is here the one in which another machine's `RunLock` wrote `holder`.

    Args:
        seconds: how long the machine's file system may take to show it.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if (path / LOCK).read_text(encoding="utf-8").strip() == holder:
                return True
        except OSError:  # it does not show the file yet
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first setting in which two resolved recipes differ, as (key, old, new); None if they agree.

    What is in `FREE` may differ, and `new` may have more stages at the end.
    """
    common = [*new["stages"][: len(old["stages"])]]
    return _difference(old, {**new, "stages": common}, "")


def _difference(old: Any, new: Any, path: str) -> tuple[str, str, str] | None:
    if path.rpartition(".")[2] in FREE:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _difference(old.get(key, "(nothing)"), new.get(key, "(nothing)"), join(path, key))
            if found:
                return found
        return None
    if path == "stages" and (was := _stage_names(old)) != (now := _stage_names(new)):
        return path, was, now
    if path == "stages":
        for index, (was, now) in enumerate(zip(old, new, strict=True)):
            found = _difference(was, now, f"stages[{index}]")
            if found:
                key = re.sub(r"^stages\[\d+\]\.(?=.*\.)", "", found[0])  # as an override names it: train.lr
                return key, found[1], found[2]
        return None
    return None if old == new else (path, str(old), str(new))


def _stage_names(stages: list[dict[str, Any]]) -> str:
    """`[train, quantize]`; a stage with a name of its own as `name (kind)`."""
    kinds = [next(key for key in stage if key != "name") for stage in stages]
    named = zip(kinds, (stage.get("name") for stage in stages), strict=True)
    return f"[{', '.join(f'{name} ({kind})' if name else kind for kind, name in named)}]"


def _refuse_stage(path: Path) -> None:
    """Raises: ValueError: the path is a stage's folder within a run directory, and holds that stage's own settings."""
    if re.fullmatch(r"\d+-.+", path.name) and (path / CONFIG).is_file() and (path.parent / CONFIG).is_file():
        raise ValueError(f"{path}: is the folder of a stage; give the run directory, {path.parent}")


def is_blank(path: Path) -> bool:
    """Whether a run directory holds nothing but settings and logs: nothing was trained."""
    files = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    return all(file.name == CONFIG or file.parts[0] in (CORPUS, LOCK, LOGS) for file in files)


def check_place(path: Path) -> None:
    """Hold a path to what a run directory may be: a run's, an empty folder, or nothing yet.

    Raises:
        ValueError: it is a file, or a folder of something else.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file, a run directory is needed; choose another --run-dir")
    if path.is_dir() and not (path / CONFIG).exists():
        strange = sorted(p.name for p in path.iterdir() if p.name not in (LOCK, LOGS))
        strange = [name for name in strange if not name.endswith(".tmp")]
        if strange:
            raise ValueError(f"{path}: holds {strange[0]} but no run; choose another --run-dir")


def _flaw(result: Any) -> str | None:
    """Why a result.json can't be shown in the table of stages; None if it can."""
    if not isinstance(result, dict):
        return "not an object"
    if not result.keys() & {"stage", *_FIGURES}:
        return f"holds none of stage, {', '.join(_FIGURES)}"
    wire, samples = result.get("wire") or {}, result.get("samples") or []
    if not isinstance(wire, dict):
        return "wire is no object"
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        return "samples is no list of objects"
    figures = {key: result.get(key) for key in _FIGURES}
    figures |= {f"wire.{key}": wire.get(key) for key in ("bytes_sent", "fp32_bytes")}
    figures["sentences"] = result.get("sentences")
    wrong = [key for key, value in figures.items() if not isinstance(value, int | float | None)]
    return f"{wrong[0]} is no number" if wrong else None


_ANEW = "delete it and run again"


def _other(path: Path) -> str:
    return f"choose another --run-dir, or delete {path} to begin anew"
