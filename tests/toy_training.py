"""A toy Transformer and its trainer on the session's small corpus, for tests in this process and in torchrun jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tenko.nmt.batches import UpdateStream
from tenko.nmt.config import DecodeConfig, ModelConfig, TrainConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import build_model
from tenko.nmt.trainer import Trainer
from tenko.nmt.validate import Validation, Validator

TIMINGS = ("seconds", "tokens_per_second", "share_compute", "share_exchange", "share_data")
SETTINGS: dict[str, Any] = {
    "max_tokens": 300,
    "precision": "fp32",
    "lr": 5e-3,
    "warmup_updates": 4,
    "decode": DecodeConfig(beam=1, max_tokens=500),
    "valid_sentences": 4,
}


def toy_config(**fields: Any) -> ModelConfig:
    """One layer of width 16 on each side."""
    toy = {"encoder_layers": 1, "decoder_layers": 1, "embed_dim": 16, "ffn_dim": 32, "attention_heads": 2}
    return ModelConfig(**{**toy, "dropout": 0.0, **fields})


def toy_model(corpus: Corpus, *, seed: int = 1, **fields: Any) -> torch.nn.Module:
    """The toy with fresh weights, the same for the same seed."""
    torch.manual_seed(seed)
    return build_model(toy_config(**fields), corpus.dict_path)


def toy_trainer(
    corpus: Corpus,
    checkpoints: Path,
    *,
    model: torch.nn.Module | None = None,
    rank: int = 0,
    world: int = 1,
    dropout: float = 0.0,
    wrap: Callable[..., Any] = lambda module: (module, None),
    techniques: Any = (),
    **settings: Any,
) -> Trainer:
    """A trainer of the toy; `settings` go over `SETTINGS`."""
    config = TrainConfig(**{**SETTINGS, **settings})
    stream = UpdateStream(
        corpus.split("train"),
        "en-cs",
        seed=1,
        max_tokens=config.max_tokens,
        update_freq=config.update_freq,
        rank=rank,
        world=world,
    )
    model = toy_model(corpus, dropout=dropout) if model is None else model
    return Trainer(model, stream, config, seed=1, checkpoints=checkpoints, wrap=wrap, techniques=techniques)


class Cut(BaseException):
    """The end of a run that was cut, as by Ctrl-C."""


def train(trainer: Trainer, corpus: Corpus, *, cut: int | None = None) -> list[dict[str, Any]]:
    """Run with real validation; the metrics, timings left out. `cut` ends the run right after that update."""
    lines: list[dict[str, Any]] = []

    def on_update(update: int) -> None:
        if update == cut:
            raise Cut

    def on_metrics(figures: dict[str, Any]) -> None:
        lines.append({key: value for key, value in figures.items() if key not in TIMINGS})

    validate = Validator(trainer.model, corpus, "en-cs", trainer.config)
    try:
        trainer.run(validate=validate, on_metrics=on_metrics, on_update=on_update)
    except Cut:
        assert cut is not None
    return lines


def validations(*bleus: float) -> Callable[[], Validation]:
    """Stands in for a validator: these BLEUs, one after the other."""
    scores: Iterator[float] = iter(bleus)
    return lambda: Validation(nll=1.0, bleu=next(scores), signature="none")


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all weights and of all that the optimizer keeps, by name."""
    tensors = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    for name, parameter in trainer.parameters.items():
        for key, value in trainer.optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = value.detach().clone()
    return tensors


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not bit for bit the same, or that only one of the two has."""
    names = sorted(one.keys() | other.keys())
    return [n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])]
