"""Settings of the compression stages, as a recipe writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

PQ_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ffn": ("*fc1.weight", "*fc2.weight"),
        "embedding": ("*embed_*.weight", "*output_projection.weight"),
        "attention": ("*[qkv]_proj.weight", "*out_proj.weight"),
    }
)
"""Groups of weights by the names that Transformers give them; what `PqConfig.blocks` may name."""


def check_choices(config: Any) -> None:
    """Raises: ValueError that names the field and the valid choices, where a dataclass's field is none of its Literal.

    A recipe's loader has checked that already; a program that makes its own config has not.
    """
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and (given := getattr(config, name)) not in get_args(hint):
            raise ValueError(f"{name}: is {given!r}; valid are {', '.join(get_args(hint))}")


@dataclass(frozen=True, kw_only=True)
class PqConfig:
    blocks: dict[str, int] = field(default_factory=lambda: {"ffn": 8, "embedding": 8, "attention": 4})
    """Consecutive weights of a row that share one code, by group: ffn, embedding, attention, or a shell pattern of
    parameter names. The first group that matches a weight counts, and each weight to quantize needs one; iPQ takes the
    groups in this order. A block size must divide the columns of its weights."""
    centroids: int | dict[str, int] = 256
    """Centroids of a weight's codebook, at most 256, or by the groups of `blocks`; a weight with fewer distinct blocks
    takes as many as it has. A code takes the bits that count them: 64 take 6."""
    bits: float = 0.0
    """Bits a weight, codes and codebooks together, that the weights to quantize may take in the mean: each gets the
    centroids by which the loss loses least. 0 takes `centroids`."""
    iterations: int = 25
    """Of k-means."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.blocks:
            raise ValueError("blocks: must name at least one group, for instance {ffn: 8, embedding: 8, attention: 4}")
        for group, block in self.blocks.items():
            if block < 1:
                raise ValueError(f"blocks: {group} must be at least 1, is {block}")
        if isinstance(self.centroids, dict) and self.centroids.keys() != self.blocks.keys():
            raise ValueError(
                f"centroids: must have the groups of blocks, {', '.join(self.blocks)}; has {', '.join(self.centroids)}"
            )
        for group in self.blocks:
            if not 2 <= (count := self.centroids_of(group)) <= 256:
                raise ValueError(f"centroids: must be 2 to 256, is {count}")
        if self.iterations < 1:
            raise ValueError(f"iterations: must be at least 1, is {self.iterations}")
        if not 0 <= self.bits <= 8:
            raise ValueError(f"bits: must be 0 to 8, is {self.bits}")
        if self.bits and self.centroids != 256:
            raise ValueError("centroids: are chosen with bits above 0; leave them out, or bits")

    def centroids_of(self, group: str) -> int:
        """Centroids of the codebooks of a group of `blocks`."""
        return self.centroids[group] if isinstance(self.centroids, dict) else self.centroids


@dataclass(frozen=True, kw_only=True)
class PqNoiseConfig(PqConfig):
    noise: Literal["codeword", "zero"] = "codeword"
    """What a block becomes under noise: its codeword, or zeros, which need no k-means (the paper's cheap proxy)."""
    refit_interval: int = 500
    """Updates between k-means anew, from the codebooks so far, which stay as they are in between; 0 fits them once,
    before the first update. k-means does not know the loss: where the learning rate is too low to mend what a refit
    changes, it undoes some of the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refit_interval < 0:
            raise ValueError(f"refit_interval: must be at least 0, is {self.refit_interval}")
        if self.bits and self.noise == "zero":
            raise ValueError("bits: must be 0 with noise: zero, which has no codebooks")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    scheme: Literal["int8", "int4", "ternary", "lat", "binary", "pq", "pq_int8"] = "int8"
    """int8, int4: symmetric, -127 to 127 and -7 to 7 times a scale. ternary: -1, 0, 1 times a scale, zero below 0.7 of
    the mean magnitude (TWN). lat: ternary with the least error of codes and scale, in training weighted by the root of
    Adam's second moment (loss-aware). binary: two levels, the 2-means of the weights. pq, pq_int8: product
    quantization, centroids in fp16, or in int8 with one scale a codebook."""
    granularity: Literal["channel", "tensor"] = "channel"
    """One scale (or pair of levels) for each output channel, which for an embedding is a word, or for a whole
    tensor."""
    clip: Literal["max", "mse"] = "max"
    """Scale of int8 and int4. max: the largest magnitude is the last code. mse: the least squared error, where large
    weights may be clipped; slower, and worth it at 4 bits."""
    pq: PqConfig = field(default_factory=PqConfig)
    """Blocks and centroids of pq and pq_int8; without effect for the other schemes."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns of the weights to quantize, by parameter name; only tensors of two or more dimensions count."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of weights to leave in fp32; a pattern that matches none is an error, in both lists."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.clip == "mse" and self.scheme not in ("int8", "int4"):
            raise ValueError(f"clip: mse is for int8 and int4, scheme is {self.scheme}; valid is max")
        if self.granularity == "tensor" and self.scheme.startswith("pq"):
            raise ValueError(f"granularity: tensor is for the other schemes, scheme is {self.scheme}; valid is channel")
        if not self.include:
            raise ValueError("include: must name at least one pattern, for instance ['*']")


@dataclass(frozen=True, kw_only=True)
class QuantNoiseConfig(QuantizeConfig):
    pq: PqNoiseConfig = field(default_factory=PqNoiseConfig)
    """Blocks, centroids and noise of pq; without effect for the other schemes."""
    p: float = 0.5
    """Fraction of the weights that an update sees quantized; 1 is quantization-aware training. Evaluation quantizes
    all."""
    block_size: int = 1
    """Weights that are quantized or left exact together, consecutive ones of a row; must divide the columns."""
    activations: bool = False
    """Quantize the inputs of the linear layers too, to 8 bits, in training and in the result (Q8BERT)."""
    ema_decay: float = 0.9999
    """Of the moving average of an input's largest magnitude, an update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"p: must be above 0 and at most 1, is {self.p}")
        if self.block_size < 1:
            raise ValueError(f"block_size: must be at least 1, is {self.block_size}")
        if self.scheme.startswith("pq") and self.block_size != 1:
            raise ValueError(f"block_size: is for the other schemes; {self.scheme} takes its blocks from pq.blocks")
        if self.scheme.startswith("pq") and self.p == 1 and self.pq.noise == "zero":
            raise ValueError("p: must be below 1 with pq.noise: zero, which would leave nothing else, is 1")
        if self.scheme.startswith("pq") and self.activations:
            raise ValueError(f"activations: must be false with scheme {self.scheme}; valid with the other schemes")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: must be at least 0 and below 1, is {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class IpqConfig(PqConfig):
    scheme: Literal["pq", "pq_int8"] = "pq"
    """pq: centroids in fp16. pq_int8: centroids in int8, one scale a codebook; they are trained as such."""
    together: bool = False
    """All groups are quantized at once, and trained once: for weights that are codewords already, as quant_noise with p
    = 1 leaves them. Else group follows group, with a training after each."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns of the weights to quantize, by parameter name; only tensors of two or more dimensions count."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of weights to leave in fp32; a pattern that matches none is an error, in both lists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.include:
            raise ValueError("include: must name at least one pattern, for instance ['*']")


@dataclass(frozen=True, kw_only=True)
class LotteryConfig:
    rounds: int = 5
    """Times that weights are pruned, rewound and trained again."""
    fraction: float = 0.2
    """Fraction of the surviving weights that each round prunes; (1 - fraction)^rounds are left in the end."""
    one_shot: bool = False
    """Prune to what `rounds` rounds leave at once, and train once."""
    scope: Literal["global", "module"] = "global"
    """global ranks the magnitudes of all weights together; module prunes the same fraction of each tensor."""
    granularity: Literal["weight"] = "weight"
    """What is pruned as one."""
    embeddings: bool = False
    """Prune embeddings too, and the output projection that is tied to them."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns of the weights to prune, by parameter name; only tensors of two or more dimensions count."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of weights to leave whole; a pattern that matches none is an error, in both lists."""
    rewind_to: int = 0
    """Update whose weights a round begins with, and whose place in schedule and data; one of the stage train's
    keep_updates. 0 are the initial weights."""
    moments: Literal["restore", "zero"] = "restore"
    """Adam's moments at the begin of a round: as they were at `rewind_to`, under the mask; or zero."""
    control: Literal["none", "random", "reinit", "no_rewind", "stabilised", "constant"] = "none"
    """none: lottery tickets, by late rewinding. What they are compared with: random: random masks of the same counts in
    each tensor, rewound alike. reinit: the masks on new random weights, trained from update 0. no_rewind: magnitude
    pruning; trained weights are kept, and only learning rate and data are rewound. stabilised: as Brix et al. 2020: the
    weights of `rewind_to` of the round before, with the schedule from update 0. constant: each tensor's surviving
    weights at `rewind_to` by their signs, in one magnitude."""
    masks_of: str = ""
    """With a control random, reinit or constant: the name of an earlier lottery stage of the recipe, whose masks it
    takes round by round; with `one_shot`, those of its round `rounds` alone. Without, each round prunes what the round
    before it trained."""

    @property
    def prunings(self) -> tuple[int, ...]:
        """How often the fraction has been pruned, by round."""
        return (self.rounds,) if self.one_shot else tuple(range(1, self.rounds + 1))

    def __post_init__(self) -> None:
        check_choices(self)
        if self.rounds < 1:
            raise ValueError(f"rounds: must be at least 1, is {self.rounds}")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction: must be in [0, 1), is {self.fraction}")
        if not self.include:
            raise ValueError("include: must name at least one pattern, for instance ['*']")
        if self.rewind_to < 0:
            raise ValueError(f"rewind_to: must be at least 0, is {self.rewind_to}")
        if self.control == "stabilised" and self.rewind_to == 0:
            raise ValueError("rewind_to: must be above 0 with control: stabilised, which begins with trained weights")
        if self.masks_of and self.control not in ("random", "reinit", "constant"):
            raise ValueError(f"masks_of: needs control: random, reinit or constant, is {self.control}")
