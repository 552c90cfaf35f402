"""Iterative product quantization: group by group, weights become codes and a codebook, and the centroids are trained.

After `attach`, each `quantize_group` runs k-means over the weights of the next group and puts a `Codebook` in their
place: codes are fixed, and the trainable parameter, under the weight's parametrized name, is the codebook [K, block].
What is not quantized yet is trained as before. A centroid's gradient is the mean of the gradients of its blocks, not
their sum, so that one of many blocks takes no larger steps than one of few. Modules read centroids as the file stores
them.

Source: Stock et al. 2020, "And the Bit Goes Down", section 3.3 (finetuning of centroids by the averaged gradient);
Fan et al. 2021, section 4.2 (iPQ of Transformers, with int8 centroids).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from .config import IpqConfig
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
from .readers import Reader
from .schemes import decode_pq
from .technique import Packed


class Ipq:
    """The technique of `IpqConfig`.

    A training of group after group is `attach`, then for each name in `groups` `quantize_group` and a training, then
    `bake`. What was quantized before comes back by `load_state_dict` on an attached model; its codebooks come back as
    any parameters do.

    Args:
        config: groups, blocks and centroids.
        seed: of k-means.
        centroids: see `select_blocks`.
    """

    name = "ipq"

    def __init__(self, config: IpqConfig, *, seed: int = 0, centroids: Mapping[str, int] | None = None) -> None:
        assert centroids or not config.bits, "with bits above 0, give what choose_centroids has chosen"
        self.config, self.seed, self._centroids = config, seed, centroids
        self.scheme: PqScheme = config.scheme
        self._attached: list[Blocks] = []
        self._codebooks: dict[str, tuple[Codebook, nn.Parameter]] = {}
        self._packed: dict[str, Packed] = {}

    def attach(self, model: nn.Module) -> None:
        """Find the weights of all groups and check their blocks; nothing is quantized yet.

        Raises:
            ValueError: see `select_blocks`.
        """
        assert not self._attached, "attached already"
        config = self.config
        self._attached = select_blocks(model, config.include, config.exclude, config, centroids=self._centroids)

    @property
    def groups(self) -> list[str]:
        """The groups that hold weights, in the order in which they are to be quantized."""
        held = {item.group for item in self._attached}
        return [group for group in self.config.blocks if group in held]

    def quantize_group(self, group: str) -> float:
        """Put codebooks in the place of the group's weights; called on every rank, which share the work.

        Trainable parameters change: a new optimizer, and a new DDP, follow.

        Returns:
            the norm of what the weights have changed by, over their norm.

        Raises:
            ValueError: a weight holds inf, NaN or a value beyond fp16's.
        """
        items = list(self._of_group(group))
        results = quantize_shared(items, iterations=self.config.iterations, scheme=self.scheme, seed=self.seed)
        error = whole = 0.0
        for item, (codes, codebook) in zip(items, results, strict=True):
            tensor = item.weight.tensor.detach()
            decoded = decode_pq(codes, centroid_values(codebook, self.scheme), tensor.shape)
            error += float((decoded - tensor).square().sum())
            whole += float(tensor.square().sum())
            self._replace(item, codes, codebook)
        return (error / whole) ** 0.5 if whole else 0.0

    def before_update(self, update: int) -> None:
        """What modules read is computed anew."""
        self._forget()

    def after_update(self, update: int) -> None:
        """What modules read is computed anew: torch's fused AdamW raises no version."""
        self._forget()

    @torch.no_grad()
    def bake(self, model: nn.Module) -> None:
        """Leave dense decoded weights; those of groups not quantized yet stay exact. Each rank may call this alone.

        Raises:
            ValueError: a codebook holds inf, NaN or a value beyond fp16's; the model stays as it is.
        """
        assert self._attached, "bake follows attach"
        for name, (_, centroids) in self._codebooks.items():
            check_values(name, centroids)
        for item in self._attached:
            if item.weight.name not in self._codebooks:
                continue
            codebook, centroids = self._codebooks.pop(item.weight.name)
            packed = put_codewords(item.weight, codebook.codes, centroids, self.scheme)
            for module, attribute in item.weight.sites:
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
                setattr(module, attribute, item.weight.tensor)
            self._packed |= packed
        self._attached = []
        round_vectors(model)

    def pack(self, name: str) -> Packed | None:
        assert not self._attached, "pack follows bake"
        return self._packed.get(name)

    def state_dict(self) -> dict[str, Any]:
        """Codes of what is quantized, uint8 [rows, columns / block], and centroids of its codebook, by name."""
        return {
            name: {"codes": codebook.codes.cpu(), "centroids": codebook.centroids}
            for name, (codebook, _) in self._codebooks.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take codes back; a weight that is not quantized yet is, with a codebook of zeros for the caller to fill."""
        items = {item.weight.name: item for item in self._attached}
        assert set(state) <= set(items), "of other weights"
        for name, kept in state.items():
            item = items[name]
            codes = kept["codes"].to(item.weight.tensor.device)
            if name in self._codebooks:
                codebook, _ = self._codebooks[name]
                assert codebook.centroids == kept["centroids"], f"{name}: another number of centroids"
                codebook.take(codes)
            else:
                empty = torch.zeros(kept["centroids"], item.block, device=item.weight.tensor.device)
                self._replace(item, codes, empty)

    def _of_group(self, group: str) -> Iterator[Blocks]:
        for item in self._attached:
            if item.group == group:
                assert item.weight.name not in self._codebooks, f"{item.weight.name} is quantized already"
                yield item

    def _replace(self, item: Blocks, codes: Tensor, codebook: Tensor) -> None:
        """At every site of the weight, one parameter: the codebook, which one parametrization decodes."""
        parameter = nn.Parameter(codebook)
        reader = Codebook(codes, len(codebook), tuple(item.weight.tensor.shape), self.scheme)
        for module, attribute in item.weight.sites:
            setattr(module, attribute, parameter)
            # unsafe: the weight has another shape than the parameter
            parametrize.register_parametrization(module, attribute, reader, unsafe=True)
        self._codebooks[item.weight.name] = reader, parameter

    def _forget(self) -> None:
        for codebook, _ in self._codebooks.values():
            codebook.forget()


class Codebook(Reader):
    """Parametrization, one instance for all sites of a weight: the weight that codes make of the codebook.

    Args:
        codes: uint8 [rows, columns / block], fixed, on the model's device.
        centroids: K.
        shape: of the weight.
        scheme: how the file stores centroids.
    """

    def __init__(self, codes: Tensor, centroids: int, shape: tuple[int, ...], scheme: PqScheme) -> None:
        super().__init__()
        self.centroids, self.scheme = centroids, scheme
        self.weight_shape = shape
        """By which rules of `comm.split` know it."""
        self.take(codes)

    def take(self, codes: Tensor) -> None:
        """Set the codes."""
        # Plain attributes, no buffers: DDP would broadcast them at every forward.
        self.codes = codes
        flat = codes.reshape(-1).long()
        self._order = flat.argsort(stable=True).int()  # blocks by centroid
        self._starts = torch.bincount(flat, minlength=self.centroids).cumsum(0).roll(1).int()
        self._starts[0] = 0
        self.forget()

    def read(self, stored: Tensor) -> Tensor:
        return decode_pq(self.codes, centroid_values(stored, self.scheme), self.weight_shape)

    def forward(self, codebook: Tensor) -> Tensor:
        return _Decode.apply(codebook, self.cached(codebook), self._order, self._starts)


class _Decode(torch.autograd.Function):
    """The decoded weight; the gradient of a centroid is the mean over its blocks, straight through the rounding.

    Blocks are summed in a fixed order, which an `index_add` on a GPU would not do.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, value: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(order, starts)
        ctx.block = codebook.shape[1]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order, starts = ctx.saved_tensors
        blocks = as_blocks(grads[0].float(), ctx.block)
        return functional.embedding_bag(order, blocks, starts, mode="mean"), None, None, None
