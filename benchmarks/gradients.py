"""How much of a real gradient survives 3 bits up and 4 down? By block and clip, on the gradients of a trained run.

    python benchmarks/gradients.py --run runs/demo

Two batches stand for two ranks. For three weights the table gives the squared error of the exchanged mean, relative to
the mean's square (`relative`), and the same with both divided, element by element, by Adam's second moment (`Adam`):
the error that the optimizer sees. Without error feedback, which takes care of what is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tenko.comm import Quantizer
from tenko.launch.rundir import CHECKPOINTS, RunDirectory
from tenko.nmt import checkpoint
from tenko.nmt.batches import UpdateStream
from tenko.nmt.config import TrainConfig
from tenko.nmt.fairseq_bridge import ModelWithLoss, build_model
from tenko.nmt.prepare import prepare
from tenko.nmt.trainer import load_weights

SUFFIXES = ("embed_tokens.weight", "layers.0.fc1.weight", "self_attn.q_proj.weight")


def main() -> None:
    """Read a run's newest checkpoint, take two gradients, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run with checkpoints")
    options = parser.parse_args()
    recipe = RunDirectory.read(options.run).recipe
    config = recipe.stages[0].config
    assert isinstance(config, TrainConfig)
    corpus = prepare(recipe.data, report=lambda line: None)
    model = build_model(recipe.model, corpus.dict_path)
    parameters = dict(model.named_parameters())
    checkpoints = options.run / f"1-{recipe.stages[0].name}" / CHECKPOINTS
    newest = checkpoint.path_of(checkpoints, checkpoint.list_updates(checkpoints)[-1])
    weights, state, _ = checkpoint.load(newest)
    load_weights(parameters, weights, newest)
    moments = {name: state["optimizer"]["state"][i]["exp_avg_sq"] for i, name in enumerate(parameters)}
    stream = UpdateStream(
        corpus.split("train"), recipe.direction, seed=99, max_tokens=config.max_tokens, update_freq=2, rank=0, world=1
    )
    with_loss = ModelWithLoss(model, config.label_smoothing)
    ranks = []
    for sample in stream.update(1).samples:
        loss, _ = with_loss(sample)
        (loss / sample["ntokens"]).backward()
        ranks.append({name: p.grad.flatten().clone() for name, p in parameters.items() if p.grad is not None})
        model.zero_grad()
    names = [next(n for n in parameters if n.endswith(suffix)) for suffix in SUFFIXES]
    print(f"{newest}\n\n{'block':>5} {'c':>3}" + "".join(f"{s + ': relative':>36}  Adam" for s in SUFFIXES))
    for block in (1024, 256, 128, 64):
        for clip in (0.0, 2.0, 3.0):
            cells = [errors([r[n] for r in ranks], moments[n].flatten(), block, clip) for n in names]
            print(f"{block:5} {clip:3g}" + "".join(f"{relative:36.3f} {adam:5.2f}" for relative, adam in cells))


def errors(gradients: list[torch.Tensor], moment: torch.Tensor, block: int, clip: float) -> tuple[float, float]:
    """Relative squared error of the exchanged mean, plain and divided by Adam's second moment."""
    up, down = (Quantizer(bits=bits, clip=clip, block=block) for bits in (3, 4))
    numel = gradients[0].numel()
    mean = torch.stack(gradients).mean(dim=0)
    sent = torch.stack([up.decode(up.encode(g, (1, i)), numel) for i, g in enumerate(gradients)]).mean(dim=0)
    error = (down.decode(down.encode(sent, (2,)), numel) - mean).square()
    weight = 1 / (moment + 1e-16)
    plain = error.sum() / mean.square().sum()
    return float(plain), float((error * weight).sum() / (mean.square() * weight).sum())


if __name__ == "__main__":
    main()
