"""What each kind of stage does: glue between the recipe and the packages that do the work; no arithmetic here.

A stage is called on every rank with an equal context, reads the artefact of the stage before, and ends with its own
artefact on disk, read back and measured, and a result.json.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tenko.comm import Route, make_route, register
from tenko.compression import Int8PerChannel, Technique, artefact_bytes, read_artefact, write_artefact
from tenko.compression.config import QuantizeConfig
from tenko.nmt import checkpoint, distributed
from tenko.nmt.batches import UpdateStream
from tenko.nmt.config import DecodeConfig, ModelConfig, TrainConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.deepspeed_engine import ZeroEngine, plugin
from tenko.nmt.fairseq_bridge import build_model
from tenko.nmt.prepare import prepare
from tenko.nmt.trainer import Trainer, load_weights
from tenko.nmt.translate import Translator
from tenko.nmt.validate import Validator

from .files import write_json_atomic
from .metrics import MetricsLog
from .rundir import ARTEFACT, StageContext

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

SAMPLES = 8
"""Translations of unseen sentences kept in a result."""
PATIENCE = timedelta(hours=6)
"""How long ranks wait for rank 0 while it prepares a corpus or translates a test set."""


def run_train(context: StageContext) -> None:
    """Train a model on the recipe's corpus; the artefact holds dense fp32 weights."""
    recipe, config = context.recipe, context.stage.config
    assert isinstance(config, TrainConfig)
    started = time.monotonic()
    zero = config.engine == "deepspeed" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if config.engine == "deepspeed" and not zero:
        context.reporter.log("train.engine: deepspeed has nothing to split with one worker, and is ignored")
    accelerator = _accelerator(context, config.trackers, plugin(config.zero_stage, config.clip_norm) if zero else None)
    corpus = _corpus(context)
    rank, world = distributed.rank(), distributed.world_size()
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, corpus.dict_path).to(accelerator.device)
    stream = UpdateStream(
        corpus.split("train"),
        recipe.direction,
        seed=recipe.seed,
        max_tokens=config.max_tokens,
        update_freq=config.update_freq,
        rank=rank,
        world=world,
    )
    trainer = Trainer(
        model,
        stream,
        config,
        seed=recipe.seed,
        checkpoints=context.checkpoints,
        wrap=lambda module: _distribute(accelerator, module, context),
        engine=partial(ZeroEngine, accelerator) if zero else None,
    )
    if context.resume:
        trainer.resume()
    _train(context, config, corpus, trainer, accelerator)
    weights = _final_weights(context, config)
    load_weights(dict(model.named_parameters()), weights, context.checkpoints)
    if rank == 0:
        last = trainer.route.meter if trainer.route else None
        _write_and_measure(
            context,
            model,
            corpus,
            config.decode,
            device=str(accelerator.device),
            started=started,
            updates=trainer.updates,
            train_seconds=trainer.seconds,
            precision=trainer.precision,
            parameters=sum(p.numel() for p in model.parameters()),
            valid_bleu=trainer.best.bleu,
            wire=None
            if last is None
            else {
                "bytes_sent": last.bytes_sent,
                "fp32_bytes": last.fp32_bytes,
                "up_bytes": last.up_bytes,
                "down_bytes": last.down_bytes,
            },
        )
    distributed.barrier()
    if trainer.route is not None:
        trainer.route.close()
    if accelerator.trackers:
        accelerator.end_training()


def run_quantize(context: StageContext) -> None:
    """Quantize the weights of the stage before; rank 0 works, there is nothing to share."""
    config = context.stage.config
    assert isinstance(config, QuantizeConfig)
    assert context.previous is not None, "the recipe checks that quantize follows a stage"
    started = time.monotonic()
    _accelerator(context)  # makes the process group, when a resumed run begins here
    corpus = _corpus(context)
    if distributed.rank() == 0:
        context.reporter.log(f"{context.stage.name}: {config.scheme} from {context.previous}")
        source = context.previous / ARTEFACT
        state, metadata = read_artefact(source)
        model = build_model(ModelConfig(**metadata["model"]), source / "dict.txt")
        model.load_state_dict(state, strict=True)
        technique = Int8PerChannel(config)
        technique.attach(model)
        technique.bake(model)
        decode = next(s.config.decode for s in context.recipe.stages if isinstance(s.config, TrainConfig))
        _write_and_measure(context, model, corpus, decode, device="cpu", started=started, technique=technique)
    distributed.barrier()


RUNNERS: dict[str, Callable[[StageContext], None]] = {"train": run_train, "quantize": run_quantize}
"""What runs a stage of each kind."""


def _accelerator(
    context: StageContext, trackers: tuple[str, ...] = (), zero: DeepSpeedPlugin | None = None
) -> Accelerator:
    """Device, process group and trackers; accelerate's own precision stays off (see nmt/precision.py)."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    try:
        accelerator = Accelerator(
            cpu=zero is None and not torch.cuda.is_available(),  # with cpu=True accelerate ignores DeepSpeed
            deepspeed_plugin=zero,
            mixed_precision="no",
            log_with=list(trackers) or None,
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
    if trackers:
        accelerator.init_trackers(context.recipe.name)
    return accelerator


def _distribute(
    accelerator: Accelerator, module: torch.nn.Module, context: StageContext
) -> tuple[torch.nn.Module, Route | None]:
    """DDP with the recipe's route; a single process keeps the module as it is."""
    if distributed.world_size() == 1:
        return module, None
    wrapped = accelerator.prepare(module)
    return wrapped, register(wrapped, make_route(context.recipe.comm, context.recipe.seed))


def _corpus(context: StageContext) -> Corpus:
    """The prepared corpus: rank 0 builds or finds it, the others open what it names."""
    path = None
    if distributed.rank() == 0:
        path = str(prepare(context.recipe.data, report=context.reporter.log).path)
    path = distributed.gather_json(path, "cuda" if torch.cuda.is_available() else "cpu")[0]
    return Corpus.open(Path(path))


def _train(
    context: StageContext, config: TrainConfig, corpus: Corpus, trainer: Trainer, accelerator: Accelerator
) -> None:
    reporter = context.reporter
    writer = distributed.rank() == 0
    log = MetricsLog(context.metrics_path) if writer else None
    if log is not None:
        log.truncate_after(trainer.updates)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        reporter.log(
            f"train: {parameters / 1e6:.2f}M parameters, {trainer.precision} on {trainer.device}, "
            f"{distributed.world_size()} workers, {trainer.stream.batches_per_epoch} batches an epoch"
            + (f", goes on from update {trainer.updates}" if trainer.updates else "")
        )
    reporter.start(context.stage.name, config.max_update, trainer.updates)

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
        reporter.log(f"train: BLEU has not risen for {config.patience} validations, stopped at {trainer.updates}")


def _final_weights(context: StageContext, config: TrainConfig) -> dict[str, torch.Tensor]:
    """The average of the last checkpoints, or the best by validation BLEU."""
    if config.average_last == 1:
        weights, state, _ = checkpoint.load(context.checkpoints / "best")
        context.reporter.log(f"train: best validation BLEU {state['bleu']:.2f} at update {state['update']}")
        return weights
    updates = checkpoint.list_updates(context.checkpoints)[-config.average_last :]
    context.reporter.log(f"train: average of the checkpoints of updates {', '.join(map(str, updates))}")
    return checkpoint.average([checkpoint.path_of(context.checkpoints, update) for update in updates])


def _write_and_measure(
    context: StageContext,
    model: torch.nn.Module,
    corpus: Corpus,
    decode: DecodeConfig,
    *,
    device: str,
    started: float,
    technique: Technique | None = None,
    **figures: Any,
) -> None:
    """Write the artefact, read it back, translate the test split with it, and write result.json last."""
    from tenko.nmt.evaluate import evaluate

    _write_artefact(context, model, corpus, technique)
    translator = Translator.load(context.artefact, device=device)
    source, target = (("en", "cs").index(lang) for lang in translator.direction.split("-"))
    texts = corpus.text("test")
    reporter = context.reporter
    reporter.start(f"{context.stage.name}: translating the test split", len(texts[source]))
    scores = evaluate(translator, texts[source], texts[target], decode, lambda done, total: reporter.advance(done))
    reporter.finish()
    reporter.log(f"{context.stage.name}: test BLEU {scores.bleu:.2f}, chrF {scores.chrf:.2f}")
    samples = zip(texts[source], texts[target], scores.hypotheses, strict=True)
    write_json_atomic(
        context.result_path,
        {
            "stage": context.stage.name,
            "kind": context.stage.kind,
            "seconds": round(time.monotonic() - started, 3),
            "bleu": scores.bleu,
            "chrf": scores.chrf,
            "bleu_signature": scores.bleu_signature,
            "chrf_signature": scores.chrf_signature,
            "sentences": scores.sentences,
            "tokens_per_second": scores.tokens_per_second,
            "threads": torch.get_num_threads(),
            "artefact_bytes": artefact_bytes(context.artefact),
            "samples": [
                {"source": s, "reference": r, "hypothesis": h}
                for (s, r, h), _ in zip(samples, range(SAMPLES), strict=False)
            ],
            **{key: value for key, value in figures.items() if value is not None},
        },
    )


def _write_artefact(context: StageContext, model: torch.nn.Module, corpus: Corpus, technique: Technique | None) -> None:
    """The artefact's folder, complete under its name or not there at all."""
    beside = context.directory / ".artefact.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    shutil.copyfile(corpus.spm_path, beside / "spm.model")
    shutil.copyfile(corpus.dict_path, beside / "dict.txt")
    write_artefact(
        beside,
        model.state_dict(),
        metadata={"direction": context.recipe.direction, "model": dataclasses.asdict(context.recipe.model)},
        technique=technique,
    )
    shutil.rmtree(context.artefact, ignore_errors=True)
    beside.rename(context.artefact)
