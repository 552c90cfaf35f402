"""Product quantization: consecutive weights of a row share a one-byte code, the number of a centroid in a codebook.

A weight [rows, columns] is cut into blocks of `block` weights, k-means over its blocks gives the codebook [K, block],
and codes [rows, columns / block] name the nearest centroid of each. Centroids are stored in fp16 (`pq`) or in int8 with
one scale (`pq_int8`): next to the error of the codes, tens of per cent of the weights' norm, fp16's 0.05 % is nothing,
and it halves the codebooks. Codes are chosen for the centroids as they are stored. Biases and layer norms are
rounded to fp16 with them: in fp32 they would be a tenth of a file of 1.5 bits a weight.

Source: Jegou et al. 2011 (product quantization); Stock et al. 2020, section 3 (of a layer's weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import kmeans
from .config import PQ_GROUPS, PqConfig, QuantizeConfig
from .scalar import Linear
from .schemes import decode_pq, dequantize
from .technique import Packed, Weight, expect_fp32, name_matches, select_weights, some_names, weights

PqScheme = Literal["pq", "pq_int8"]


@dataclass(frozen=True)
class Blocks:
    """A weight and how it is cut."""

    weight: Weight
    block: int
    """Weights that share a code."""
    group: str
    """The key of `PqConfig.blocks` that it belongs to."""
    centroids: int
    """Of its codebook, at most."""


def select_blocks(
    model: nn.Module,
    include: Sequence[str],
    exclude: Sequence[str],
    config: PqConfig,
    *,
    key: str = "blocks",
    centroids: Mapping[str, int] | None = None,
) -> list[Blocks]:
    """The weights to quantize with their block sizes, in the model's order; reads no values.

    Args:
        model: not parametrized yet.
        include, exclude: see `select_weights`.
        config: blocks and centroids.
        key: names its blocks in messages.
        centroids: of weights by name, in the place of the configured ones.

    Raises:
        ValueError: a pattern or group matches nothing, groups before one take all that it matches, a selected weight
            is in no group or not fp32, or a size does not divide the columns of a weight; one line with the valid
            choices.
    """
    sizes = config.blocks
    selected = select_weights(model, include, exclude)
    expect_fp32(selected)
    found = weights(model)
    for group in sizes:
        if not any(name_matches(weight, PQ_GROUPS.get(group, (group,))) for weight in found):
            valid = f"{', '.join(PQ_GROUPS)} or a shell pattern of a weight's name: {some_names(found)}"
            raise ValueError(f"{key}: {group!r} matches no weight; valid is {valid}")
    grouped = [
        (weight, next((group for group in sizes if name_matches(weight, PQ_GROUPS.get(group, (group,)))), None))
        for weight in selected
    ]
    for group in sizes:
        of_group = [weight for weight in selected if name_matches(weight, PQ_GROUPS.get(group, (group,)))]
        if of_group and not any(taken == group for _, taken in grouped):
            raise ValueError(f"{key}: {group!r} takes nothing, groups before it have all its weights; put it first")
    without = [weight for weight, group in grouped if group is None]
    if without:
        have = ", ".join(sizes)
        raise ValueError(f"{key}: {have} have no size for {some_names(without)}; add a group, or exclude them")
    blocks = [
        Blocks(weight, sizes[group], group, (centroids or {}).get(weight.name, config.centroids_of(group)))
        for weight, group in grouped
        if group is not None
    ]
    for item in blocks:
        rows = item.weight.tensor.shape[0]
        columns = item.weight.tensor.numel() // rows
        if columns % item.block:
            possible = ", ".join(str(n) for n in range(1, columns + 1) if columns % n == 0)
            raise ValueError(
                f"{key}: {item.group} is {item.block}, which does not divide the {columns} columns of "
                f"{item.weight.name}; possible are {possible}"
            )
    return blocks


def quantize_pq(
    weight: Tensor,
    block: int,
    centroids: int = 256,
    *,
    seed: int,
    scheme: PqScheme = "pq",
    iterations: int = 25,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and codebook of a weight by k-means over its blocks.

    Args:
        weight: [rows, ...], floating point, finite; `block` divides the product of the other dimensions.
        block: weights that share a code.
        centroids: K, at most 256; fewer where the weight has fewer distinct blocks.
        seed: of k-means, which is deterministic for it.
        scheme: how centroids are stored; codes name the nearest of the stored ones.
        iterations: of k-means.
        start: [K, block], an earlier codebook to go on from.

    Returns:
        codes, uint8 [rows, columns / block]; codebook, fp32 [K, block], not rounded as `scheme` stores it; on the CPU.
    """
    assert 2 <= centroids <= 256, f"{centroids} centroids: a code is one byte"
    blocks = as_blocks(weight, block).float().cpu()  # where k-means runs
    codebook = kmeans.fit(blocks, centroids, seed=seed, iterations=iterations, start=start)
    codes = kmeans.assign(blocks, centroid_values(codebook, scheme))
    return codes.to(torch.uint8).reshape(weight.shape[0], -1), codebook


def as_blocks(weight: Tensor, block: int) -> Tensor:
    """The blocks [rows * columns / block, block] of a weight [rows, ...], row by row."""
    return weight.detach().reshape(-1, block)


def store_centroids(codebook: Tensor, scheme: PqScheme) -> dict[str, Tensor]:
    """A codebook as the file holds it: `codebook` in fp16, or in int8 with `scale`, fp32 [1], max|centroid| / 127.

    Args:
        codebook: fp32 [K, block].
        scheme: pq is fp16, pq_int8 is int8.
    """
    if scheme == "pq":
        return {"codebook": codebook.detach().half()}
    parts = Linear(8, "tensor").quantize(codebook).parts
    return {"codebook": parts["codes"], "scale": parts["scale"]}


def centroid_values(codebook: Tensor, scheme: PqScheme) -> Tensor:
    """The codebook [K, block] in fp32 as it comes back from the file."""
    stored = store_centroids(codebook, scheme)
    return dequantize(stored["codebook"], stored["scale"]) if "scale" in stored else stored["codebook"].float()


def pack_pq(codes: Tensor, codebook: Tensor, scheme: PqScheme) -> Packed:
    """Codes [rows, columns / block] and codebook fp32 [K, block] in their stored form."""
    return Packed(scheme, {"codes": codes.cpu(), **{k: v.cpu() for k, v in store_centroids(codebook, scheme).items()}})


def decode_packed(packed: Packed, shape: Sequence[int]) -> Tensor:
    """The fp32 weight of this shape that a packed form stands for."""
    parts = packed.parts
    return decode_pq(parts["codes"], parts["codebook"], shape, parts.get("scale"))


@torch.no_grad()
def quantize_shared(
    items: Sequence[Blocks],
    *,
    iterations: int,
    scheme: PqScheme,
    seed: int,
    starts: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """`quantize_pq` of each weight, the work divided among the ranks; called on every rank, the same on all of them.

    Args:
        items: the weights, equal on all ranks.
        iterations: of k-means.
        scheme: see `quantize_pq`.
        seed: of k-means; each weight has its own.
        starts: codebooks to go on from.

    Returns:
        (codes, codebook) of each weight, on its device.

    Raises:
        ValueError: a weight holds inf or NaN, or a value that fp16 does not reach.
    """
    for item in items:
        check_values(item.weight.name, item.weight.tensor)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    mine = dist.get_rank() if ranks > 1 else 0
    made = {
        i: quantize_pq(
            item.weight.tensor,
            item.block,
            item.centroids,
            seed=weight_seed(seed, i),
            scheme=scheme,
            iterations=iterations,
            start=None if starts is None else starts[i],
        )
        for i, item in enumerate(items)
        if i % ranks == mine
    }
    results = []
    for i, item in enumerate(items):
        tensor = item.weight.tensor
        count = torch.tensor(len(made[i][1]) if i in made else 0, device=tensor.device)
        if ranks > 1:
            dist.broadcast(count, i % ranks)
        codes = torch.empty(len(tensor), tensor[0].numel() // item.block, dtype=torch.uint8, device=tensor.device)
        codebook = torch.empty(int(count), item.block, device=tensor.device)
        if i in made:
            codes.copy_(made[i][0])
            codebook.copy_(made[i][1])
        if ranks > 1:
            dist.broadcast(codes, i % ranks)
            dist.broadcast(codebook, i % ranks)
        results.append((codes, codebook))
    return results


@torch.no_grad()
def put_codewords(weight: Weight, codes: Tensor, codebook: Tensor, scheme: PqScheme) -> dict[str, Packed]:
    """Leave in a weight what its file will decode to; the packed form under each of its names."""
    packed = pack_pq(codes, codebook, scheme)
    weight.tensor.copy_(decode_packed(packed, weight.tensor.shape))
    return dict.fromkeys(weight.names, packed)


def check_values(name: str, values: Tensor) -> None:
    """Raises: ValueError if weight or codebook holds inf or NaN, or a value that no fp16 centroid reaches."""
    largest = values.detach().abs().max()
    if not bool(torch.isfinite(largest)):
        raise ValueError(f"{name}: holds inf or NaN and can't be quantized")
    if float(largest) > torch.finfo(torch.float16).max:
        raise ValueError(f"{name}: holds {float(largest):g}, beyond fp16's 65504, and can't be quantized by pq")


@torch.no_grad()
def round_vectors(model: nn.Module) -> None:
    """Round a baked model's biases and layer norms to fp16, which the file then holds; one beyond its range stays."""
    for parameter in model.parameters():
        rounded = parameter.half()
        if parameter.dim() < 2 and bool(torch.isfinite(rounded).all()):
            parameter.copy_(rounded)


class PostTrainingPq:
    """The technique of `QuantizeConfig` with scheme pq or pq_int8: k-means over the weights as they are.

    Nothing is finetuned and nothing is parametrized: `attach` only finds the weights and checks their block sizes.
    """

    def __init__(self, config: QuantizeConfig, *, seed: int = 0, centroids: Mapping[str, int] | None = None) -> None:
        assert config.scheme in ("pq", "pq_int8")
        assert centroids or not config.pq.bits, "with bits above 0, give what choose_centroids has chosen"
        self.name: str = config.scheme
        self.config, self.seed, self._centroids = config, seed, centroids
        self._scheme: PqScheme = "pq" if config.scheme == "pq" else "pq_int8"
        self._attached: list[Blocks] = []
        self._packed: dict[str, Packed] = {}

    def attach(self, model: nn.Module) -> None:
        assert not self._attached, "attached already"
        config = self.config
        self._attached = select_blocks(
            model, config.include, config.exclude, config.pq, key="pq.blocks", centroids=self._centroids
        )

    def before_update(self, update: int) -> None:
        """Nothing: weights are quantized once, in `bake`."""

    def after_update(self, update: int) -> None:
        """Nothing: weights are quantized once, in `bake`."""

    @torch.no_grad()
    def bake(self, model: nn.Module) -> None:
        """Leave dense decoded weights; each rank may call this alone.

        Raises:
            ValueError: a weight holds inf, NaN or a value beyond fp16's; the model stays as it is.
        """
        assert self._attached, "bake follows attach"
        for item in self._attached:
            check_values(item.weight.name, item.weight.tensor)
        for i, item in enumerate(self._attached):
            codes, codebook = quantize_pq(
                item.weight.tensor,
                item.block,
                item.centroids,
                seed=weight_seed(self.seed, i),
                scheme=self._scheme,
                iterations=self.config.pq.iterations,
            )
            self._packed |= put_codewords(item.weight, codes, codebook, self._scheme)
        self._attached = []
        round_vectors(model)

    def pack(self, name: str) -> Packed | None:
        assert not self._attached, "pack follows bake"
        return self._packed.get(name)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take."""


def weight_seed(seed: int, weight: int) -> int:
    """Of k-means over weight number `weight` of those that are quantized."""
    return int(np.random.SeedSequence((seed, weight)).generate_state(1)[0])
