"""How much of a real gradient survives a thin wire? Bits, clip, block, sigma, rounding and error feedback, ablated.

    python benchmarks/gradients.py --run runs/scratch
    python benchmarks/gradients.py --run runs/scratch --json docs/results/gradients.json

Batches of the run's own corpus at its newest weights stand for ranks and updates: two ranks, `--updates` updates. For
three weights and for the whole model a table gives the squared error of what two ranks exchange, summed over the
updates, relative to the sum of the exact means (`sum`: what the weights see; error feedback counts), and that of the
first update with both divided, element by element, by Adam's second moment (`Adam`: what the optimizer sees). 3 bits
up, 4 down, c = 3, blocks of 128, stochastic, with error feedback, unless a row says otherwise. The run must have been
trained with `comm.route` all_reduce or fp32: a server keeps Adam's state elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import option_types as types

from tenko.comm import Quantizer
from tenko.comm.config import default_block
from tenko.comm.layout import single
from tenko.comm.reference import key_words
from tenko.launch.recipe import Recipe
from tenko.launch.rundir import CHECKPOINTS, RunDirectory
from tenko.nmt import checkpoint
from tenko.nmt.batches import UpdateStream
from tenko.nmt.config import TrainConfig
from tenko.nmt.fairseq_bridge import ModelWithLoss, build_model
from tenko.nmt.prepare import prepare
from tenko.nmt.trainer_state import load_weights

SUFFIXES = ("embed_tokens.weight", "layers.0.fc1.weight", "self_attn.q_proj.weight")
RANKS = 2
ROUTES = ("all_reduce", "fp32")
"""Whose checkpoints have Adam's state in the optimizer."""


@dataclass(frozen=True)
class Case:
    """One row."""

    name: str
    bits: int = 3
    bits_down: int = 4
    clip: float = 3.0
    block: int = 0
    sigma: str = "block"
    rounding: str = "stochastic"
    feedback: bool = True

    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        block = self.block or default_block(self.bits, self.bits_down)
        rounding: Any = self.rounding
        sigma: Any = self.sigma
        return (
            Quantizer(self.bits, self.clip, block, rounding, sigma),
            Quantizer(self.bits_down, self.clip, block, rounding),
        )


BASE = Case("3/4 bits")
CASES = [
    BASE,
    replace(BASE, name="without feedback", feedback=False),
    *(replace(BASE, name=f"{m}/4 bits", bits=m) for m in (1, 2, 4, 8)),
    *(replace(BASE, name=f"3/{m} bits", bits_down=m) for m in (3, 5, 8)),
    *(replace(BASE, name=f"c = {c:g}" if c else "no clip", clip=c) for c in (0.0, 1.5, 2.0, 2.5, 4.0)),
    *(replace(BASE, name=f"blocks of {block}", block=block) for block in (64, 256, 1024)),
    *(replace(BASE, name=f"sigma of the {scope}", sigma=scope) for scope in ("row", "tensor")),
    replace(BASE, name="nearest", rounding="nearest"),
    *(
        replace(BASE, name=f"c = {c:g}, without feedback" if c else "no clip, without feedback", clip=c, feedback=False)
        for c in (0.0, 2.0)
    ),
    replace(BASE, name="blocks of 1024, without feedback", block=1024, feedback=False),
    replace(BASE, name="nearest, without feedback", rounding="nearest", feedback=False),
]


def exchange(case: Case, gradients: list[list[Tensor]], row: int) -> tuple[Tensor, Tensor]:
    """What comes down in the first update, and the sum over all.

    Args:
        case: the settings.
        gradients: by update and rank, [numel] each.
        row: elements of a row of the tensor, 0 of a vector.
    """
    up, down = case.quantizers()
    numel = gradients[0][0].numel()
    part = single(numel, up.span, row)
    residuals = [torch.zeros(numel) for _ in range(RANKS)]
    codes = torch.empty(part.size(up.bits), dtype=torch.uint8)
    first, total = torch.zeros(numel), torch.zeros(numel)
    for update, ranks in enumerate(gradients):
        mean = torch.zeros(numel)
        for rank, gradient in enumerate(ranks):
            keys = key_words((update, rank), [0] * len(part.table))
            if case.feedback:
                up.encode_feedback(gradient, residuals[rank], part, keys, codes)
            else:
                up.encode_shard(gradient, part, keys, codes)
            up.decode_shard(codes, part, mean, factor=1 / RANKS, add=True)
        sent = down.decode(down.encode(mean, (update, 99)), numel)
        if update == 0:
            first = sent
        total += sent
    return first, total


def main() -> None:
    """Read a run's newest checkpoint, take gradients, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/scratch"), help="a run with checkpoints")
    parser.add_argument("--updates", type=types.integer(1), default=16)
    parser.add_argument("--json", type=types.new_file, help="write the figures here")
    options = parser.parse_args()
    try:
        recipe, config, newest = trained(options.run)
    except ValueError as unfit:
        parser.error(f"--run: {unfit}")
    corpus = prepare(recipe.data, report=lambda line: None)
    model = build_model(recipe.model, corpus.dict_path)
    parameters = dict(model.named_parameters())
    weights, state, _ = checkpoint.load(newest)
    load_weights(parameters, weights, newest)
    moments = {name: state["optimizer"]["state"][i]["exp_avg_sq"] for i, name in enumerate(parameters)}
    gradients = take_gradients(model, parameters, recipe, corpus, config, options.updates)
    chosen = {suffix: [next(n for n in parameters if n.endswith(suffix))] for suffix in SUFFIXES}
    chosen["all weights"] = list(parameters)

    print(f"{newest}, {options.updates} updates\n")
    print("| |" + "".join(f" {name}: sum | Adam |" for name in chosen))
    print("|---|" + "---|---|" * len(chosen))
    results: dict[str, dict[str, list[float]]] = {}
    for case in CASES:
        errors = {name: error_of(case, gradients[name], parameters[name], moments[name]) for name in parameters}
        figures = {}
        for title, names in chosen.items():
            error, size, adam_error, adam_size = (sum(errors[n][i] for n in names) for i in range(4))
            figures[title] = [error / size, adam_error / adam_size]
        results[case.name] = figures
        print(
            f"| {case.name} |" + "".join(f" {total:.4f} | {adam:.3f} |" for total, adam in figures.values()), flush=True
        )
    if options.json:
        options.json.write_text(json.dumps({"updates": options.updates, "errors": results}, indent=1) + "\n")


def trained(path: Path) -> tuple[Recipe, TrainConfig, Path]:
    """A run's recipe, its first stage's settings, and that stage's newest checkpoint.

    Raises:
        ValueError: the gradients cannot be taken of it; says why.
    """
    run = RunDirectory.read(path)
    first = run.recipe.stages[0]
    if not isinstance(first.config, TrainConfig):
        raise ValueError(f"{path}: its first stage is {first.kind}; needed is a run whose first stage is train")
    if run.recipe.comm.route not in ROUTES:
        raise ValueError(f"{path}: trained with comm.route {run.recipe.comm.route}; valid: {', '.join(ROUTES)}")
    checkpoints = run.stage_directory(0) / CHECKPOINTS
    updates = checkpoint.list_updates(checkpoints)
    if not updates:
        raise ValueError(f"{path}: no checkpoint in {checkpoints}; `tenko run` writes one every save_interval updates")
    return run.recipe, first.config, checkpoint.path_of(checkpoints, updates[-1])


def take_gradients(
    model: torch.nn.Module, parameters: dict[str, Any], recipe: Recipe, corpus: Any, config: TrainConfig, updates: int
) -> dict[str, list[list[Tensor]]]:
    """Of every parameter, by update and rank, at unchanged weights."""
    stream = UpdateStream(
        corpus.split("train"),
        recipe.direction,
        seed=99,
        max_tokens=config.max_tokens,
        update_freq=RANKS,
        rank=0,
        world=1,
    )
    with_loss = ModelWithLoss(model, config.label_smoothing)
    gradients: dict[str, list[list[Tensor]]] = {name: [] for name in parameters}
    for update in range(updates):
        for found in gradients.values():
            found.append([])
        for sample in stream.update(update + 1).samples:
            loss, _ = with_loss(sample)
            (loss / sample["ntokens"]).backward()
            for name, parameter in parameters.items():
                gradients[name][-1].append(parameter.grad.flatten().clone())
            model.zero_grad()
    return gradients


def error_of(case: Case, gradients: list[list[Tensor]], parameter: Tensor, moment: Tensor) -> tuple[float, ...]:
    """Squared error and size of the sum over the updates, and of the first one as Adam sees it."""
    row = parameter[0].numel() if parameter.dim() > 1 else 0
    first, total = exchange(case, gradients, row)
    means = [torch.stack(ranks).mean(dim=0) for ranks in gradients]
    exact = torch.stack(means).sum(dim=0)
    weight = 1 / (moment.flatten() + 1e-16)
    return (
        float((total - exact).square().sum()),
        float(exact.square().sum()),
        float(((first - means[0]).square() * weight).sum()),
        float((means[0].square() * weight).sum()),
    )


if __name__ == "__main__":
    main()
