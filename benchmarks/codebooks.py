"""What do blocks and centroids of product quantization cost? Nothing is trained.

    python benchmarks/codebooks.py                        # the en-cs model that ships; minutes on one core
    python benchmarks/codebooks.py --model runs/embedded/1-train/artefact --codebooks 8,256 4,64
    python benchmarks/codebooks.py --codebooks            # only the second table

First group by group: for each pair of block and centroids, the weights of one group alone become codewords. Bytes are
of its codes and fp16 codebooks, perplexity of the validation split. Then all weights together: the same centroids for
all weights of a group, against centroids chosen for each weight (`pq.bits`) within the same bytes. The peer of both is
the model with exact weights, the limit a group's bytes at the codes' bits alone, without codebooks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from tenko.compression.codebook_sizes import choose_centroids, stored_bits
from tenko.compression.config import PqConfig
from tenko.compression.pq import Blocks, decode_packed, pack_pq, quantize_pq, select_blocks, weight_seed
from tenko.launch.models import pretrained_folder
from tenko.launch.recipe import load
from tenko.launch.stage_kinds import PretrainedConfig
from tenko.launch.stage_tools import corpus_of, read_model
from tenko.nmt.config import TrainConfig
from tenko.nmt.sensitivity import squared_gradients
from tenko.nmt.validate import Validator

SEED = 1
BY_GROUP = PqConfig(
    blocks={"ffn": 4, "embedding": 4, "attention": 4}, centroids={"ffn": 32, "embedding": 256, "attention": 64}
)
"""The best found by hand, from the first table."""
CHOSEN = ({"ffn": 4, "embedding": 4, "attention": 4}, {"ffn": 4, "embedding": 3, "attention": 4})
"""Blocks for which centroids are chosen."""


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="en-cs", help="a model that ships, or an artefact's folder")
    parser.add_argument("--direction", default="en-cs", choices=["en-cs", "cs-en"])
    parser.add_argument("--codebooks", nargs="*", default=["8,256", "6,64", "4,64", "4,256"], metavar="BLOCK,CENTROIDS")
    parser.add_argument("--iterations", type=int, default=6, help="of k-means")
    options = parser.parse_args()
    corpus = corpus_of(load("ipq", [f"direction={options.direction}"]))
    model, _ = read_model(pretrained_folder(PretrainedConfig(model=options.model), options.direction))
    valid = Validator(model, corpus, options.direction, TrainConfig(max_tokens=2000, precision="fp32"))

    def perplexity() -> float:
        return math.exp(valid.nll())

    print(f"exact weights: perplexity {perplexity():.2f}\n", flush=True)
    if options.codebooks:
        print("| group | block, centroids | bytes | over codes alone | perplexity |\n|---|---|---|---|---|", flush=True)
    for group in PqConfig().blocks:
        for text in options.codebooks:
            block, centroids = map(int, text.split(","))
            config = PqConfig(blocks=dict.fromkeys(PqConfig().blocks, block), centroids=centroids)
            items = [item for item in select_blocks(model, ("*",), (), config) if item.group == group]
            codes = sum(item.weight.tensor.numel() // item.block * (centroids - 1).bit_length() for item in items)
            size, found = codewords(items, options.iterations, perplexity)
            print(
                f"| {group} | {block}, {centroids} | {size:,.0f} | {8 * size / codes:.2f} | {found:.2f} |", flush=True
            )

    print("\n| all weights: blocks | centroids | bytes | perplexity |\n|---|---|---|---|", flush=True)
    items = select_blocks(model, ("*",), (), BY_GROUP)
    size, found = codewords(items, options.iterations, perplexity)
    bits = 8 * size / sum(item.weight.tensor.numel() for item in items)
    print(f"| {named(BY_GROUP.blocks)} | {named(BY_GROUP.centroids)} | {size:,.0f} | {found:.2f} |", flush=True)
    gradients = squared_gradients(model, corpus, options.direction, seed=SEED)
    for blocks in CHOSEN:
        size, found = codewords(chosen(model, blocks, gradients, bits), options.iterations, perplexity)
        print(f"| {named(blocks)} | chosen, {bits:.2f} bits | {size:,.0f} | {found:.2f} |", flush=True)


def chosen(model: nn.Module, blocks: dict[str, int], gradients: dict[str, torch.Tensor], bits: float) -> list[Blocks]:
    """All weights, each with the centroids that are chosen for it."""
    config = PqConfig(blocks=blocks)
    items = select_blocks(model, ("*",), (), config)
    counts = choose_centroids(items, gradients, bits, scheme="pq", seed=SEED)
    return select_blocks(model, ("*",), (), config, centroids=counts)


@torch.no_grad()
def codewords(items: Sequence[Blocks], iterations: int, perplexity: Callable[[], float]) -> tuple[float, float]:
    """Bytes of these weights as codes and codebooks, and the perplexity with them; the weights stay as they are."""
    exact = [item.weight.tensor.clone() for item in items]
    for i, item in enumerate(items):
        weight = item.weight.tensor
        codes, book = quantize_pq(weight, item.block, item.centroids, seed=weight_seed(SEED, i), iterations=iterations)
        weight.copy_(decode_packed(pack_pq(codes, book, "pq"), weight.shape))
    found = perplexity()
    for item, kept in zip(items, exact, strict=True):
        item.weight.tensor.copy_(kept)
    sizes = [stored_bits(item.weight.tensor.numel() // item.block, item.block, item.centroids, "pq") for item in items]
    return sum(sizes) / 8, found


def named(values: object) -> str:
    """A mapping as a recipe writes it."""
    assert isinstance(values, dict)
    return ", ".join(f"{key} {value}" for key, value in values.items())


if __name__ == "__main__":
    main()
