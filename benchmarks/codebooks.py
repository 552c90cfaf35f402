"""What do blocks and centroids of product quantization cost, group by group? Nothing is trained.

    python benchmarks/codebooks.py                        # the en-cs model that ships; minutes on one core
    python benchmarks/codebooks.py --model runs/embedded/1-train/artefact --codebooks 8,256 4,64

For each pair of block and centroids, the weights of one group alone become codewords: the bytes of its codes and fp16
codebooks, and the perplexity of the validation split by what is left. The peer is the model with exact weights, the
limit a group's bytes at the codes' bits alone, without codebooks.
"""

from __future__ import annotations

import argparse
import math

import torch

from tenko.compression.config import PqConfig
from tenko.compression.pq import decode_packed, pack_pq, quantize_pq, select_blocks
from tenko.launch.recipe import load
from tenko.launch.stage_kinds import PretrainedConfig
from tenko.launch.stage_tools import corpus_of, pretrained_folder, read_model
from tenko.nmt.config import TrainConfig
from tenko.nmt.validate import Validator


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="en-cs", help="a model that ships, or an artefact's folder")
    parser.add_argument("--direction", default="en-cs", choices=["en-cs", "cs-en"])
    parser.add_argument("--codebooks", nargs="+", default=["8,256", "6,64", "4,64", "4,256"], metavar="BLOCK,CENTROIDS")
    parser.add_argument("--iterations", type=int, default=6, help="of k-means")
    options = parser.parse_args()
    corpus = corpus_of(load("ipq", [f"direction={options.direction}"]))
    model, _ = read_model(pretrained_folder(PretrainedConfig(model=options.model), options.direction))
    valid = Validator(model, corpus, options.direction, TrainConfig(max_tokens=2000, precision="fp32"))
    print(f"exact weights: perplexity {math.exp(valid.nll()):.2f}\n", flush=True)
    print("| group | block, centroids | bytes | over codes alone | perplexity |\n|---|---|---|---|---|", flush=True)
    for group in PqConfig().blocks:
        for text in options.codebooks:
            block, centroids = map(int, text.split(","))
            items = select_blocks(model, ("*",), (), PqConfig(blocks=dict.fromkeys(PqConfig().blocks, block)))
            items = [item for item in items if item.group == group]
            exact = [item.weight.tensor.detach().clone() for item in items]
            codes_bits = books = 0
            with torch.no_grad():
                for item in items:
                    weight = item.weight.tensor
                    codes, book = quantize_pq(weight, block, centroids, seed=1, iterations=options.iterations)
                    weight.copy_(decode_packed(pack_pq(codes, book, "pq"), weight.shape))
                    codes_bits += codes.numel() * max(1, (len(book) - 1).bit_length())
                    books += 2 * book.numel()
            size = codes_bits / 8 + books
            over, found = f"{8 * size / codes_bits:.2f}", math.exp(valid.nll())
            print(f"| {group} | {block}, {centroids} | {size:,.0f} | {over} | {found:.2f} |", flush=True)
            with torch.no_grad():
                for item, kept in zip(items, exact, strict=True):
                    item.weight.tensor.copy_(kept)


if __name__ == "__main__":
    main()
