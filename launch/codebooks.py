"""Centroids chosen for each weight by what its error costs the loss (`pq.bits`), once a stage.

    runs/NAME/2-quant_noise/centroids.json          what was asked for, and the centroids of each weight

A stage that was cut goes on with these, unless something else is asked for now.

How they are chosen, `tenko/compression/codebook_sizes.py` tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tenko.compression.codebook_sizes import SIZES, choose_centroids, least_bits
from tenko.compression.config import PqConfig
from tenko.compression.container import artefact_file
from tenko.compression.pq import Blocks, PqScheme, select_blocks
from tenko.nmt import distributed, sensitivity
from tenko.nmt.corpus import Corpus
from tenko.nmt.text_io import sha256

from .files import read_json, write_json_atomic
from .rundir import ARTEFACT, StageContext

CENTROIDS = "centroids.json"


def check_bits(items: Sequence[Blocks], config: PqConfig, scheme: PqScheme, key: str) -> None:
    """Raises: ValueError if `config.bits` are fewer than the fewest centroids take; `key` names them."""
    if config.bits and config.bits < (least := least_bits(items, scheme)):
        enough = math.ceil(least * 1000) / 1000  # rounded up, so that it can be taken as it is told
        raise ValueError(f"{key}: must be 0, or at least {enough:.3f} for these blocks, is {config.bits}")


def chosen_centroids(
    context: StageContext,
    model: nn.Module,
    corpus: Corpus,
    config: PqConfig,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    scheme: PqScheme,
) -> dict[str, int]:
    """Centroids by weight; called on every rank. Empty where `config.bits` is 0: those of the recipe count.

    Args:
        context: the stage.
        model: plain, as it is to be quantized.
        corpus: gives the sentences whose loss counts.
        config: blocks and bits.
        include, exclude, scheme: of the stage.

    Raises:
        ValueError: a weight holds inf, NaN or a value that fp16 does not reach.
    """
    if not config.bits:
        return {}
    items = select_blocks(model, include, exclude, config)
    seed, reporter, name = context.recipe.seed, context.reporter, context.stage.name
    file = context.directory / CENTROIDS
    asked: dict[str, Any] = {"bits": config.bits, "scheme": scheme, "seed": seed}
    asked["blocks"] = {item.weight.name: item.block for item in items}
    kept = None
    if distributed.rank() == 0:
        assert context.previous is not None, "the recipe checks that the stage follows another"
        asked["model"] = sha256(artefact_file(context.previous / ARTEFACT))
        kept = read_chosen(file, asked)
    kept = distributed.from_rank0(kept)
    if kept is not None:
        return dict(kept)
    reporter.start(f"{name}: what an error of each weight costs", -(-sensitivity.BATCHES // distributed.world_size()))
    gradients = sensitivity.squared_gradients(
        model, corpus, context.recipe.direction, seed=seed, on_batch=reporter.advance
    )
    own, done = len(items[distributed.rank() :: distributed.world_size()]), 0
    reporter.start(f"{name}: centroids of each weight", own)

    def advance() -> None:
        nonlocal done
        done += 1
        reporter.advance(done)

    chosen = choose_centroids(items, gradients, config.bits, scheme=scheme, seed=seed, on_weight=advance)
    reporter.finish()
    few, many = min(chosen.values()), max(chosen.values())
    reporter.log(f"{name}: {few} to {many} centroids a weight ({file})")
    if distributed.rank() == 0:
        write_json_atomic(file, {"asked": asked, "centroids": chosen})
    distributed.barrier()
    return chosen


def read_chosen(file: Path, asked: dict[str, Any]) -> dict[str, int] | None:
    """What an earlier start has chosen, where it was asked the same; None where not, or the file is damaged."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return None
    chosen = found.get("centroids") if isinstance(found, dict) and found.get("asked") == asked else None
    if not isinstance(chosen, dict) or chosen.keys() != asked["blocks"].keys():
        return None
    return chosen if all(type(count) is int and count in SIZES for count in chosen.values()) else None
