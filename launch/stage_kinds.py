"""The kinds of stages, their settings, and which may follow which: all that a recipe must know, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tenko.compression.config import IpqConfig, LotteryConfig, QuantizeConfig, QuantNoiseConfig
from tenko.nmt.config import DistillConfig, TrainConfig, require
from tenko.nmt.text_io import text_file

NOT_INHERITED = ("keep_updates", "engine", "zero_stage", "profile", "distill")
"""Keys of `train` in a later stage that take their own default, not what the stage train says."""


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    model: str | None = None
    """A model that ships with tenko (en-cs, cs-en), or an artefact's folder; null takes the recipe's direction."""


@dataclass(frozen=True, kw_only=True)
class QuantNoiseStage(QuantNoiseConfig):
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training under noise; keys that are left out are those of the recipe's stage train."""


@dataclass(frozen=True, kw_only=True)
class IpqStage(IpqConfig):
    distill: DistillConfig = field(default_factory=lambda: DistillConfig(weight=0.5))
    """Knowledge distillation from the model of the stage before, which is not quantized yet."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training after each group; keys that are left out are those of the recipe's stage train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.train.distill == DistillConfig(), "train.distill", "is set by distill in stage ipq")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    format: Literal["ctranslate2", "fairseq"] = "ctranslate2"
    """The program to write for."""
    quantization: Literal["int8", "int16", "fp32"] = "int8"
    """ctranslate2: the weights' type there."""


StageConfig = (
    TrainConfig | QuantizeConfig | PretrainedConfig | QuantNoiseStage | IpqStage | LotteryConfig | ExportConfig
)

STAGE_CONFIGS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "pretrained": PretrainedConfig,
    "lottery": LotteryConfig,
    "quant_noise": QuantNoiseStage,
    "ipq": IpqStage,
    "quantize": QuantizeConfig,
    "export": ExportConfig,
}
"""The kinds of stages and their settings."""

STAGE_AFTER: dict[str, tuple[str, ...]] = {
    "train": ("pretrained",),
    "pretrained": (),
    "lottery": ("train", "lottery"),
    "quant_noise": ("pretrained", "train", "lottery"),
    "ipq": ("pretrained", "train", "quant_noise"),
    "quantize": ("pretrained", "train", "lottery", "quant_noise"),
    "export": ("pretrained", "train", "lottery", "quant_noise", "ipq", "quantize"),
}
"""The kinds a stage may follow."""
FIRST = ("train", "pretrained")
"""The kinds that may stand first."""


class Spec(Protocol):
    """What the order of stages depends on."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Any: ...


def why_not(kind: str, before: Sequence[Spec]) -> str | None:
    """Why a stage of this kind can't stand after those; None if it can."""
    if not before:
        return None if kind in FIRST else f"must follow {_either(STAGE_AFTER[kind])}, is first"
    previous = before[-1].kind
    if previous not in STAGE_AFTER[kind]:
        after = STAGE_AFTER[kind]
        must = f"must follow {_either(after)}" if after else "must be first"
        must += " or be first" if after and kind in FIRST else ""
        return f"{must}, follows {previous}"
    return None


def problem(kind: str, config: StageConfig, before: Sequence[Spec]) -> tuple[str, str] | None:
    """What makes no sense in these settings after those stages: (key, message); None if all is well."""
    scheme = getattr(config, "scheme", "")
    if any(spec.kind == "lottery" for spec in before) and (found := unfit_for_pruned(kind, config)):
        return found
    if before and before[-1].kind == "quant_noise" and kind in ("quantize", "ipq"):
        noise = before[-1].config.scheme
        if not noise.startswith("pq"):
            return "", f"can't follow quant_noise with scheme {noise}, which leaves quantized weights already"
        if kind == "quantize" and before[-1].config.p == 1:
            return "", f"can't follow quant_noise with scheme {noise} and p: 1, which leaves codewords already"
        if kind == "quantize" and not scheme.startswith("pq"):
            return "scheme", f"must be pq or pq_int8 after quant_noise with scheme {noise}, is {scheme}"
        if isinstance(config, IpqConfig) and before[-1].config.p == 1:
            if config.bits:
                return "bits", "must be 0 after quant_noise with p: 1, whose codebooks this stage trains"
            if before[-1].config.pq.bits and config.centroids != 256:
                return (
                    "centroids",
                    "must be 256 after quant_noise with p: 1 and bits, which has chosen how many there are",
                )
    if isinstance(config, TrainConfig) and not before:
        for key, off in (("weight", 0), ("sequences", False), ("text", None)):
            if getattr(config.distill, key) != off:
                must = f"must be {'null' if off is None else str(off).lower()} in the first stage"
                return f"distill.{key}", f"{must}, which has no model before it to learn from"
    if isinstance(config, LotteryConfig):
        return _lottery_problem(config, before)
    own = getattr(config, "train", None)
    if own is not None and own.engine != "ddp":
        return "train.engine", f"must be ddp in stage {kind}, is {own.engine}"
    return None


def check_text(config: StageConfig) -> None:
    """Raise ValueError, which names the key, where the text that a stage learns from is no file."""
    for prefix, owner in (("", config), ("train.", getattr(config, "train", None))):
        distill = getattr(owner, "distill", None)
        if distill is not None and distill.text is not None:
            text_file(distill.text, f"{prefix}distill.text")


def unfit_for_pruned(kind: str, config: StageConfig) -> tuple[str, str] | None:
    """Why these settings make no sense for a pruned model: (key, message); None if they do."""
    scheme = getattr(config, "scheme", "pq" if kind == "ipq" else "")
    if not scheme.startswith("pq") and scheme != "binary":
        return None
    what = "codewords" if scheme.startswith("pq") else "two levels"
    reason = f"{what} would fill the zeros of the lottery before it; valid: int8, int4, ternary, lat"
    return ("scheme" if kind != "ipq" else "", f"{scheme} can't follow pruning, since {reason}")


def _lottery_problem(config: LotteryConfig, before: Sequence[Spec]) -> tuple[str, str] | None:
    dense = next(spec for spec in reversed(before) if spec.kind == "train")
    train = dense.config
    kept = ", ".join(map(str, train.keep_updates)) or "none"
    if config.rewind_to not in train.keep_updates and config.control != "reinit":
        return "rewind_to", f"update {config.rewind_to} is not among {dense.name}.keep_updates: {kept}"
    if config.rewind_to >= train.max_update:
        return "rewind_to", f"must be below max_update ({train.max_update}), is {config.rewind_to}"
    if train.engine != "ddp":
        return "", f"needs {dense.name}.engine: ddp, is {train.engine}"
    if config.masks_of:
        others = {spec.name: spec.config for spec in before if spec.kind == "lottery"}
        if config.masks_of not in others:
            valid = ", ".join(others) or "none"
            return "masks_of", f"{config.masks_of} is no lottery stage before this one; valid: {valid}"
        other = others[config.masks_of]
        for key in _SAME_MASKS:
            mine, its = getattr(config, key), getattr(other, key)
            if mine != its:
                return key, f"must be as in {config.masks_of}, whose masks are taken ({its}), is {mine}"
        if missing := set(config.prunings) - set(other.prunings):
            what = f"{config.masks_of} has no masks after {min(missing)} prunings"
            return "rounds", f"{what}; it has them after {', '.join(map(str, other.prunings))}"
    return None


_SAME_MASKS = ("fraction", "scope", "granularity", "embeddings", "include", "exclude")


def _either(kinds: Sequence[str]) -> str:
    return " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
