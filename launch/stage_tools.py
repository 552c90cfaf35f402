"""What every kind of stage is made of: device and ranks, corpus, the model before, a training, an artefact measured.

A stage may train several times (rounds of a lottery, groups of a product quantization). Each training has a folder of
its own, with checkpoints and metrics, resumes from there, and leaves neither DDP nor route on the model behind it.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenko.comm import Route, make_route, register
from tenko.compression import Technique, artefact_bytes, read_artefact, write_artefact
from tenko.compression.config import IpqConfig, LotteryConfig, QuantizeConfig
from tenko.compression.noise import select_noisy
from tenko.compression.pq import select_blocks
from tenko.compression.pruning import prunable
from tenko.nmt import checkpoint, distributed
from tenko.nmt.batches import UpdateStream
from tenko.nmt.config import DecodeConfig, ModelConfig, TrainConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.deepspeed_engine import ZeroEngine, plugin
from tenko.nmt.engines import Engine
from tenko.nmt.fairseq_bridge import build_model
from tenko.nmt.prepare import prepare
from tenko.nmt.trainer import Trainer, load_weights
from tenko.nmt.translate import Translator
from tenko.nmt.validate import Validator

from .files import write_json_atomic, write_text_atomic
from .metrics import MetricsLog
from .recipe import Recipe
from .rundir import ARTEFACT, CHECKPOINTS, METRICS, StageContext
from .stage_kinds import PretrainedConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLES = 8
"""Translations of unseen sentences kept in a result."""
HYPOTHESES = "hypotheses.txt"
"""The artefact's translations of the test split, beside result.json: for paired tests of significance."""
PATIENCE = timedelta(hours=6)
"""How long ranks wait for rank 0 while it prepares a corpus or translates a test set."""


def start(context: StageContext, config: TrainConfig | None = None) -> Accelerator:
    """Device, process group and trackers; accelerate's own precision stays off (see nmt/precision.py).

    Args:
        context: the stage.
        config: of its training, for engine and trackers; None where nothing is trained.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    config = config or TrainConfig()
    zero = _uses_zero(config)
    if config.engine == "deepspeed" and not zero:
        context.reporter.log("engine: deepspeed has nothing to split with one worker, and is ignored")
    try:
        accelerator = Accelerator(
            cpu=not zero and not torch.cuda.is_available(),  # with cpu=True accelerate ignores DeepSpeed
            deepspeed_plugin=plugin(config.zero_stage, config.clip_norm) if zero else None,
            mixed_precision="no",
            log_with=list(config.trackers) or None,
            project_dir=str(context.directory),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ImportError as error:  # a tracker named in the recipe is not installed
        raise ValueError(f"train.trackers: {error}") from None
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    assert distributed.world_size() == expected, f"world size {distributed.world_size()}, launched as {expected}"
    if config.trackers:
        accelerator.init_trackers(context.recipe.name)
    return accelerator


def open_corpus(context: StageContext) -> Corpus:
    """The prepared corpus: rank 0 builds or finds it, the others open what it names.

    A recipe that begins with a pretrained model takes that model's subwords.
    """
    path = None
    if distributed.rank() == 0:
        path = str(corpus_of(context.recipe, report=context.reporter.log).path)
    path = distributed.gather_json(path, "cuda" if torch.cuda.is_available() else "cpu")[0]
    return Corpus.open(Path(path))


def corpus_of(recipe: Recipe, report: Callable[[str], None] = lambda line: None) -> Corpus:
    """The recipe's prepared corpus, in this process alone; built if it is not there."""
    data, first = recipe.data, recipe.stages[0].config
    if isinstance(first, PretrainedConfig) and data.subwords is None:
        subwords = pretrained_folder(first, recipe.direction) / "spm.model"
        data = dataclasses.replace(data, subwords=str(subwords))
    return prepare(data, report=report)


def pretrained_folder(config: PretrainedConfig, direction: str) -> Path:
    """The artefact's folder that the settings name: one that ships with tenko, or the user's own.

    Raises:
        ValueError: no such model; names those that ship.
    """
    from tenko.nmt import pretrained

    name = config.model or direction
    return Path(name) if Path(name).is_dir() else pretrained.path(name)


def read_model(folder: Path) -> tuple[nn.Module, ModelConfig]:
    """The model of an artefact's folder, dense, on the CPU, and its settings.

    Raises:
        ValueError: a file is missing, damaged, or holds another model; the message names it.
    """
    state, metadata = read_artefact(folder)
    config = ModelConfig(**metadata["model"])
    model = build_model(config, folder / "dict.txt")
    model.load_state_dict(state, strict=True)
    return model, config


def previous_model(context: StageContext) -> tuple[nn.Module, ModelConfig]:
    """The model that the stage before has left: its artefact, read back from disk."""
    assert context.previous is not None, "the recipe checks that this stage follows another"
    context.reporter.log(f"{context.stage.name}: from {context.previous}")
    return read_model(context.previous / ARTEFACT)


def check_patterns(context: StageContext, model: nn.Module) -> None:
    """Hold the patterns of this stage and of those after it to the model, before anything is trained.

    Raises:
        ValueError: one matches no weight, or a block divides no weight's columns; names stage and key.
    """
    stages = context.recipe.stages
    for spec in stages[stages.index(context.stage) :]:
        config: Any = spec.config
        try:
            if isinstance(config, LotteryConfig):
                prunable(model, config.include, config.exclude, embeddings=config.embeddings)
            elif isinstance(config, IpqConfig):
                select_blocks(model, config.include, config.exclude, config.blocks)
            elif isinstance(config, QuantizeConfig) and config.scheme in ("pq", "pq_int8"):
                select_blocks(model, config.include, config.exclude, config.pq.blocks, "pq.blocks")
            elif isinstance(config, QuantizeConfig):
                select_noisy(model, config)
        except ValueError as error:
            raise ValueError(f"{spec.name}.{error}") from None


def decode_config(context: StageContext) -> DecodeConfig:
    """Beam search as the recipe's first training validates with."""
    configs = [getattr(spec.config, "train", spec.config) for spec in context.recipe.stages]
    return next((config.decode for config in configs if isinstance(config, TrainConfig)), DecodeConfig())


@dataclass(frozen=True)
class Trained:
    """What a training came to; the weights are in the model."""

    updates: int
    seconds: float
    """In updates; validations and checkpoints left out."""
    precision: str
    valid_bleu: float
    """The best of its validations."""
    wire: dict[str, int] | None
    """Bytes this rank sent, and would have sent in fp32; None in a single process."""

    def figures(self) -> dict[str, Any]:
        """As they stand in result.json."""
        return {
            "updates": self.updates,
            "train_seconds": self.seconds,
            "precision": self.precision,
            "valid_bleu": self.valid_bleu,
            "wire": self.wire,
        }


def train_model(
    context: StageContext,
    accelerator: Accelerator,
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    title: str | None = None,
    seed: int | None = None,
    techniques: Sequence[Technique] = (),
    teacher: nn.Module | None = None,
    begin: Callable[[Trainer], None] = lambda trainer: None,
) -> Trained:
    """Train to the end, or go on from the folder's newest checkpoint; called on every rank.

    The model then holds the final weights (the average or the best, as `config` says), techniques still attached.

    Args:
        context: the stage.
        accelerator: of `start`.
        model: on the accelerator's device, techniques attached.
        corpus: trained on, and validated on.
        config: of this training.
        folder: of checkpoints and metrics; the stage's own by default. Each training needs another.
        title: of the progress bar; the stage's name by default.
        seed: of order and dropout; the recipe's by default.
        techniques: told before and after each update.
        teacher: frozen, on the same device; see `TrainConfig.distill`.
        begin: called once with the trainer when nothing is resumed, for instance to rewind it.
    """
    folder, title = folder or context.directory, title or context.stage.name
    seed = context.recipe.seed if seed is None else seed
    stream = UpdateStream(
        corpus.split("train"),
        context.recipe.direction,
        seed=seed,
        max_tokens=config.max_tokens,
        update_freq=config.update_freq,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    trainer = Trainer(
        model,
        stream,
        config,
        seed=seed,
        checkpoints=folder / CHECKPOINTS,
        wrap=lambda module: _distribute(accelerator, module, context),
        engine=partial(ZeroEngine, accelerator) if _uses_zero(config) else None,
        techniques=techniques,
        teacher=teacher,
    )
    if _begun(folder):
        trainer.resume()
    else:
        begin(trainer)
    _run(context, config, corpus, trainer, accelerator, folder, title)
    weights = _final_weights(context, config, folder / CHECKPOINTS)
    load_weights(trainer.parameters, weights, folder / CHECKPOINTS)
    meter = trainer.route.meter if trainer.route is not None else None
    wire = None if meter is None else {key: getattr(meter, key) for key in _WIRE}
    trained = Trained(trainer.updates, trainer.seconds, trainer.precision, trainer.best.bleu, wire)
    distributed.barrier()
    if trainer.route is not None:
        trainer.route.close()
    if accelerator.trackers:
        accelerator.end_training()
    # A model can be in one DDP at a time: the next training of this stage wraps it anew.
    del trainer
    accelerator.free_memory()
    gc.collect()
    return trained


_WIRE = ("bytes_sent", "fp32_bytes", "up_bytes", "down_bytes")


def _uses_zero(config: TrainConfig) -> bool:
    return config.engine == "deepspeed" and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _begun(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from, as rank 0 sees it."""
    mine = bool(checkpoint.list_updates(folder / CHECKPOINTS))
    return bool(distributed.gather_json(mine, "cuda" if torch.cuda.is_available() else "cpu")[0])


def _distribute(accelerator: Accelerator, module: nn.Module, context: StageContext) -> tuple[nn.Module, Route | None]:
    """DDP with the recipe's route; a single process keeps the module as it is."""
    if distributed.world_size() == 1:
        return module, None
    wrapped = accelerator.prepare(module)
    return wrapped, register(wrapped, make_route(context.recipe.comm, context.recipe.seed))


def _run(
    context: StageContext,
    config: TrainConfig,
    corpus: Corpus,
    trainer: Trainer,
    accelerator: Accelerator,
    folder: Path,
    title: str,
) -> None:
    reporter = context.reporter
    log = MetricsLog(folder / METRICS) if distributed.rank() == 0 else None
    if log is not None:
        log.truncate_after(trainer.updates)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        reporter.log(
            f"{title}: {parameters / 1e6:.2f}M parameters, {trainer.precision} on {trainer.device}, "
            f"{distributed.world_size()} workers, {trainer.stream.batches_per_epoch} batches an epoch"
            + (f", goes on from update {trainer.updates}" if trainer.updates else "")
        )
    reporter.start(title, config.max_update, trainer.updates)

    def on_metrics(figures: dict[str, Any]) -> None:
        if log is None:
            return
        log.append(figures)
        if config.trackers:
            numbers = {f"{figures['kind']}/{k}": v for k, v in figures.items() if isinstance(v, int | float)}
            accelerator.log(numbers, step=figures["update"])
        if figures["kind"] == "valid":
            reporter.log(
                f"validation at update {figures['update']}: perplexity {figures['ppl']:.2f}, "
                f"BLEU {figures['bleu']:.2f} (best {figures['best_bleu']:.2f}; {figures['bleu_signature']})"
            )
        else:
            reporter.advance(
                figures["update"],
                loss=figures["loss"],
                ppl=figures["ppl"],
                lr=figures["lr"],
                tokens_per_second=figures["tokens_per_second"],
                wire_bytes=figures.get("wire_bytes"),
                fp32_bytes=figures.get("wire_fp32_bytes"),
                scale=figures.get("scale"),
            )

    def on_update(update: int) -> None:
        if reporter.terminal:
            reporter.advance(update)

    try:
        trainer.run(
            validate=Validator(trainer.model, corpus, context.recipe.direction, config),
            on_metrics=on_metrics,
            on_update=on_update,
        )
    finally:
        if log is not None:
            log.close()
    if trainer.stopped_early:
        reporter.log(f"{title}: BLEU has not risen for {config.patience} validations, stopped at {trainer.updates}")


def _final_weights(context: StageContext, config: TrainConfig, checkpoints: Path) -> dict[str, Tensor]:
    """The average of the last checkpoints, or the best by validation BLEU."""
    name = context.stage.name
    if config.average_last == 1:
        weights, state, _ = checkpoint.load(checkpoints / "best")
        context.reporter.log(f"{name}: best validation BLEU {state['bleu']:.2f} at update {state['update']}")
        return weights
    updates = checkpoint.list_updates(checkpoints)[-config.average_last :]
    context.reporter.log(f"{name}: average of the checkpoints of updates {', '.join(map(str, updates))}")
    return checkpoint.average([checkpoint.path_of(checkpoints, update) for update in updates])


def write_and_measure(
    context: StageContext,
    model: nn.Module,
    model_config: ModelConfig,
    corpus: Corpus,
    *,
    folder: Path | None = None,
    technique: Technique | None = None,
    metadata: Mapping[str, Any] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Write the artefact, then `measure` it; rank 0 alone.

    Args:
        context: the stage.
        model: plain and dense: techniques baked.
        model_config: its settings, for the artefact.
        corpus: gives subwords and test split.
        folder: where the artefact shall stand; the stage's own by default.
        technique: baked; says which tensors are packed.
        metadata: more for the artefact.
        rest: for `measure`.

    Returns:
        the result.
    """
    folder = folder or context.directory
    metadata = {"direction": context.recipe.direction, "model": dataclasses.asdict(model_config), **(metadata or {})}
    _write_artefact(folder / ARTEFACT, model, corpus, metadata, technique, context.recipe.zstd)
    return measure(context, corpus, folder=folder, **rest)


def measure(
    context: StageContext,
    corpus: Corpus,
    *,
    folder: Path | None = None,
    title: str | None = None,
    device: str = "cpu",
    started: float | None = None,
    engine: Engine | None = None,
    **figures: Any,
) -> dict[str, Any]:
    """Read an artefact back, translate the test split with it, and write result.json last; rank 0 alone.

    Args:
        context: the stage.
        corpus: gives the test split.
        folder: holds the artefact, and gets hypotheses and result; the stage's own by default.
        title: of the progress bar; the stage's name by default.
        device: where to translate.
        started: `time.monotonic()` of when the work began, for the result's seconds.
        engine: translates; fairseq's beam search with the artefact by default.
        figures: more for the result, and over what is found here; what is None is left out.

    Returns:
        the result.
    """
    from tenko.nmt.evaluate import evaluate

    folder, title = folder or context.directory, title or context.stage.name
    translator = engine or Translator.load(folder / ARTEFACT, device=device)
    source, target = (("en", "cs").index(lang) for lang in translator.direction.split("-"))
    texts, decode, reporter = corpus.text("test"), decode_config(context), context.reporter
    reporter.start(f"{title}: translating the test split", len(texts[source]))
    scores = evaluate(translator, texts[source], texts[target], decode, lambda done, total: reporter.advance(done))
    reporter.finish()
    reporter.log(f"{title}: test BLEU {scores.bleu:.2f}, chrF {scores.chrf:.2f}")
    write_text_atomic(folder / HYPOTHESES, "".join(f"{line}\n" for line in scores.hypotheses))
    samples = zip(texts[source], texts[target], scores.hypotheses, strict=True)
    result = {
        "stage": context.stage.name,
        "kind": context.stage.kind,
        "seconds": None if started is None else round(time.monotonic() - started, 3),
        "bleu": scores.bleu,
        "chrf": scores.chrf,
        "bleu_signature": scores.bleu_signature,
        "chrf_signature": scores.chrf_signature,
        "sentences": scores.sentences,
        "tokens_per_second": scores.tokens_per_second,
        "threads": torch.get_num_threads(),
        **({} if engine else {"artefact_bytes": artefact_bytes(folder / ARTEFACT)}),
        **_parameters(translator),
        "samples": [
            {"source": s, "reference": r, "hypothesis": h}
            for (s, r, h), _ in zip(samples, range(SAMPLES), strict=False)
        ],
        **{key: value for key, value in figures.items() if value is not None},
    }
    write_json_atomic(folder / context.result_path.name, result)
    return result


def _parameters(translator: Engine) -> dict[str, int]:
    model = getattr(translator, "model", None)
    return {"parameters": sum(p.numel() for p in model.parameters())} if isinstance(model, nn.Module) else {}


def _write_artefact(
    target: Path,
    model: nn.Module,
    corpus: Corpus,
    metadata: Mapping[str, Any],
    technique: Technique | None,
    zstd: int | None,
) -> None:
    """The artefact's folder, complete under its name or not there at all."""
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    shutil.copyfile(corpus.spm_path, beside / "spm.model")
    shutil.copyfile(corpus.dict_path, beside / "dict.txt")
    write_artefact(beside, model.state_dict(), metadata=metadata, technique=technique, zstd=zstd)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
