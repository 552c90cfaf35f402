"""Quant-Noise with product quantization: an update sees a random fraction p of the blocks replaced, the rest exact.

A block becomes its codeword (`noise: codeword`) or zeros (`noise: zero`, the paper's cheap proxy); gradients pass
straight through to all stored weights. The mask is drawn once an update by (seed, update, weight), for all ranks and
micro-batches. k-means is too slow for every update: codebooks are fitted at the first one and every `refit_interval`
(0: never again), from the codebooks so far, and kept in between. Codes follow the weights at each update, of the blocks
that it replaces: were they kept too, blocks would read the same however far their weights had moved, and at p = 1
weights run away. Evaluation reads all blocks quantized, by the nearest centroid at that moment; with zeros it reads
exact weights.

Below p = 1 the trained weights stay dense (`bake` leaves them exact), and product quantization follows. At p = 1, which
is quantization-aware training, they have learned to be read as codewords: `bake` quantizes them by the last codebooks,
so that the result is the model that evaluation has read, but for biases and norms, which become fp16.

Source: Fan et al. 2021, "Training with Quantization Noise for Extreme Model Compression", section 4.2. fairseq's own
zero noise also multiplies what is left by 1 / (1 - p), as dropout does; the paper does not, and neither does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import kmeans
from .config import QuantNoiseConfig
from .pq import (
    Blocks,
    PqScheme,
    as_blocks,
    centroid_values,
    check_values,
    put_codewords,
    quantize_shared,
    round_vectors,
    select_blocks,
)
from .readers import Reader, StraightThrough
from .schemes import decode_pq
from .technique import Packed, parametrize_weight, unparametrize_weight


class PqNoise:
    """The technique of `QuantNoiseConfig` with scheme pq or pq_int8.

    Args:
        config: p, weights, blocks and noise.
        seed: of masks and k-means; the same on all ranks.
        centroids: see `select_blocks`.
    """

    def __init__(self, config: QuantNoiseConfig, *, seed: int = 0, centroids: Mapping[str, int] | None = None) -> None:
        assert config.scheme in ("pq", "pq_int8")
        assert centroids or not config.pq.bits, "with bits above 0, give what choose_centroids has chosen"
        self.name = "pq_noise"
        self.config, self.seed, self._centroids = config, seed, centroids
        self.scheme: PqScheme = "pq" if config.scheme == "pq" else "pq_int8"
        self._update = 0
        self._attached: list[Blocks] = []
        self._readers: list[NoisyBlocks] = []
        self._packed: dict[str, Packed] = {}

    def attach(self, model: nn.Module) -> None:
        """Parametrize the matched weights.

        Raises:
            ValueError: see `select_blocks`.
        """
        assert not self._attached, "attached already"
        config = self.config
        self._attached = select_blocks(
            model, config.include, config.exclude, config.pq, key="pq.blocks", centroids=self._centroids
        )
        for position, item in enumerate(self._attached):
            self._readers.append(NoisyBlocks(self, item, position))
            parametrize_weight(item.weight, self._readers[-1])

    def before_update(self, update: int) -> None:
        """A new mask, and where it is time new codebooks; called on every rank, which share that work.

        Raises:
            ValueError: codebooks are due, and a weight holds inf or NaN.
        """
        self._update = update
        self._forget()
        interval = self.config.pq.refit_interval
        due = interval > 0 and update % interval == 0
        if self.config.pq.noise == "codeword" and (due or not self._fitted):  # the first may be after a rewind
            self._fit()

    def after_update(self, update: int) -> None:
        """What modules read follows the new weights."""
        self._forget()

    @torch.no_grad()
    def bake(self, model: nn.Module) -> None:
        """Leave exact weights, or at p = 1 decoded ones; each rank may call this alone.

        Raises:
            ValueError: a weight holds inf or NaN, or a centroid what fp16 does not reach; the model stays as it is.
        """
        assert self._attached, "bake follows attach"
        quantize = self.config.p == 1 and self.config.pq.noise == "codeword" and self._fitted
        for item, reader in zip(self._attached, self._readers, strict=True):
            if quantize:
                check_values(item.weight.name, item.weight.tensor)
                check_values(item.weight.name, reader.fitted)
        for item, reader in zip(self._attached, self._readers, strict=True):
            unparametrize_weight(item.weight)
            if quantize:
                self._packed |= put_codewords(item.weight, *reader.code(item.weight.tensor), self.scheme)
        if quantize:
            round_vectors(model)
        self._attached, self._readers = [], []

    def pack(self, name: str) -> Packed | None:
        """None below p = 1: weights are stored dense."""
        assert not self._attached, "pack follows bake"
        return self._packed.get(name)

    def state_dict(self) -> dict[str, Any]:
        """Codebooks by name, as of the last refit; {} before it, and with zeros."""
        return {
            item.weight.name: reader.codebook.cpu()
            for item, reader in zip(self._attached, self._readers, strict=True)
            if reader.codebook is not None
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Technique.load_state_dict`."""
        assert not state or set(state) == {item.weight.name for item in self._attached}, "of other weights"
        self._forget()
        for item, reader in zip(self._attached, self._readers, strict=True):
            kept = state.get(item.weight.name)
            reader.codebook = None if kept is None else kept.to(item.weight.tensor.device)

    @property
    def _fitted(self) -> bool:
        return all(reader.codebook is not None for reader in self._readers)

    def _fit(self) -> None:
        starts = [reader.codebook for reader in self._readers]
        fitted = quantize_shared(
            self._attached,
            iterations=self.config.pq.iterations,
            scheme=self.scheme,
            seed=self.seed,
            starts=[start for start in starts if start is not None] if self._fitted else None,
        )
        for reader, (_, codebook) in zip(self._readers, fitted, strict=True):
            reader.codebook = codebook

    def _forget(self) -> None:
        for reader in self._readers:
            reader.forget()

    def _mask(self, item: Blocks, position: int) -> Tensor:
        """The blocks that this update replaces, bool [blocks]."""
        device = item.weight.tensor.device
        state = np.random.SeedSequence((self.seed, self._update, position)).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(state[0]))
        blocks = item.weight.tensor.numel() // item.block
        return torch.rand(blocks, generator=generator, device=device) < self.config.p


class NoisyBlocks(Reader):
    """Gives what modules read of one weight, gradients straight through."""

    codebook: Tensor | None
    """fp32 [K, block]; a plain attribute, since DDP would broadcast a buffer and checkpoints save it."""

    def __init__(self, technique: PqNoise, item: Blocks, position: int) -> None:
        super().__init__()
        self._source = (technique, item, position)  # in a tuple: its parameter must not be registered here too
        self.codebook = None

    def forward(self, stored: Tensor) -> Tensor:
        zero = self._source[0].config.pq.noise == "zero"
        if (zero and not self.training) or (not zero and self.codebook is None):  # not fitted before the first update
            return stored
        return StraightThrough.apply(stored, self.cached(stored))

    def read(self, stored: Tensor) -> Tensor:
        return self._noisy(stored) if self.training else self._quantized(stored)

    def _noisy(self, stored: Tensor) -> Tensor:
        technique, item, position = self._source
        if technique.config.p == 1 and self.codebook is not None:
            return self._quantized(stored)
        mask = technique._mask(item, position)[:, None]
        if self.codebook is None:
            return torch.where(mask, 0.0, as_blocks(stored, item.block)).reshape(stored.shape)
        blocks = as_blocks(stored, item.block)
        values = centroid_values(self.codebook, technique.scheme)
        if stored.is_cuda:  # all of them, rather than wait to know which
            codewords = _spread_nan(values[kmeans.assign(blocks, values)].to(stored.dtype), blocks)
            return torch.where(mask, codewords, blocks).reshape(stored.shape)
        blocks = blocks.clone()
        chosen = mask.squeeze(1).nonzero().squeeze(1)
        replaced = blocks[chosen]
        blocks[chosen] = _spread_nan(values[kmeans.assign(replaced, values)].to(stored.dtype), replaced)
        return blocks.reshape(stored.shape)

    def _quantized(self, stored: Tensor) -> Tensor:
        codes, codebook = self.code(stored)
        decoded = decode_pq(codes, centroid_values(codebook, self._source[0].scheme), stored.shape).to(stored.dtype)
        return _spread_nan(decoded, stored)

    @property
    def fitted(self) -> Tensor:
        """The codebook, which is there."""
        assert self.codebook is not None
        return self.codebook

    def code(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codewords of a weight's blocks: codes, uint8 [rows, columns / block], and codebook."""
        technique, item, _ = self._source
        values = centroid_values(self.fitted, technique.scheme)
        codes = kmeans.assign(as_blocks(stored, item.block), values)
        return codes.to(stored.device, torch.uint8).reshape(stored.shape[0], -1), self.fitted


def _spread_nan(codewords: Tensor, weights: Tensor) -> Tensor:
    """NaN in the place of weights that are inf or NaN, as the scalar schemes decode them: the loss must show them."""
    return codewords.add_(weights, alpha=0)
